"""What pyproject.toml cannot say: conf/, which lies beside the package, goes into it as detector/conf/."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["detector*"]), "detector.conf"], package_dir={"detector.conf": "conf"})
