from __future__ import annotations

import numpy as np
import pytest
from judged_rows import naive_kinds, random_rows
from scored_rows import evaluate, read_records

from detector.evaluation.curves import curves
from detector.evaluation.outcomes import judge


@pytest.mark.parametrize("seed", range(8))
def test_f1_is_that_of_a_plain_loop(seed: int):
    ground_truth, results = random_rows(seed, crowds=seed % 2 == 0, images=10)
    results[0]["score"] = 0.5  # on a threshold: it counts
    kinds, _ = naive_kinds(ground_truth, results)
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    real = [truth["category_id"] for truth in ground_truth["annotations"] if not truth["iscrowd"]]

    found = curves(judge(read_records(results, ground_truth)))["f1"]

    for chosen, curve in [({k}, found["per_class"][name]) for k, name in names.items()] + [(set(names), found["all"])]:
        truths = sum(k in chosen for k in real)
        best = (-1.0, 0.0)
        for place, threshold in enumerate(found["thresholds"]):
            assert threshold == place / 100
            kept = [
                kind
                for row, kind in zip(results, kinds, strict=True)
                if row["category_id"] in chosen and row["score"] >= threshold and kind != "ignored"
            ]
            right = kept.count("correct")
            precision, recall = (right / len(kept) if kept else None), right / truths
            f1 = 2 * precision * recall / (precision + recall) if precision else 0.0
            assert curve["precision"][place] == pytest.approx(precision)
            assert curve["recall"][place] == pytest.approx(recall)
            assert curve["f1"][place] == pytest.approx(f1)
            best = max(best, (round(f1, 12), -threshold))
        at = round(-best[1] * 100)
        assert curve["best"] == {
            "threshold": -best[1],
            "f1": pytest.approx(best[0]),
            "precision": curve["precision"][at],
            "recall": curve["recall"][at],
        }


@pytest.mark.parametrize("seed", range(4))
def test_precision_is_the_highest_at_that_recall_or_more(seed: int):
    ground_truth, results = random_rows(seed, crowds=seed % 2 == 0, images=10)
    kinds, _ = naive_kinds(ground_truth, results)
    found = curves(judge(read_records(results, ground_truth)))

    per_class = []
    for category in ground_truth["categories"]:
        rows = [(r["score"], k) for r, k in zip(results, kinds, strict=True) if r["category_id"] == category["id"]]
        truths = sum(t["category_id"] == category["id"] and not t["iscrowd"] for t in ground_truth["annotations"])
        points, kept = [], []
        for _, kind in sorted(rows, reverse=True):
            if kind != "ignored":
                kept.append(kind == "correct")
                points.append((sum(kept) / truths, sum(kept) / len(kept)))
        curve = [max((p for r, p in points if r >= x), default=0.0) for x in np.linspace(0, 1, 101)]
        assert found["precision_50_per_class"][category["name"]] == pytest.approx(curve)
        per_class.append(curve)
    assert found["precision_50"] == pytest.approx(np.mean(per_class, axis=0))


def test_the_mean_of_a_curve_is_cocos_ap():
    ground_truth, results = random_rows(5, images=20)
    found, wanted = (
        curves(judge(read_records(results, ground_truth))),
        evaluate(results, ground_truth, metrics="pycocotools"),
    )
    assert np.mean(found["precision"]) == pytest.approx(wanted["AP"])
    assert np.mean(found["precision_50"]) == pytest.approx(wanted["AP50"])


def test_a_class_without_objects_has_no_curve():
    ground_truth, results = random_rows(1)
    kept = [truth for truth in ground_truth["annotations"] if truth["category_id"] != 3]
    found = curves(judge(read_records(results, ground_truth | {"annotations": kept})))
    assert found["precision_50_per_class"]["class 3"] is None
    assert found["f1"]["per_class"]["class 3"] is None
    assert found["f1"]["all"] is not None
    nothing = curves(judge(read_records(results, ground_truth | {"annotations": []})))
    assert (nothing["precision"], nothing["precision_50"], nothing["f1"]["all"]) == (None, None, None)
