from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import pytest
from judged_rows import box_iou, naive_kinds, random_rows
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scored_rows import evaluate, read_records

from detector.evaluation.outcomes import judge
from detector.evaluation.subsets import _short, score_subsets

Value = Callable[[dict[str, Any]], float]


def slices_of(ground_truth: dict[str, Any], results: list[dict[str, Any]], properties: Any = None) -> dict[str, Any]:
    return score_subsets(judge(read_records(results, ground_truth)), properties)


def test_sizes_are_cocos():
    ground_truth, results = random_rows(0, images=60)
    for row in (*ground_truth["annotations"], *results):  # so that all three sizes are there
        scale = (1, 2, 7)[row["image_id"] % 3]
        row["bbox"] = [value * scale for value in row["bbox"]]
        row["area"] = row.get("area", 0) * scale**2
    wanted = evaluate(results, ground_truth, metrics="pycocotools")

    found = slices_of(ground_truth, results)["coco_size"]

    assert [row["AP"] for row in found] == [pytest.approx(wanted[name]) for name in ("APs", "APm", "APl")]
    areas = [truth["area"] for truth in ground_truth["annotations"] if not truth["iscrowd"]]
    assert [row["truths"] for row in found] == [
        sum(low <= area <= high for area in areas) for low, high in ((0, 1024), (1024, 9216), (9216, 1e10))
    ]
    assert min(row["truths"] for row in found) > 3


def coco_slice(
    ground_truth: dict[str, Any],
    results: list[dict[str, Any]],
    truth_value: Value,
    value: Value,
    low: float,
    high: float,
) -> tuple[float | None, float | None]:
    """AP and AP50 from pycocotools, whose areas are replaced by a quantity."""

    def index(rows: list[dict[str, Any]], quantity: Value) -> COCO:
        api = COCO()
        numbered = [{"iscrowd": 0, **row, "id": i + 1, "area": quantity(row)} for i, row in enumerate(rows)]
        api.dataset = ground_truth | {"annotations": numbered}
        api.createIndex()
        return api

    with redirect_stdout(io.StringIO()):
        scores = COCOeval(index(ground_truth["annotations"], truth_value), index(results, value), "bbox")
        scores.params.areaRng, scores.params.areaRngLbl = [[low, high]], ["slice"]
        scores.evaluate()
        scores.accumulate()
    precision = scores.eval["precision"][:, :, :, 0, -1]
    return tuple(part[part > -1].mean() if (part > -1).any() else None for part in (precision, precision[0]))


def check_objects(ground_truth: dict[str, Any], results: list, rows: list, truth_value: Value, value: Value) -> None:
    real = [truth for truth in ground_truth["annotations"] if not truth["iscrowd"]]
    for row in rows:
        wanted = coco_slice(ground_truth, results, truth_value, value, row["low"], row["high"])
        assert (row["AP"], row["AP50"]) == (pytest.approx(wanted[0]), pytest.approx(wanted[1]))
        assert row["truths"] == sum(row["low"] <= truth_value(truth) <= row["high"] for truth in real)
    assert sum(row["truths"] > 0 for row in rows) > 2


def height_over_width(row: dict[str, Any]) -> float:
    return row["bbox"][3] / row["bbox"][2]


def test_finer_sizes_and_shapes_are_cocos_with_another_quantity():
    ground_truth, results = random_rows(1, images=60)
    found = slices_of(ground_truth, results)
    check_objects(
        ground_truth, results, found["size"], lambda truth: truth["area"], lambda row: row["bbox"][2] * row["bbox"][3]
    )
    check_objects(ground_truth, results, found["aspect"], height_over_width, height_over_width)


@pytest.mark.parametrize("seed", range(3))
def test_crowding_is_counted_by_a_plain_loop(seed: int):
    ground_truth, results = random_rows(seed, images=40)
    truths = ground_truth["annotations"]
    _, about = naive_kinds(ground_truth, results)

    def overlaps(truth: dict[str, Any]) -> list[float]:
        others = [t for t in truths if t["image_id"] == truth["image_id"] and not t["iscrowd"] and t is not truth]
        return [0.0] if truth["iscrowd"] else [box_iou(truth["bbox"], other["bbox"]) for other in others] + [0.0]

    largest = {tuple(t["bbox"]): max(overlaps(t)) for t in truths}
    touched = {tuple(t["bbox"]): float(sum(iou > 0 for iou in overlaps(t))) for t in truths}
    found = slices_of(ground_truth, results)
    for name, values in (("overlap", largest), ("neighbours", touched)):
        own = {
            tuple(row["bbox"]): 0.0 if g is None else values[tuple(truths[g]["bbox"])]
            for row, g in zip(results, about, strict=True)
        }
        check_objects(
            ground_truth,
            results,
            found[name],
            lambda truth, values=values: values[tuple(truth["bbox"])],
            lambda row, own=own: own[tuple(row["bbox"])],
        )


def test_slices_of_images_are_evaluations_of_these_images():
    ground_truth, results = random_rows(2, images=40)
    ids = [picture["id"] for picture in ground_truth["images"]]
    rng = np.random.default_rng(0)
    light = dict(zip(ids, rng.permutation(len(ids)) / 40, strict=True))
    del light[ids[0]]
    real = [truth["image_id"] for truth in ground_truth["annotations"] if not truth["iscrowd"]]
    counts = {image_id: real.count(image_id) for image_id in ids}

    found = slices_of(ground_truth, results, {image_id: {"brightness": value} for image_id, value in light.items()})

    for name, values in (("brightness", light), ("objects", counts)):
        for row in found[name]:
            chosen = [image_id for image_id, value in values.items() if row["low"] <= value <= row["high"]]
            assert row["images"] == len(chosen)
            wanted = evaluate(results, ground_truth, image_ids=chosen, metrics="pycocotools")
            assert (row["AP"], row["AP50"]) == (pytest.approx(wanted["AP"]), pytest.approx(wanted["AP50"]))
    assert [row["images"] for row in found["brightness"]] == [13, 13, 13]
    assert found["objects"][-1] == {
        "name": "20 and more",
        "low": 20,
        "high": 1e10,
        "images": 0,
        "AP": None,
        "AP50": None,
    }


def test_images_of_one_brightness_are_one_slice():
    ground_truth, results = random_rows(2)
    same = {picture["id"]: {"brightness": 0.25} for picture in ground_truth["images"]}
    rows = slices_of(ground_truth, results, same)["brightness"]
    assert [(row["name"], row["images"]) for row in rows] == [("0.25-0.25", 6)]


def test_without_detections_ap_is_zero_where_there_are_objects():
    ground_truth, _ = random_rows(2)
    for rows in slices_of(ground_truth, []).values():
        for row in rows:
            assert row["AP"] == (0.0 if row.get("truths", row.get("images")) else None)


@pytest.mark.parametrize(("value", "text"), [(0.0234567, "0.0235"), (4.306, "4.31"), (99.96, "100"), (1330.4, "1330")])
def test_bounds_are_written_short_and_without_exponents(value: float, text: str) -> None:
    assert _short(value) == text
