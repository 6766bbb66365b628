from __future__ import annotations

import numpy as np
import pytest
from judged_rows import naive_kinds, random_rows
from scored_rows import read_records

from detector.evaluation.calibration import calibration
from detector.evaluation.outcomes import judge


def test_a_case_by_hand():
    """Scores 0.95 and 0.85 right, 0.85 wrong, 0.15 wrong, of two classes."""
    places = [(1, 0, 0.95), (1, 50, 0.85), (2, 100, 0.85), (2, 150, 0.15)]
    ground_truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cow"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [x, 0, 20, 20]} for x in (0, 50)],
    }
    results = [{"image_id": 1, "category_id": k, "bbox": [x, 0, 20, 20], "score": s} for k, x, s in places]

    found = calibration(judge(read_records(results, ground_truth)))

    assert found["count"] == 4
    assert found["ece"] == pytest.approx((0.05 + 2 * 0.35 + 0.15) / 4)
    assert found["mce"] == pytest.approx(0.35)
    assert found["bins"][8] == {"low": 0.8, "high": 0.9, "confidence": 0.85, "precision": 0.5, "count": 2}
    assert found["bins"][5] == {"low": 0.5, "high": 0.6, "confidence": None, "precision": None, "count": 0}
    assert found["per_class"] == {
        "cat": pytest.approx((0.05 + 0.15) / 2),
        "dog": pytest.approx((0.85 + 0.15) / 2),
        "cow": None,
    }


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("bins", [5, 15])
def test_random_results_give_the_bins_of_a_plain_loop(seed: int, bins: int):
    ground_truth, results = random_rows(seed, crowds=seed % 2 == 0, images=10)
    kinds, _ = naive_kinds(ground_truth, results)
    rows = [(r["score"], k == "correct") for r, k in zip(results, kinds, strict=True) if k != "ignored"]

    found = calibration(judge(read_records(results, ground_truth)), bins)

    gaps = []
    for place, row in enumerate(found["bins"]):
        inside = [(s, right) for s, right in rows if place / bins <= s < (place + 1) / bins]
        assert row["count"] == len(inside)
        if inside:
            score, precision = np.mean(inside, axis=0)
            assert (row["confidence"], row["precision"]) == (pytest.approx(score), pytest.approx(precision))
            gaps.append((len(inside), abs(score - precision)))
    assert found["count"] == len(rows)
    assert found["ece"] == pytest.approx(sum(count * gap for count, gap in gaps) / len(rows))
    assert found["mce"] == pytest.approx(max(gap for _, gap in gaps))


def test_a_score_of_one_and_one_on_an_edge_have_a_bin():
    ground_truth = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "cat"}], "annotations": []}
    results = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "score": s} for s in (1.0, 0.5, 0.0)]
    counts = [row["count"] for row in calibration(judge(read_records(results, ground_truth)))["bins"]]
    assert counts == [1, 0, 0, 0, 0, 1, 0, 0, 0, 1]


def test_without_detections():
    found = calibration(judge(read_records([], random_rows(0)[0])))
    assert found["count"] == 0
    assert {row["confidence"] for row in found["bins"]} == {None}


def test_scores_that_are_no_probabilities_have_no_calibration():
    """And cost nobody the rest of the report: hotcoco refuses them."""
    ground_truth, results = random_rows(0)[:2]
    found = calibration(judge(read_records([*results[1:], results[0] | {"score": 12.5}], ground_truth)))
    assert (found["ece"], found["mce"], found["bins"]) == (None, None, [])
    assert set(found["per_class"].values()) == {None}
    assert found["count"] > 0
