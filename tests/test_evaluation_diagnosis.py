from __future__ import annotations

import json
from pathlib import Path

import pytest
from judged_rows import random_rows
from scored_rows import diagnose, evaluate

from detector.data.annotations import load_annotations
from detector.data.results import read_results
from detector.errors import InputError
from detector.evaluation.diagnosis import diagnose as diagnose_arrays


def test_everything_is_there_and_fits_into_json(tmp_path: Path):
    ground_truth, results = random_rows(0, images=20)
    (tmp_path / "truth.json").write_text(json.dumps(ground_truth))
    (tmp_path / "results.json").write_text(json.dumps(results))

    found = diagnose(tmp_path / "results.json", tmp_path / "truth.json")

    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["images"], found["detections"]) == (20, len(results))
    assert found["truths"] == sum(not truth["iscrowd"] for truth in ground_truth["annotations"])
    # One matching behind all of them: the parts agree with each other and with COCO.
    figures = evaluate(results, ground_truth)
    assert found["tide"]["AP50"] == pytest.approx(100 * figures["AP50"])
    assert sum(found["curves"]["precision"]) / 101 == pytest.approx(figures["AP"])
    assert found["score_threshold"] == found["curves"]["f1"]["all"]["best"]["threshold"]
    assert found["confusion"]["score_threshold"] == found["score_threshold"]
    assert sum(map(sum, found["confusion"]["matrix"][:-1])) == found["truths"]
    assert all(d["score"] >= found["score_threshold"] for row in found["worst"] for d in row["detections"])
    assert len(found["worst"]) == 12


def test_images_are_read_where_they_are_given(tiny_coco: Path):
    path = tiny_coco / "annotations/val.json"
    results = [{"image_id": 10, "category_id": 3, "bbox": [4, 6, 20, 10], "score": 0.9}]

    index = load_annotations(path, tiny_coco / "images").select([0, 1])
    found = diagnose_arrays(read_results(results, index), index, properties=2, score_threshold=0.25, worst_count=1)

    assert found["images"] == 2
    assert found["score_threshold"] == 0.25
    assert sum(row["images"] for row in found["slices"]["sharpness"]) == 2
    assert [row["file_name"] for row in found["worst"]] == ["b.jpg"]  # one object missed in each: the lower id


@pytest.mark.parametrize(("keep_results", "keep_truths"), [(False, True), (True, False), (False, False)])
def test_empty_inputs_give_figures_that_fit_into_json(keep_results: bool, keep_truths: bool):
    ground_truth, results = random_rows(0)
    if not keep_truths:
        ground_truth["annotations"] = []
    found = diagnose(results if keep_results else [], ground_truth)
    json.dumps(found, allow_nan=False)
    assert found["detections"] == (len(results) if keep_results else 0)
    assert found["tide"]["errors"]["missed"]["count"] == found["truths"]


def test_results_of_another_data_set_are_named():
    ground_truth, results = random_rows(0)
    with pytest.raises(InputError, match="unknown image"):
        diagnose([results[0] | {"image_id": 4711}], ground_truth)


def test_the_golden_example_of_the_coco_api(shared: Path):
    """The figures that it publishes; it has 100 real images, with crowd regions."""
    folder = shared / "data" / "coco-golden"
    found = diagnose(folder / "instances_val2014_fakebbox100_results.json", folder / "instances_val2014_100_bbox.json")
    assert sum(found["curves"]["precision"]) / 101 == pytest.approx(0.505, abs=5e-4)
    assert found["tide"]["AP50"] == pytest.approx(69.7, abs=0.05)
    sizes = [row["AP"] for row in found["slices"]["coco_size"]]
    assert sizes == [pytest.approx(value, abs=5e-4) for value in (0.586, 0.519, 0.501)]
    # Its results are the true boxes with some classes changed and some left out.
    errors = {kind: row["count"] for kind, row in found["tide"]["errors"].items()}
    assert errors["classification"] + errors["missed"] > 50 * (errors["localisation"] + errors["background"])
