"""Thresholds and calibration that are found where they were planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scored_rows import index_of

from detector.data.results import read_results
from detector.evaluation.operating_point import operating_point


def side_by_side(rows: list[tuple[int, float, bool]], missed: dict[int, int] | None = None, **flags: int) -> Any:
    """A ground truth and results of one box each, by category, score, and whether an object lies there."""
    rows = [*rows, *((label, -1.0, True) for label, count in (missed or {}).items() for _ in range(count))]
    boxes = [[20.0 * i, 0.0, 10.0, 10.0] for i in range(len(rows))]
    truth = {
        "images": [{"id": 1, "width": 20 * len(rows), "height": 10}],
        "categories": [{"id": k, "name": f"class {k}"} for k in (1, 2, 3)],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": label, "bbox": boxes[i], **flags}
            for i, (label, _, there) in enumerate(rows)
            if there
        ],
    }
    found = [
        {"image_id": 1, "category_id": label, "bbox": boxes[i], "score": score}
        for i, (label, score, _) in enumerate(rows)
        if score >= 0
    ]
    return found, truth


def found_at(rows: Any, truth: Any) -> dict[str, Any]:
    index = index_of(truth)
    return operating_point(read_results(rows, index), index)


def test_the_threshold_of_each_class_has_the_best_f1() -> None:
    rng = np.random.default_rng(0)
    # Right above, wrong below: any threshold between has F1 1, and the lowest step above the wrong ones is taken.
    rows = [(1, score, True) for score in rng.uniform(0.62, 1, 40)] + [(1, s, False) for s in rng.uniform(0, 0.605, 40)]
    rows += [(2, score, True) for score in rng.uniform(0.3, 1, 12)] + [(2, 0.205, False)] * 3
    rows += [(3, 0.97, True)] * 3  # too few objects
    planted = max(score for label, score, there in rows if label == 1 and not there)
    assert found_at(*side_by_side(rows))["thresholds"] == pytest.approx(
        [np.ceil(100 * planted) / 100, 0.21, (np.ceil(100 * planted) / 100 + 0.21) / 2]
    )


def test_thresholds_stay_where_they_are_sensible_and_difficult_objects_do_not_count() -> None:
    rows = [(1, 0.03, True)] * 20 + [(2, 0.99, True)] * 20 + [(2, 0.95, False)] * 60 + [(3, 0.5, True)] * 20
    assert found_at(*side_by_side(rows))["thresholds"] == [0.1, 0.9, 0.1]  # of equally good ones the lowest
    assert found_at(*side_by_side(rows, difficult=1))["thresholds"] is None
