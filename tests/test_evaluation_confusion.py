from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from judged_rows import box_iou, naive_kinds, random_rows
from scored_rows import read_records

from detector.evaluation.confusion import confusion
from detector.evaluation.outcomes import judge


def naive_confusion(ground_truth: dict[str, Any], results: list[dict[str, Any]], threshold: float) -> list[list[int]]:
    """Best detection first, each takes the free object of any class that it overlaps most."""
    kinds, _ = naive_kinds(ground_truth, results)
    place = {k: i for i, k in enumerate(sorted(c["id"] for c in ground_truth["categories"]))}
    free = [truth for truth in ground_truth["annotations"] if not truth["iscrowd"]]
    matrix = np.zeros((len(place) + 1, len(place) + 1), int)
    kept = [row for row, kind in zip(results, kinds, strict=True) if kind != "ignored" and row["score"] >= threshold]
    for row in sorted(kept, key=lambda row: -row["score"]):
        near = [
            (box_iou(row["bbox"], truth["bbox"]), i)
            for i, truth in enumerate(free)
            if truth["image_id"] == row["image_id"]
        ]
        iou, best = max(near, default=(0.0, -1))
        truth = place[free.pop(best)["category_id"]] if iou >= 0.5 else -1
        matrix[truth, place[row["category_id"]]] += 1
    for truth in free:
        matrix[place[truth["category_id"]], -1] += 1
    return matrix.tolist()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_random_results_give_the_matrix_of_a_plain_loop(seed: int, threshold: float):
    ground_truth, results = random_rows(seed, crowds=seed % 2 == 0, images=10)
    found = confusion(judge(read_records(results, ground_truth)), threshold)
    assert found["matrix"] == naive_confusion(ground_truth, results, threshold)
    assert found["names"] == ["class 3", "class 5", "class 7", "background"]


def test_a_case_by_hand():
    ground_truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"image_id": 1, "category_id": k, "bbox": [x, 0, 20, 20]} for k, x in ((1, 0), (1, 50), (2, 100), (2, 150))
        ],
    }
    found = [(1, 0, 0.9), (2, 50, 0.8), (2, 100, 0.7), (2, 300, 0.6), (1, 150, 0.1)]
    results = [{"image_id": 1, "category_id": k, "bbox": [x, 0, 20, 20], "score": score} for k, x, score in found]
    matrix = confusion(judge(read_records(results, ground_truth)), 0.5)["matrix"]
    assert matrix == [[1, 1, 0], [0, 1, 1], [0, 1, 0]]  # a cat is called a dog, a dog unfound, a dog imagined
