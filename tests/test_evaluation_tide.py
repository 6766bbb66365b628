from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from judged_rows import naive_kinds, random_rows
from scored_rows import evaluate, read_records

from detector.evaluation.outcomes import judge
from detector.evaluation.tide import tide

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
FIRST, SECOND, THIRD = ([x, 0.0, 20.0, 20.0] for x in (0.0, 100.0, 200.0))
# AP50 of a class with two objects: 51 of the 101 points of recall are at or below 0.5, 50 above.
HALF = 100 * 51 / 101
REST = 100 * 50 / 101


def tide_of(truths: list[tuple[int, list[float]]], found: list[tuple[int, list[float], float]]) -> dict[str, Any]:
    ground_truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [{"image_id": 1, "category_id": k, "bbox": box} for k, box in truths],
    }
    results = [{"image_id": 1, "category_id": k, "bbox": box, "score": score} for k, box, score in found]
    return tide(judge(read_records(results, ground_truth)))


TWO = [(1, FIRST), (1, SECOND)]
BAD_IN_BETWEEN = HALF + REST * 2 / 3  # right, wrong, right


@pytest.mark.parametrize(
    ("kind", "truths", "found", "ap", "gain", "positives", "negatives"),
    [
        # The badly placed box is alone with its object: mended, it finds it.
        ("localisation", TWO, [(1, FIRST, 0.9), (1, [100, 0, 20, 8], 0.8)], HALF, REST, 0.0, REST),
        # Class b is perfect before and after (the wrong b comes last there); the mean is over both classes.
        (
            "classification",
            [*TWO, (2, THIRD)],
            [(1, FIRST, 0.9), (2, THIRD, 0.9), (2, SECOND, 0.8)],
            (HALF + 100) / 2,
            REST / 2,
            0.0,
            REST / 2,
        ),
        (
            "duplicate",
            TWO,
            [(1, FIRST, 0.9), (1, [0, 0, 20, 18], 0.8), (1, SECOND, 0.7)],
            BAD_IN_BETWEEN,
            REST / 3,
            REST / 3,
            0.0,
        ),
        (
            "background",
            TWO,
            [(1, FIRST, 0.9), (1, [50, 50, 9, 9], 0.8), (1, SECOND, 0.7)],
            BAD_IN_BETWEEN,
            REST / 3,
            REST / 3,
            0.0,
        ),
        (
            "both",
            [*TWO, (2, THIRD)],
            [(1, FIRST, 0.9), (1, [200, 0, 20, 8], 0.8), (1, SECOND, 0.7), (2, THIRD, 0.6)],
            (BAD_IN_BETWEEN + 100) / 2,
            REST / 6,
            REST / 6,
            0.0,
        ),
        ("missed", TWO, [(1, FIRST, 0.9)], HALF, REST, 0.0, REST),
    ],
)
def test_one_error_costs_what_can_be_worked_out_by_hand(
    kind: str, truths: list, found: list, ap: float, gain: float, positives: float, negatives: float
):
    figures = tide_of(truths, found)

    assert figures["AP50"] == pytest.approx(ap)
    assert figures["errors"] == {
        name: {"dAP": pytest.approx(gain if name == kind else 0.0, abs=1e-9), "count": int(name == kind)}
        for name in KINDS
    }
    assert figures["false_positives"] == {"dAP": pytest.approx(positives, abs=1e-9), "count": int(kind != "missed")}
    missing = int(kind in ("missed", "localisation", "classification"))
    assert figures["false_negatives"] == {"dAP": pytest.approx(negatives, abs=1e-9), "count": missing}
    whose = "b" if kind == "classification" else "a"
    assert figures["per_class"][whose][kind] == 1
    assert sum(sum(counts.values()) for counts in figures["per_class"].values()) == 1


def _ap(rows: list[tuple[float, bool]], truths: int) -> float:
    """101 points, precision made monotone; no recall without truths."""
    if truths <= 0:
        return 0.0
    found, right, points = 0, 0, []
    for _, correct in sorted(rows, key=lambda row: -row[0]):
        found, right = found + 1, right + correct
        points.append((right / truths, right / found))
    # COCO's recalls to the last bit: 0.07 as linspace gives it may be above 7 / 100.
    return 100 * float(np.mean([max((p for r, p in points if r >= x), default=0.0) for x in np.linspace(0, 1, 101)]))


def naive_tide(ground_truth: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """dAP and count of each kind, as the paper and its code define them, by plain loops."""
    truths = ground_truth["annotations"]
    kinds, about = naive_kinds(ground_truth, results)
    real = [g for g, truth in enumerate(truths) if not truth["iscrowd"]]
    taken = {about[d] for d, kind in enumerate(kinds) if kind == "correct"}
    # An object that was not found is given to the best of the detections that are wrong about it.
    mender: dict[int, int] = {}
    for d, kind in enumerate(kinds):
        if kind in ("localisation", "classification") and about[d] not in taken:
            rival = mender.get(about[d])
            if rival is None or results[d]["score"] > results[rival]["score"]:
                mender[about[d]] = d
    missed = [g for g in real if g not in taken and g not in mender]
    unfound = [g for g in real if g not in taken]
    classes = sorted({truths[g]["category_id"] for g in real})

    def mean_ap(mended: str, gone: list[int]) -> float:
        rows: dict[int, list[tuple[float, bool]]] = {k: [] for k in classes}
        for d, kind in enumerate(kinds):
            label, correct = results[d]["category_id"], kind == "correct"
            if kind == "ignored" or (mended == "all" and not correct):
                continue
            if kind == mended:
                if mender.get(about[d]) != d:
                    continue
                label, correct = truths[about[d]]["category_id"], True
            rows.setdefault(label, []).append((results[d]["score"], correct))
        left = {k: sum(truths[g]["category_id"] == k for g in real if g not in gone) for k in classes}
        return float(np.mean([_ap(rows[k], left[k]) for k in classes]))

    base = mean_ap("", [])
    found = {kind: (mean_ap(kind, []) - base, kinds.count(kind)) for kind in KINDS[:-1]}
    found["missed"] = (mean_ap("", missed) - base, len(missed))
    found["false_positives"] = (mean_ap("all", []) - base, sum(k not in ("correct", "ignored") for k in kinds))
    found["false_negatives"] = (mean_ap("", unfound) - base, len(unfound))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_random_results_cost_what_a_plain_loop_says(seed: int):
    ground_truth, results = random_rows(seed, crowds=seed % 2 == 0, images=8)

    figures = tide(judge(read_records(results, ground_truth)))

    found = figures["errors"] | {key: figures[key] for key in ("false_positives", "false_negatives")}
    wanted = naive_tide(ground_truth, results)
    assert found == {
        kind: {"dAP": pytest.approx(max(gain, 0.0), abs=1e-9), "count": count} for kind, (gain, count) in wanted.items()
    }
    assert figures["AP50"] == pytest.approx(100 * evaluate(results, ground_truth, metrics="pycocotools")["AP50"])


def test_nothing_to_find_and_nothing_found():
    assert tide_of([], [])["AP50"] == 0.0
    assert tide_of(TWO, [])["errors"]["missed"] == {"dAP": 0.0, "count": 2}
    assert tide_of([], [(1, FIRST, 0.5)])["errors"]["background"]["count"] == 1
