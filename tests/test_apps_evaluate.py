"""Scoring a checkpoint as a library user does."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scored_data import renumber_classes, write_scored_data

from detector.apps import evaluate as evaluate_module
from detector.apps.compare import CompareOptions, compare
from detector.apps.evaluate import EvalOptions, evaluate
from detector.apps.scoring import GivenDataOptions, evaluation_data
from detector.cli import explain
from detector.data import annotations
from detector.data.splits import DataOptions
from detector.errors import InputError
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


def test_no_room_for_the_detections_of_a_checkpoint(
    small_detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, metrics.json is whole, and detections.json of the run before is what it was."""
    root = write_scored_data(tmp_path / "data", small_detector)
    small_detector.save(tmp_path / "small.ckpt")
    out = tmp_path / "eval"
    out.mkdir()
    (out / "detections.json").write_text("[]\n")
    write = Path.write_text

    def write_half(path: Path, text: str, **more: Any) -> int:
        if path.name.startswith(".detections."):
            write(path, text[: len(text) // 2], **more)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, text, **more)

    monkeypatch.setattr(Path, "write_text", write_half)
    options = {"ckpt": str(tmp_path / "small.ckpt"), "data": {"root": str(root)}, "out": str(out)}
    with pytest.raises(OSError, match=r"detections\.json") as caught:
        evaluate(EvalOptions.parse(options | {"workers": 0, "trainer": {"accelerator": "cpu"}}))
    message = explain(caught.value)
    assert (
        message
        == f"cannot write {out / 'detections.json'}: no space left on device. Make room, or choose another place."
    )
    assert sorted(path.name for path in out.iterdir()) == ["detections.json", "metrics.json"]
    assert json.loads((out / "metrics.json").read_text())["AP"] > 0
    assert (out / "detections.json").read_text() == "[]\n"


def test_a_checkpoint_with_odd_names_of_classes_and_files(small_detector: Detector, tmp_path: Path) -> None:
    """Scored, reported with both stages and the doctor's section, and compared; names are as they were."""
    root = write_scored_data(tmp_path / "data", small_detector)
    small_detector.class_names = ("cat", "dog\ud800", "bird\x1b[31m")
    path = root / "annotations/val.json"
    content = json.loads(path.read_text())
    for category, name in zip(content["categories"], small_detector.class_names, strict=True):
        category["name"] = name
    for image, name in zip(content["images"], ("caf\udce9.png", "n" * 250 + ".png"), strict=False):
        (root / "images" / image["file_name"]).rename(root / "images" / name)
        image["file_name"] = name
        image["id"] = f"id\udce9 {image['id']}"
    for annotation in content["annotations"]:
        annotation["image_id"] = next(
            image["id"] for image in content["images"] if str(image["id"]).endswith(str(annotation["image_id"]))
        )
    path.write_text(json.dumps(content))
    small_detector.save(tmp_path / "small.ckpt")
    options = {"ckpt": str(tmp_path / "small.ckpt"), "data": {"root": str(root)}, "out": str(tmp_path / "eval")}
    metrics = evaluate(EvalOptions.parse(options | {"workers": 0, "trainer": {"accelerator": "cpu"}}))
    assert list(metrics["per_class"]) == list(small_detector.class_names)
    assert metrics["AP"] > 0
    written = {one.name: one.read_bytes().decode("utf-8") for one in (tmp_path / "eval").iterdir()}
    ids = {row["image_id"] for row in json.loads(written["detections.json"])}
    assert "id\udce9 100" in ids
    assert json.loads(written["diagnosis.json"])["two_stages"]["images"] == 5
    assert "n" * 250 in written["report.html"]
    results = {"results": str(tmp_path / "eval/detections.json"), "annotations": str(path), "out": str(tmp_path / "b")}
    assert evaluate(EvalOptions.parse(results))["AP"] == metrics["AP"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": "test.json"}, r"annotations=test\.json is for results=; .* data\.val\.annotations="),
        ({"images": "photos"}, r"images=photos is for results=; .* data\.val\.images="),
        (
            {"ckpt": None, "results": "r.json", "annotations": "a.json", "data": {"val": {"limit": 2}}},
            r"data\.\* is for",
        ),
    ],
)
def test_what_would_not_count_is_refused(small_detector: Detector, tmp_path: Path, changes: dict, message: str) -> None:
    """The figures of another split than the one that was asked for would be believed."""
    small_detector.save(tmp_path / "small.ckpt")
    with pytest.raises(InputError, match=message):
        evaluate(EvalOptions.parse({"ckpt": str(tmp_path / "small.ckpt")} | changes))


def test_metrics_that_the_data_set_does_not_have_are_refused_before_anything_is_predicted(
    small_detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_scored_data(tmp_path / "data", small_detector)
    small_detector.save(tmp_path / "small.ckpt")
    monkeypatch.setattr(Detector, "detect_prepared", lambda *_: pytest.fail("it has predicted"))
    options = {"ckpt": str(tmp_path / "small.ckpt"), "data": {"root": str(root)}, "metrics": "lvis", "workers": 0}
    with pytest.raises(InputError, match=r"neg_category_ids.* metrics=lvis"):
        evaluate(EvalOptions.parse(options | {"trainer": {"accelerator": "cpu"}}))


def test_a_data_set_with_the_classes_in_another_order(small_detector: Detector, tmp_path: Path) -> None:
    """Scored by name: the same AP of each class, detections with the ids of the file; and compared on a copy of it."""
    root = write_scored_data(tmp_path / "data", small_detector)
    small_detector.save(tmp_path / "small.ckpt")
    base = {"ckpt": str(tmp_path / "small.ckpt"), "data": {"root": str(root)}, "workers": 0, "report": False}
    before = evaluate(EvalOptions.parse(base | {"out": str(tmp_path / "a"), "trainer": {"accelerator": "cpu"}}))
    path, ids = root / "annotations/val.json", {3: 90, 17: 3, 90: 17}
    renumber_classes(path, ids)
    after = evaluate(EvalOptions.parse(base | {"out": str(tmp_path / "b"), "trainer": {"accelerator": "cpu"}}))
    assert after["per_class"] == before["per_class"]
    assert len({*before["per_class"].values()}) == 3
    found = [json.loads((tmp_path / out / "detections.json").read_text()) for out in "ab"]
    assert [ids[row["category_id"]] for row in found[0]] == [row["category_id"] for row in found[1]]
    copy = tmp_path / "copy.json"
    copy.write_text(path.read_text())
    sides = {"a": base["ckpt"], "b": str(tmp_path / "b/detections.json"), "annotations": str(copy), "draws": 2}
    compare(CompareOptions.parse(sides | {"data": base["data"], "out": str(tmp_path / "c"), "workers": 0}))
    row = json.loads((tmp_path / "c/compare.json").read_text())["figures"]["AP"]
    assert row["a"] == row["b"] == pytest.approx(before["AP"], abs=1e-12)


def trained_on(**data: Any) -> Any:
    return SimpleNamespace(provenance={"config": {"data": DataOptions.parse({"root": "a"} | data).to_dict()}})


def test_what_belongs_to_the_data_of_the_training_does_not_go_with_other_data() -> None:
    detector = trained_on(exif_boxes="stored", val={"limit": 3, "annotations": "x.json"})
    data = evaluation_data(GivenDataOptions.parse({}), detector)
    assert (data.exif_boxes, data.val.limit, data.val.annotations) == ("stored", 3, "x.json")
    data = evaluation_data(GivenDataOptions.parse({"root": "b"}), detector)
    assert (data.root, data.exif_boxes, data.val.limit, data.val.annotations) == ("b", None, None, "x.json")
    data = evaluation_data(GivenDataOptions.parse({"root": "b", "exif_boxes": "turned", "val": {"limit": 5}}), detector)
    assert (data.exif_boxes, data.val.limit) == ("turned", 5)


def test_detections_are_recorded_as_those_of_the_checkpoint_that_made_them(
    small_detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that still trains replaces best.ckpt; and what lies there of another evaluation does not stay."""
    root = write_scored_data(tmp_path / "data", small_detector)
    small_detector.save(tmp_path / "best.ckpt")
    digest = hashlib.sha256((tmp_path / "best.ckpt").read_bytes()).hexdigest()
    (tmp_path / "eval").mkdir()
    for name in ("scored.json", "report.html", "diagnosis.json"):
        (tmp_path / "eval" / name).write_text("{}")
    validate = evaluate_module._validate

    def replaced_meanwhile(*given: Any) -> Any:
        (tmp_path / "best.ckpt").write_bytes(b"of the next epoch")
        return validate(*given)

    monkeypatch.setattr(evaluate_module, "_validate", replaced_meanwhile)
    given = {"ckpt": str(tmp_path / "best.ckpt"), "data": {"root": str(root)}, "out": str(tmp_path / "eval")}
    given |= {"workers": 0, "trainer": {"accelerator": "cpu"}, "report": False}
    evaluate(EvalOptions.parse(given))
    assert json.loads((tmp_path / "eval/scored.json").read_text())["ckpt"] == digest
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {"metrics.json", "detections.json", "scored.json"}


def test_an_export_is_not_said_to_run_on_a_device() -> None:
    options = EvalOptions.parse({"ckpt": "a.onnx", "trainer": {"accelerator": "gpu"}})
    with pytest.raises(InputError, match=r"trainer\.\* is for a checkpoint; a\.onnx is predicted .* on the CPU"):
        evaluate(options)
