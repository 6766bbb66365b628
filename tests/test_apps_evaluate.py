"""Scoring a checkpoint as a library user does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scored_data import write_scored_data

from detector.apps.evaluate import EvalOptions, evaluate
from detector.data import annotations
from detector.inference.detector import Detector


def test_one_evaluation_with_its_report_parses_the_annotations_once(
    small_detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics, diagnosis, the two stages apart and the doctor's section, all from one index."""
    root = write_scored_data(tmp_path / "data", small_detector)
    small_detector.save(tmp_path / "small.ckpt")
    parsed: list[Path] = []
    read = annotations.read_json
    monkeypatch.setattr(annotations, "read_json", lambda path, *rest: parsed.append(Path(path)) or read(path, *rest))
    options = {"ckpt": str(tmp_path / "small.ckpt"), "data": {"root": str(root)}, "out": str(tmp_path / "eval")}
    metrics = evaluate(EvalOptions.parse(options | {"workers": 0, "trainer": {"accelerator": "cpu"}}))
    assert parsed == [root / "annotations" / "val.json"]
    assert metrics["AP"] > 0
    diagnosis = json.loads((tmp_path / "eval" / "diagnosis.json").read_text())
    assert diagnosis["two_stages"]["images"] == 5
    assert "class_balance" in (tmp_path / "eval" / "report.html").read_text()
