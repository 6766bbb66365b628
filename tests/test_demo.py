"""The first step of tools/demo.py, with a detector that finds something everywhere; the rest is tested tool by tool."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detector.inference import shipped
from detector.inference.detector import Detector

ROOT = Path(__file__).resolve().parents[1]


def test_boxes_on_photographs(
    small_detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = pytest.importorskip("skimage.data")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    small_detector.save(tmp_path / "weights" / f"{shipped.DEFAULT}.ckpt", half=True)
    runpy.run_path(str(ROOT / "tools" / "demo.py"))["photographs"]()
    told = capsys.readouterr().out
    assert "astronaut: " in told
    drawn = {name: np.asarray(Image.open(tmp_path / "runs/demo/photographs" / f"{name}.png")) for name in
             ("astronaut", "chelsea", "both")}  # fmt: skip
    assert drawn["astronaut"].shape == data.astronaut().shape
    assert 0 < (drawn["chelsea"] != data.chelsea()).any(axis=2).mean() < 0.5  # boxes and names, and the cat between
    assert drawn["both"].shape == (300, 300 + 451, 3)
    np.testing.assert_array_equal(drawn["both"][:, 300:], drawn["chelsea"])
