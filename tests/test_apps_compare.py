"""tools/compare.py as a process: results files, checkpoints, run directories, and two that do not belong together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_case import write_case
from scored_data import write_scored_data
from scored_rows import evaluate
from tool_runner import run_tool

from detector.apps.compare import CompareOptions, _find_side, compare
from detector.data.images import read_image
from detector.data.splits import load_split
from detector.inference.detector import Detector


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def results(tmp_path: Path, tiny_coco: Path) -> dict[str, Path]:
    """a finds nothing of tiny_coco but a car; b finds its four objects."""
    objects = json.loads((tiny_coco / "annotations/val.json").read_text())["annotations"]
    rows = [{key: o[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for o in objects]
    return {"a": write(tmp_path / "a.json", rows[1:2]), "b": write(tmp_path / "b.json", rows)}


def test_two_results_files(tmp_path: Path, tiny_coco: Path, results: dict[str, Path]) -> None:
    annotations = tiny_coco / "annotations/val.json"
    outcome = run_tool(
        "compare", f"a={results['a']}", f"b={results['b']}", f"annotations={annotations}", "draws=50", cwd=tmp_path
    ).ok()
    result = json.loads((tmp_path / "compare/compare.json").read_text())
    for side in ("a", "b"):
        assert result["figures"]["AP"][side] == pytest.approx(evaluate(results[side], annotations)["AP"], abs=1e-9)
    assert {row["file_name"] for row in result["better"]} == {"a.png", "b.jpg", "sub/c.jpg"}
    assert "b better" in outcome.err
    assert "sub/c.jpg" in outcome.err
    folder = tmp_path / "as eval.py writes it"
    folder.mkdir()
    results["b"].rename(folder / "detections.json")
    found = _find_side("b", folder, CompareOptions(a="", b=""), load_split)
    assert (found.results, found.index) == (folder / "detections.json", None)


@pytest.mark.slow
def test_a_checkpoint_and_a_run_that_has_been_scored(tmp_path: Path, small_detector: Detector) -> None:
    """A checkpoint is scored; of a run, the detections are taken where they are of best.ckpt on these images."""
    root = write_scored_data(tmp_path / "data", small_detector)
    run, scoring = tmp_path / "run", (f"data.root={root}", "report=false")
    run.mkdir()
    small_detector.save(run / "best.ckpt")
    shutil.copy(run / "best.ckpt", run / "last.ckpt")
    command = (f"a={run / 'best.ckpt'}", f"b={run}", f"data.root={root}", "draws=20", "out=out")

    def compared() -> dict[str, float]:
        run_tool("compare", *command, cwd=tmp_path).ok()
        row: dict[str, float] = json.loads((tmp_path / "out/compare.json").read_text())["figures"]["AP"]
        return row

    run_tool("eval", f"ckpt={run / 'best.ckpt'}", *scoring, cwd=tmp_path).ok()
    write(run / "eval/detections.json", [])
    row = compared()
    expected = evaluate(tmp_path / "out/a/detections.json", root / "annotations/val.json")["AP"]
    assert row["a"] == pytest.approx(expected, abs=1e-9)
    assert expected > 0.05
    assert row["b"] == 0
    # Of other images with the same names.
    shutil.copytree(root / "images", root / "black")
    for path in (root / "black").iterdir():
        Image.fromarray(np.zeros_like(read_image(path))).save(path)
    run_tool("eval", f"ckpt={run / 'best.ckpt'}", *scoring, "data.val.images=black", cwd=tmp_path).ok()
    assert json.loads((run / "eval/metrics.json").read_text())["AP"] != pytest.approx(expected, abs=1e-3)
    assert compared()["b"] == pytest.approx(expected, abs=1e-9)
    # Of a part of the images; of another checkpoint; of nobody knows what.
    run_tool("eval", f"ckpt={run / 'best.ckpt'}", *scoring, "data.val.limit=2", cwd=tmp_path).ok()
    assert compared()["b"] == pytest.approx(expected, abs=1e-9)
    small_detector.save(run / "best.ckpt", half=True)
    run_tool("eval", f"ckpt={run / 'last.ckpt'}", *scoring, cwd=tmp_path).ok()
    write(run / "eval/detections.json", [])
    assert compared()["b"] == pytest.approx(expected, abs=0.05)
    (run / "eval/scored.json").unlink()
    assert compared()["b"] == pytest.approx(expected, abs=0.05)
    # A results file beside a checkpoint is scored on the checkpoint's data.
    run_tool("compare", f"a={tmp_path / 'out/a/detections.json'}", *command[1:], cwd=tmp_path).ok()


def test_the_annotation_file_is_parsed_once(
    tmp_path: Path, small_detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_scored_data(tmp_path / "data", small_detector)
    for name in ("a.ckpt", "b.ckpt"):
        small_detector.save(tmp_path / name)
    opened: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or read_bytes(path))
    sides = {side: str(tmp_path / f"{side}.ckpt") for side in ("a", "b")}
    given = {"data": {"root": str(root)}, "annotations": str(root / "annotations/val.json"), "workers": 0, "draws": 5}
    compare(CompareOptions.parse(sides | given | {"out": str(tmp_path / "out")}))
    assert opened.count("val.json") == 1
    assert opened.count("detections.json") == 2


def test_detections_that_were_made_on_other_data_are_noticed(
    tmp_path: Path, tiny_coco: Path, results: dict[str, Path]
) -> None:
    write(tmp_path / "metrics.json", {"AP": 0.123})
    truth = f"annotations={tiny_coco / 'annotations/val.json'}"
    outcome = run_tool("compare", f"a={results['a']}", f"b={results['b']}", truth, "draws=5", cwd=tmp_path).ok()
    assert "0.123 in the metrics.json" in outcome.err


@pytest.mark.slow
def test_two_that_do_not_belong_together(
    tmp_path: Path, tiny_coco: Path, results: dict[str, Path], small_detector: Detector
) -> None:
    root = write_scored_data(tmp_path / "data", small_detector)
    small_detector.save(tmp_path / "best.ckpt")
    pair = (f"a={tmp_path / 'best.ckpt'}", f"b={results['b']}", f"data.root={root}")
    other = f"annotations={tiny_coco / 'annotations/val.json'}"
    message = run_tool("compare", *pair, other, cwd=tmp_path).error()
    assert "which differ" in message
    assert str(root) in message
    assert "error: b: " in run_tool("compare", *pair, cwd=tmp_path).error()


@pytest.mark.slow
def test_mistakes_of_the_command_line(tmp_path: Path, tiny_coco: Path, results: dict[str, Path]) -> None:
    files = (f"a={results['a']}", f"b={results['b']}")
    truth = f"annotations={tiny_coco / 'annotations/val.json'}"
    (tmp_path / "empty").mkdir()
    for overrides, part in (
        ((), "a is missing"),
        (files, "annotations=FILE"),
        ((*files, "annotations=nowhere.json"), "nowhere.json"),
        ((files[0], "b=empty", truth), "no best.ckpt"),
        ((files[0], "b=nowhere.ckpt", truth), "No checkpoint at 'nowhere.ckpt'"),
        (
            (*files, truth, "draws=99999999999999999999"),
            "draws=99999999999999999999: expected a whole number from 1 to 10000",
        ),
    ):
        assert part in run_tool("compare", *overrides, cwd=tmp_path).error()


def test_scores_that_are_no_shares(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_case(tmp_path / "case")
    rows = json.loads((folder / "dt.json").read_text())
    write(folder / "percent.json", [row | {"score": 1e308 * row["score"]} for row in rows])
    found = []
    for b in ("dt.json", "percent.json"):
        compare(
            CompareOptions(
                a=str(folder / "dt.json"), b=str(folder / b), annotations=str(folder / "gt.json"), draws=20,
                out=str(tmp_path / b),
            )
        )  # fmt: skip
        found.append(json.loads((tmp_path / b / "compare.json").read_text())["figures"])
    assert found[0] == found[1]
    assert "b: 10 of 10 scores lie outside 0 to 1" in caplog.text
