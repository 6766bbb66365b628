"""Promises of the package as a whole: what an import costs, what an installation brings, what is committed."""

from __future__ import annotations

import ast
import functools
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

import detector

ROOT = Path(__file__).resolve().parents[1]
TRAINING_ONLY = {"hydra", "omegaconf", "lightning", "pytorch_lightning", "matplotlib", "albumentations", "pycocotools"}
HEAVY = {"torch", "torchvision", "cv2", "numpy", "PIL"} | TRAINING_ONLY
# Where what an extra brings may be imported, beside what prediction needs.
EXTRAS = {
    "detector/apps/report/": {"train"},
    "detector/apps/doctor/": {"train"},
    "detector/apps/evaluate": {"train"},
    "detector/apps/serve/": {"serve"},
    "detector/cli/": {"train"},
    "detector/data/": {"train"},
    "detector/evaluation/": {"train"},
    "detector/export/": {"int8", "onnx", "openvino"},
    "detector/inference/detections.py": {"dev"},  # to_pandas, to_supervision: their users have the package
    "detector/inference/drawing.py": {"train"},
    "detector/inference/openvino_core.py": {"openvino"},
    "detector/inference/runtime.py": {"onnx", "openvino"},
    "detector/inference/video.py": {"video"},
    "detector/lab/": {"onnx", "openvino", "search", "train"},
    "detector/models/backbones/": {"timm"},
    "detector/models/weights.py": {"timm"},  # safetensors
    "detector/training/": {"train"},
    "tools/": {"demo", "train"},
}


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after one statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


def tracked_files() -> list[Path]:
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


# Which package a module is from: it reads the metadata of everything that is installed, a third of a second each time.
installed_packages = functools.cache(packages_distributions)


def imported_packages(path: Path) -> set[str]:
    """What a file imports, wherever in it, by the names that pip knows; without the standard library and our own."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
            modules |= {str(one.value).partition(".")[0] for one in node.args if isinstance(one, ast.Constant)}
    modules -= {*sys.stdlib_module_names, "detector", *(path.stem for path in (ROOT / "tools").glob("*.py"))}
    installed = installed_packages()
    return {installed.get(module, [module])[0].lower().replace("_", "-") for module in modules}


@pytest.mark.parametrize(
    "statement", ["import detector", "import detector; dir(detector); detector.InputError; detector.__version__"]
)
def test_import_detector_is_light(statement: str) -> None:
    assert modules_after(statement) & HEAVY == set()


def test_prediction_loads_nothing_of_training() -> None:
    loaded = modules_after("import detector; detector.Detector")
    assert "torch" in loaded
    assert loaded & TRAINING_ONLY == set()


def test_exports_are_opened_without_torch() -> None:
    assert "torch" not in modules_after("import detector; detector.load; detector.predict; detector.Detections")


@pytest.mark.parametrize("module", ["detector.apps.export", "detector.apps.doctor.run", "detector.training.run"])
def test_only_what_trains_waits_for_lightning(module: str) -> None:
    assert "lightning" not in modules_after(f"import {module}")


def test_public_names() -> None:
    assert set(detector.__all__) <= set(dir(detector))
    assert [name for name in detector.__all__ if not hasattr(detector, name)] == []
    assert issubclass(detector.InputError, ValueError)
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = detector.nothing


def test_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = requirement_names(project["dependencies"])
    assert core == {"numpy", "pillow", "opencv-python-headless", "pydantic", "torch", "torchvision"}
    train = requirement_names(project["optional-dependencies"]["train"])
    assert {"lightning", "hydra-core", "omegaconf", "pycocotools", "albumentations"} <= train
    # AGPL: would bind everybody who uses this project.
    assert "albumentationsx" not in core | train


def test_every_import_is_declared_where_it_is_used() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core, extras = project["dependencies"], project["optional-dependencies"]
    undeclared, seen = [], set()
    for path in sorted([*(ROOT / "detector").rglob("*.py"), *(ROOT / "tools").glob("*.py")]):
        name = path.relative_to(ROOT).as_posix()
        [allowed] = [extras_of for place, extras_of in EXTRAS.items() if name.startswith(place)] or [set()]
        declared = requirement_names([*core, *(line for extra in allowed for line in extras[extra])])
        imported = imported_packages(path)
        seen |= imported
        undeclared += [f"{name}: {package}" for package in sorted(imported - declared)]
    assert undeclared == []
    assert {"torch", "pillow", "opencv-python-headless", "hydra-core", "python-multipart", "tqdm"} <= seen


def test_every_configuration_file_parses() -> None:
    paths = sorted((ROOT / "conf").rglob("*.yaml"))
    assert paths != []
    broken = [str(path.relative_to(ROOT)) for path in paths if not isinstance(OmegaConf.load(path), DictConfig)]
    assert broken == []


def test_no_path_of_one_machine_is_committed() -> None:
    # The variable part of the pattern keeps this file out of its own findings.
    pattern = re.compile(r"(?<![\w.])/(?:home|Users|work|root)/\w")
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # an image, not a text
        found += [f"{path.relative_to(ROOT)}:{number}" for number, line in enumerate(lines, 1) if pattern.search(line)]
    assert found == []
