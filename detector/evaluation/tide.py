"""How many points of AP each kind of error costs: TIDE (Bolya et al. 2020), computed by hotcoco."""

from __future__ import annotations

from typing import Any

import numpy as np

from detector.evaluation.outcomes import BACKGROUND, CROWD, FOREGROUND, FOUND, KINDS, MISSED, WRONG, Outcomes
from detector.evaluation.records import evaluator

_NAMES = {
    "classification": "Cls",
    "localisation": "Loc",
    "both": "Both",
    "duplicate": "Dupe",
    "background": "Bkg",
    "missed": "Miss",
}


def tide(outcomes: Outcomes) -> dict[str, Any]:
    """The six kinds of error; all as the released code defines them (dbolya/tide), but AP50 is COCO's.

    dAP of a kind: by how many points AP50 would rise if this kind alone were mended. They do not add up to
    100 - AP50. A class of which nothing at all was found gains nothing from mending "missed": no object is left of it.

    Returns:
        {"foreground_iou": 0.5, "background_iou": 0.1,
         "AP50": points in [0, 100], 0 without objects,
         "errors": {kind: {"dAP": points, "count": int}} for classification, localisation, both, duplicate, background
            (counts of detections) and missed (of objects), in this order,
         "false_positives": {"dAP", "count"}: every wrong detection gone,
         "false_negatives": {"dAP", "count"}: every object that was not found gone,
         "per_class": {class name: {kind: count}}; a wrong detection belongs to the class that it claims.}
    """
    # Without what COCO does not count: hotcoco 1.3 takes crowd regions for objects here.
    measured = evaluator(outcomes.records, outcomes.counted).tide_errors(FOREGROUND, BACKGROUND)
    states = outcomes.states()
    gained = {name: max(0.0, 100 * value) for name, value in measured["delta_ap"].items()}
    per_class = _per_class(outcomes, states)
    return {
        "foreground_iou": FOREGROUND,
        "background_iou": BACKGROUND,
        "AP50": 100 * float(measured["ap_base"]),
        "errors": {
            kind: {"dAP": gained[name], "count": sum(counts[kind] for counts in per_class.values())}
            for kind, name in _NAMES.items()
        },
        "false_positives": {"dAP": gained["FP"], "count": int(outcomes.wrong.sum())},
        "false_negatives": {"dAP": gained["FN"], "count": int(((states != FOUND) & (states != CROWD)).sum())},
        "per_class": per_class,
    }


def _per_class(outcomes: Outcomes, states: np.ndarray) -> dict[str, dict[str, int]]:
    records = outcomes.records
    classes = len(records.index.class_names)
    table = np.zeros((classes, len(KINDS)), np.int64)
    np.add.at(table, (records.results.labels, outcomes.kind), 1)
    missed = np.bincount(records.index.labels[states == MISSED], minlength=classes)
    return {
        name: {kind: int(table[place, KINDS.index(kind)]) if kind in WRONG else int(missed[place]) for kind in _NAMES}
        for place, name in enumerate(records.index.class_names)
    }
