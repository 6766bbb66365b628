from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from judged_rows import box_iou as naive_iou
from judged_rows import naive_kinds, random_rows
from scored_rows import read_records

from detector.data.boxes import box_iou, corners
from detector.evaluation.outcomes import KINDS, STATES, judge

SQUARE = [0.0, 0.0, 20.0, 20.0]


def judged(truths: list[tuple], found: list[tuple]) -> tuple[list[str], list[str]]:
    """Kinds, by descending score, and states; truths (class, box, crowd), found (class, box, score)."""
    ground_truth: dict[str, Any] = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"image_id": 1, "category_id": k, "bbox": box, "iscrowd": int(crowd)} for k, box, crowd in truths
        ],
    }
    results = [{"image_id": 1, "category_id": k, "bbox": box, "score": score} for k, box, score in found]
    outcomes = judge(read_records(results, ground_truth))
    return [KINDS[kind] for kind in outcomes.kind], [STATES[state] for state in outcomes.states()]


@pytest.mark.parametrize(
    ("found", "kind", "state"),
    [
        ([(1, [0, 0, 20, 15], 0.9)], "correct", "found"),
        ([(1, [0, 0, 20, 10], 0.9)], "correct", "found"),  # IoU 0.5 is enough
        ([(1, [0, 0, 20, 8], 0.9)], "localisation", "mistaken"),
        ([(1, [0, 0, 10, 4], 0.9)], "localisation", "mistaken"),  # 0.1 is in
        ([(2, [0, 0, 20, 15], 0.9)], "classification", "mistaken"),
        ([(2, [0, 0, 20, 8], 0.9)], "both", "missed"),
        ([(2, [0, 0, 10, 4], 0.9)], "background", "missed"),  # 0.1 with another class is background
        ([(1, [50, 50, 9, 9], 0.9)], "background", "missed"),
    ],
)
def test_one_detection_of_one_object(found: list[tuple], kind: str, state: str):
    assert judged([(1, SQUARE, False)], found) == ([kind], [state])


def test_the_better_detection_is_correct_and_the_other_a_duplicate():
    kinds, states = judged([(1, SQUARE, False)], [(1, [0, 0, 20, 12], 0.9), (1, SQUARE, 0.8)])
    assert (kinds, states) == (["correct", "duplicate"], ["found"])


def test_a_detection_of_iou_half_with_a_taken_object_is_badly_placed():
    """As in TIDE's code, where the bound belongs to localisation."""
    kinds, _ = judged([(1, SQUARE, False)], [(1, SQUARE, 0.9), (1, [0, 0, 20, 10], 0.8)])
    assert kinds == ["correct", "localisation"]


def test_of_two_equally_near_objects_the_last_is_found():
    """As in pycocotools."""
    kinds, states = judged([(1, SQUARE, False), (1, SQUARE, False)], [(1, [0, 0, 20, 16], 0.9)])
    assert (kinds, states) == (["correct"], ["missed", "found"])


def test_a_crowd_region_excuses_its_class_only_and_is_no_object():
    region = (1, [0.0, 0.0, 40.0, 40.0], True)
    inside = [(1, SQUARE, 0.9), (1, [5, 5, 9, 9], 0.8), (2, SQUARE, 0.7)]
    assert judged([region], inside) == (["ignored", "ignored", "background"], ["crowd"])


def test_without_objects_all_is_background_and_without_detections_all_is_missed():
    assert judged([], [(1, SQUARE, 0.9)]) == (["background"], [])
    assert judged([(1, SQUARE, False)], []) == ([], ["missed"])


@pytest.mark.parametrize("seed", range(25))
def test_random_results_are_judged_as_by_a_plain_loop(seed: int):
    ground_truth, results = random_rows(seed, crowds=seed % 2 == 0)
    kinds, about = naive_kinds(ground_truth, results)
    records = read_records(results, ground_truth)

    outcomes = judge(records)

    row_of = {tuple(row["bbox"]): place for place, row in enumerate(results)}
    places = [row_of[tuple(box)] for box in records.results.boxes.tolist()]
    assert [KINDS[kind] for kind in outcomes.kind] == [kinds[place] for place in places]
    boxes = [tuple(records.index.xywh[g]) if g >= 0 else None for g in outcomes.about]
    truths = [ground_truth["annotations"][about[p]]["bbox"] if about[p] is not None else None for p in places]
    assert boxes == [tuple(box) if box else None for box in truths]
    wanted = [naive_iou(results[p]["bbox"], box) if box else 0.0 for p, box in zip(places, truths, strict=True)]
    np.testing.assert_allclose(outcomes.iou, wanted, atol=1e-12)


def test_states_follow_the_score_threshold():
    ground_truth, results = random_rows(3, images=30)
    for threshold in (0.0, 0.3, 0.6):
        kept = [row for row in results if row["score"] >= threshold]
        kinds, about = naive_kinds(ground_truth, kept)
        wanted = {}
        for place, truth in enumerate(ground_truth["annotations"]):
            mine = {kinds[d] for d in range(len(kept)) if about[d] == place}
            mistaken = "mistaken" if mine & {"localisation", "classification"} else "missed"
            wanted[tuple(truth["bbox"])] = "crowd" if truth["iscrowd"] else "found" if "correct" in mine else mistaken
        outcomes = judge(read_records(results, ground_truth))
        found = [STATES[state] for state in outcomes.states(threshold)]
        assert found == [wanted[tuple(box)] for box in outcomes.records.index.xywh]
        assert set(found) == set(STATES)


def test_iou_is_that_of_pycocotools():
    from pycocotools.mask import iou

    rng = np.random.default_rng(0)
    boxes, truths = (np.c_[rng.uniform(0, 40, (n, 2)), rng.uniform(0, 30, (n, 2))] for n in (30, 20))
    boxes[0, 2], truths[0, 2:] = 0.0, 0.0
    crowd = rng.random(20) < 0.3
    wanted = iou(boxes, truths, crowd.astype(int).tolist())
    wanted[np.isnan(wanted)] = 0.0
    np.testing.assert_allclose(box_iou(corners(boxes), corners(truths), crowd), wanted, atol=1e-12)
