"""What `pip install` gives, away from the clone: prediction without the extras, and the commands with `train`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detector.inference.detector import Detector

ROOT = Path(__file__).resolve().parents[1]
# What only the extra `train` brings; the program below makes importing it fail, as where it is not installed.
TRAINING_ONLY = (
    "lightning", "hydra", "omegaconf", "albumentations", "hotcoco", "pycocotools", "tensorboard", "matplotlib", "rich",
    "tqdm", "yaml",
)  # fmt: skip
PROGRAM = f"""
import sys

for name in {TRAINING_ONLY!r}:
    sys.modules[name] = None

import detector
from detector.inference import shipped

assert detector.__file__.startswith(sys.argv[1]), detector.__file__
by_path = detector.predict("street.jpg", ckpt="best.ckpt", score_threshold=0.0)
held = detector.load("best.ckpt")
again = held.predict(["street.jpg"], score_threshold=0.0)
assert shipped.DEFAULT in shipped.names() and "named" in shipped.names()
assert len(by_path) == 1 and len(again) == 1
assert len(by_path[0]) > 0
assert by_path[0].to_dict() == again[0].to_dict()
by_path[0].draw().save("boxes.png")
print("found", len(by_path[0]))
"""


# Two runs in one process, and a score.
NOTEBOOK = """
import sys

import detector

assert detector.__file__.startswith(sys.argv[1]), detector.__file__
tiny = {"data.generate": {"train": 4, "val": 2, "size": 96}, "input": {"short_side": 96, "long_side": 96}}
runs = [detector.train("demo", schedule={"epochs": 1}, seed=seed, **tiny) for seed in (0, 1)]
assert len(set(runs)) == 2, runs
metrics = detector.evaluate(runs[0] / "best.ckpt", report=False)
assert "AP" in metrics
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from copies: what earlier builds left beside the sources would go into it."""
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    for name in ("detector", "conf"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    (sources / "detector" / "weights" / "named.ckpt").write_bytes(b"trained")
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(sources)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, timeout=300)
    [path] = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_installed_package_predicts_elsewhere(tmp_path: Path, wheel: Path, small_detector: Detector) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, timeout=300)
    small_detector.save(elsewhere / "best.ckpt")
    noise = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(elsewhere / "street.jpg")
    outcome = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(site)],
        cwd=elsewhere, env={"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}, timeout=120,
        capture_output=True, text=True,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert "found" in outcome.stdout
    assert (elsewhere / "boxes.png").is_file()


@pytest.mark.slow
def test_the_commands_of_an_installation_work_elsewhere(tmp_path: Path, wheel: Path) -> None:
    environment, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(environment, with_pip=False)
    install = ["install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(environment), *install], check=True, timeout=300)
    # The other packages are those of the tests; their own link to the clone is in a .pth, which is not read again.
    [site] = environment.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))

    def run(*command: str) -> str:
        outcome = subprocess.run(
            [str(environment / "bin" / command[0]), *command[1:]],
            cwd=elsewhere, env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}, timeout=300, capture_output=True,
            text=True,
        )  # fmt: skip
        assert outcome.returncode == 0, outcome.stderr
        return outcome.stdout + outcome.stderr

    assert "[demo] finetune paper voc" in run("light-head", "train", "--help")
    tiny = ("schedule.epochs=1", "data.generate={train: 4, val: 2, size: 96}", "input={short_side: 96, long_side: 96}")
    run("light-head", "train", "recipe=demo", "run_dir=1.10", *tiny)
    run("light-head", "eval", "ckpt=1.10/best.ckpt", "out=2024_01_15", "report=false")
    assert "AP" in json.loads((elsewhere / "2024_01_15/metrics.json").read_text())
    assert " in 6 images: 1e3" in run(
        "light-head", "predict", "ckpt=1.10/best.ckpt", "source=data/shapes/images", "out=1e3"
    )
    run("python", "-c", NOTEBOOK, str(site))
