"""Thresholds and calibration that are found where they were planted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from judged_rows import random_rows
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit
from scored_rows import index_of, read_records

from detector.data.results import read_results
from detector.evaluation.calibration import fit_calibration
from detector.evaluation.metrics import compute_metrics
from detector.evaluation.operating_point import best_thresholds, operating_point
from detector.evaluation.outcomes import judge
from detector.models.calibrate import IDENTITY, calibrated


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
    found, truth = side_by_side(rows)
    assert best_thresholds(judge(read_records(found, truth))) == pytest.approx(
        [np.ceil(100 * planted) / 100, 0.21, (np.ceil(100 * planted) / 100 + 0.21) / 2]
    )


def test_thresholds_stay_where_they_are_sensible_and_difficult_objects_do_not_count() -> None:
    rows = [(1, 0.03, True)] * 20 + [(2, 0.99, True)] * 20 + [(2, 0.95, False)] * 60 + [(3, 0.5, True)] * 20
    assert found_at(*side_by_side(rows))["thresholds"] == [0.1, 0.9, 0.1]  # of equally good ones the lowest
    assert found_at(*side_by_side(rows, difficult=1))["thresholds"] is None


def test_a_class_that_is_never_found_says_nothing_of_thresholds() -> None:
    rows = [(1, 0.8, True)] * 20 + [(1, 0.6, False)] * 10 + [(2, 0.7, False)] * 30 + [(3, 0.97, True)] * 3
    found, truth = side_by_side(rows, missed={2: 40})
    thresholds = best_thresholds(judge(read_records(found, truth)))
    assert thresholds == pytest.approx([0.61] * 3)


def planted(scale: float, shift: float, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and whether they are right: in a share of sigmoid(scale * logit(score) + shift)."""
    rng = np.random.default_rng(0)
    logits = rng.uniform(-4, 4, count)
    return 1 / (1 + np.exp(-logits)), rng.random(count) < 1 / (1 + np.exp(-scale * logits - shift))


def gap(scores: np.ndarray, right: np.ndarray) -> float:
    """The expected calibration error in 10 bins."""
    bins = np.minimum((10 * scores).astype(int), 9)
    return sum(abs(scores[bins == k].sum() - right[bins == k].sum()) for k in range(10)) / len(scores)


@pytest.mark.parametrize(("scale", "shift"), [(0.5, -0.7), (1.8, 0.4), (1.0, 0.0)])
def test_planted_scores_are_mended(scale: float, shift: float) -> None:
    scores, right = planted(scale, shift)
    fitted = fit_calibration(scores, right)
    assert fitted == pytest.approx((scale, shift), abs=0.08)  # some three standard errors
    mended = calibrated(scores, *fitted)
    assert gap(mended, right) < 0.015
    assert (scale, shift) == (1, 0) or gap(scores, right) > 0.07
    np.testing.assert_allclose(mended, expit(fitted[0] * logit(scores) + fitted[1]), rtol=1e-12)


def test_the_fit_is_the_maximum_of_the_likelihood() -> None:
    scores, right = planted(0.6, -0.5, 300)
    used = scores >= 0.05
    x, y = logit(scores[used]), right[used]
    wanted = np.where(y, (y.sum() + 1) / (y.sum() + 2), 1 / ((~y).sum() + 2))  # Platt's targets

    def loss(w: np.ndarray) -> float:
        return -(wanted * log_expit(w[0] * x + w[1]) + (1 - wanted) * log_expit(-w[0] * x - w[1])).sum()

    assert fit_calibration(scores, right) == pytest.approx(minimize(loss, (1, 0), tol=1e-10).x, abs=1e-4)


def test_nothing_is_calibrated_where_scores_tell_nothing() -> None:
    scores, right = planted(1.0, 0.0, 200)
    assert fit_calibration(scores, np.ones(200, bool)) == IDENTITY
    assert fit_calibration(scores, ~right) == IDENTITY  # the better, the worse
    assert fit_calibration(scores[:0], right[:0]) == IDENTITY
    assert fit_calibration(scores, scores > 0.5)[0] > 1  # Platt's targets keep it finite


def test_average_precision_stays_and_thresholds_are_on_the_new_scores() -> None:
    truth, rows = random_rows(3, images=60)
    index = index_of(truth)
    results = read_results(rows, index)
    found = operating_point(results, index)
    assert found["calibration"] != IDENTITY
    mended = replace(results, scores=calibrated(results.scores, *found["calibration"]))
    before, after = (compute_metrics(one, index) for one in (results, mended))
    for name, value in before.items():
        assert after[name] == (value if isinstance(value, dict) else pytest.approx(value, abs=1e-12))
    again = operating_point(mended, index)
    assert again["calibration"] == pytest.approx(IDENTITY, abs=0.05)  # but for the scores that are used
    assert again["thresholds"] == pytest.approx(found["thresholds"], abs=0.03)


@pytest.mark.parametrize("seed", [0, 1, 4, 5, 11])
def test_few_right_among_thousands_are_fitted_too(seed: int) -> None:
    """Where a full Newton step jumps away: no other scale and shift nearby explain the outcomes better."""
    generator = np.random.default_rng(seed)
    wrong, hits = int(generator.integers(300, 8000)), int(generator.integers(20, 80))
    low = 0.05 + 0.2 * generator.beta(1, generator.uniform(1, 8), wrong)
    scores, right = np.r_[low, generator.uniform(0.05, 1, hits)], np.arange(wrong + hits) >= wrong
    scale, shift = fit_calibration(scores, right)
    wanted = np.where(right, (hits + 1) / (hits + 2), 1 / (wrong + 2))

    def unlikely(scale: float, shift: float) -> float:
        logits = scale * logit(scores) + shift
        return float(-(wanted * log_expit(logits) + (1 - wanted) * log_expit(-logits)).sum())

    assert 0 < scale < 32
    best = unlikely(scale, shift)
    for other in ((scale + 0.01, shift), (scale - 0.01, shift), (scale, shift + 0.01), (scale, shift - 0.01)):
        assert unlikely(*other) > best
