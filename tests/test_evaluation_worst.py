from __future__ import annotations

import pytest
from judged_rows import naive_kinds, random_rows
from scored_rows import read_records

from detector.evaluation.outcomes import judge
from detector.evaluation.worst import worst


def test_an_image_by_hand():
    ground_truth = {
        "images": [{"id": 8, "file_name": "eight.png"}, {"id": 9, "file_name": "nine.png"}, {"id": 7}, {"id": 6}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"image_id": 9, "category_id": 1, "bbox": [0, 0, 20, 20]},
            {"image_id": 9, "category_id": 2, "bbox": [50, 0, 20, 20]},
            {"image_id": 9, "category_id": 2, "bbox": [100, 0, 20, 20]},
            {"image_id": 8, "category_id": 2, "bbox": [0, 0, 20, 20]},
            {"image_id": 7, "category_id": 2, "bbox": [0, 0, 20, 20]},
        ],
    }
    found = [
        (9, 1, [0, 0, 20, 20], 0.75),
        (9, 1, [0, 0, 20, 18], 0.5),  # a duplicate
        (9, 1, [50, 0, 20, 20], 0.875),  # a dog called a cat
        (9, 2, [300, 0, 9, 9], 0.25),  # below the threshold
        (6, 2, [0, 0, 9, 9], 0.375),
        (7, 2, [0, 0, 20, 20], 0.375),
    ]
    results = [{"image_id": i, "category_id": k, "bbox": box, "score": score} for i, k, box, score in found]
    outcomes = judge(read_records(results, ground_truth))

    rows = worst(outcomes, 0.3)

    assert [(row["image_id"], row["badness"]) for row in rows] == [(9, 2 + 0.5 + 0.875), (8, 1.0), (6, 0.375)]
    assert rows[0] == {
        "image_id": 9,
        "file_name": "nine.png",
        "badness": 3.375,
        "detections": [
            {"name": "cat", "bbox": [50, 0, 20, 20], "score": 0.875, "kind": "classification", "iou": 1.0, "truth": 1},
            {"name": "cat", "bbox": [0, 0, 20, 20], "score": 0.75, "kind": "correct", "iou": 1.0, "truth": 0},
            {"name": "cat", "bbox": [0, 0, 20, 18], "score": 0.5, "kind": "duplicate", "iou": 0.9, "truth": 0},
        ],
        "truths": [
            {"name": "cat", "bbox": [0, 0, 20, 20], "state": "found"},
            {"name": "dog", "bbox": [50, 0, 20, 20], "state": "mistaken"},
            {"name": "dog", "bbox": [100, 0, 20, 20], "state": "missed"},
        ],
    }
    assert [row["image_id"] for row in worst(outcomes, 0.4)] == [9, 7, 8]  # 7 and 8 are equally bad


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_badness_is_that_of_a_plain_loop(seed: int, threshold: float):
    ground_truth, results = random_rows(seed, images=30)
    kept = [row for row in results if row["score"] >= threshold]
    kinds, about = naive_kinds(ground_truth, kept)
    found = {about[d] for d, kind in enumerate(kinds) if kind == "correct"}
    wanted = {picture["id"]: 0.0 for picture in ground_truth["images"]}
    for g, truth in enumerate(ground_truth["annotations"]):
        wanted[truth["image_id"]] += g not in found and not truth["iscrowd"]
    for row, kind in zip(kept, kinds, strict=True):
        wanted[row["image_id"]] += row["score"] if kind not in ("correct", "ignored") else 0.0

    rows = worst(judge(read_records(results, ground_truth)), threshold)

    order = sorted(wanted, key=lambda image_id: (-round(wanted[image_id], 9), image_id))[:12]
    assert [row["image_id"] for row in rows] == order
    assert [row["badness"] for row in rows] == pytest.approx([wanted[image_id] for image_id in order])
