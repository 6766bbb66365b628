"""`pip install .` alone gives a detector that loads and predicts, away from the clone, without the extras."""

from __future__ import annotations

import subprocess
import sys
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

assert detector.__file__.startswith(sys.argv[1]), detector.__file__
by_path = detector.predict("street.jpg", ckpt="best.ckpt", score_threshold=0.0)
held = detector.load("best.ckpt")
again = held.predict(["street.jpg"], score_threshold=0.0)
assert len(by_path) == 1 and len(again) == 1
assert len(by_path[0]) > 0
assert by_path[0].to_dict() == again[0].to_dict()
by_path[0].draw().save("boxes.png")
print("found", len(by_path[0]))
"""


@pytest.mark.slow
def test_installed_package_predicts_elsewhere(tmp_path: Path, small_detector: Detector) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(ROOT)]
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
