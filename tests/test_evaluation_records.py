from __future__ import annotations

import sys

import numpy as np
import pytest
from judged_rows import random_rows
from scored_rows import evaluate, read_records

from detector.errors import InputError
from detector.evaluation.backends import hotcoco_evaluation
from detector.evaluation.records import evaluator, existing_mean


def test_rows_come_by_image_and_by_score_with_the_ids_of_the_data_set():
    ground_truth = {
        "images": [{"id": "b", "file_name": "b.png"}, {"id": "a"}, {"id": "c"}],
        "categories": [{"id": 9, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"image_id": "c", "category_id": 2, "bbox": [1, 2, 3, 4], "iscrowd": 1},
            {"image_id": "b", "category_id": 9, "bbox": [5, 6, 7, 8], "area": 5.0},
        ],
    }
    results = [
        {"image_id": image_id, "category_id": category_id, "bbox": [0, 0, 1, place], "score": score}
        for place, (image_id, category_id, score) in enumerate(
            [("c", 9, 0.25), ("b", 2, 0.5), ("c", 2, 0.75), ("c", 9, 0.25), ("a", 2, 1.0)]
        )
    ]

    records = read_records(results, ground_truth, image_ids=["c", "b"])

    assert records.index.image_ids == ["b", "c"]
    assert records.index.file_names == ["b.png", ""]
    assert records.index.class_names == ("dog", "cat")
    assert records.index.images.tolist() == [0, 1]
    assert records.index.labels.tolist() == [1, 0]
    assert records.index.areas.tolist() == [5.0, 12.0]
    assert records.index.crowd.tolist() == [False, True]
    assert records.results.images.tolist() == [0, 1, 1, 1]
    assert records.results.labels.tolist() == [0, 0, 1, 1]
    assert records.results.boxes[:, 3].tolist() == [1, 2, 0, 3]
    assert list(records.per_image()) == [(slice(0, 1), slice(0, 1)), (slice(1, 2), slice(1, 4))]


def test_the_hundred_best_of_an_image_and_class_are_kept():
    counts = {(1, 1): 130, (1, 2): 100, (2, 1): 101, (2, 2): 3}
    rng = np.random.default_rng(0)
    results = [
        {"image_id": i, "category_id": k, "bbox": [0, 0, 1, 1], "score": float(score)}
        for (i, k), count in counts.items()
        for score in rng.uniform(size=count)
    ]
    rng.shuffle(results)
    ground_truth = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [],
    }

    records = read_records(results, ground_truth)

    for (i, k), count in counts.items():
        all_scores = sorted((r["score"] for r in results if (r["image_id"], r["category_id"]) == (i, k)), reverse=True)
        own = (records.results.images == i - 1) & (records.results.labels == k - 1)
        assert records.results.scores[own].tolist() == all_scores[:100], count


@pytest.mark.parametrize("seed", range(4))
def test_the_evaluator_gives_cocos_metrics(seed: int):
    ground_truth, results = random_rows(seed, images=20)
    wanted = evaluate(results, ground_truth, metrics="pycocotools")
    records = read_records(results, ground_truth)
    own_areas = records.results.boxes[:, 2] * records.results.boxes[:, 3]
    ranges = [(0.0, 1e10), (0.0, 1024.0), (1024.0, 9216.0), (9216.0, 1e10)]

    areas = records.index.areas
    for given in ({}, {"areas": areas}, {"areas": areas, "detection_areas": own_areas}):
        scores = hotcoco_evaluation(records.results, records.index, **given)
        if given:
            scores.params.areaRng = [list(limits) for limits in ranges]
            scores.params.areaRngLbl = list("abcd")
        scores.evaluate()
        scores.accumulate()
        found = [existing_mean(scores.eval["precision"][:, :, :, place, -1]) for place in range(4)]
        assert found == [pytest.approx(wanted[name]) for name in ("AP", "APs", "APm", "APl")]


def test_without_hotcoco_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    records = read_records([], random_rows(0)[0])
    monkeypatch.setitem(sys.modules, "hotcoco", None)  # importing it then raises ImportError
    with pytest.raises(InputError, match="pip install"):
        evaluator(records)
