"""What a report shows of each diagnosis: the parts that a reader can take in, in the form that report.html draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Numbers in all curves together; more classes get fewer points each.
_POINTS = 120_000
_MATRIX = 100  # classes that a reader can tell apart in a matrix
_LARGEST = 25

_ERRORS = {
    "classification": "placed well (IoU 0.5), but of the wrong class",
    "localisation": "right class, placed badly (IoU 0.1 to 0.5)",
    "both": "wrong class and placed badly",
    "duplicate": "an object that a better detection has",
    "background": "there is nothing (IoU up to 0.1)",
    "missed": "an object that no detection is about",
}
_SLICES = {
    "coco_size": ("Size of the object, as COCO divides it", "area"),
    "size": ("Size of the object, finer", "side of a square of that area"),
    "aspect": ("Shape of the box", "width to height"),
    "neighbours": ("Objects that it touches", "neighbours"),
    "overlap": ("Largest overlap with another object", "IoU"),
    "objects": ("Objects in the image", "objects"),
    "brightness": ("Brightness of the image, thirds", "mean grey, 0 to 1"),
    "contrast": ("Contrast of the image, thirds", "deviation of grey"),
    "sharpness": ("Sharpness of the image, thirds", "variance of the Laplacian"),
    "resolution": ("Resolution of the image, thirds", "root of the pixels"),
}
_SIZES = ("all", "small", "medium", "large")


def class_section(metrics: Mapping[str, Any], diagnosis: Mapping[str, Any]) -> dict[str, Any]:
    """A row for each class, with what the diagnosis knows of it."""
    curves = diagnosis["curves"]
    confusion = diagnosis["confusion"]
    objects = {name: sum(row) for name, row in zip(confusion["names"], confusion["matrix"], strict=True)}
    rows = []
    for name, value in metrics.get("per_class", {}).items():
        precision = curves["precision_50_per_class"].get(name)
        best = (curves["f1"]["per_class"].get(name) or {}).get("best", {})
        rows.append(
            [name, value, sum(precision) / len(precision) if precision else None, objects.get(name)]
            + [best.get(key) for key in ("threshold", "f1", "precision", "recall")]
            + [diagnosis["calibration"]["per_class"].get(name)]
        )
    columns = ["class", "AP", "AP50", "objects", "best threshold", "F1", "precision", "recall", "ECE"]
    return {"columns": columns, "rows": rows}


def curve_section(curves: Mapping[str, Any]) -> dict[str, Any] | None:
    """Curves of all classes and of each, thinned where there are many classes; None where there is no object."""
    f1 = curves["f1"]
    if curves["precision"] is None or f1["all"] is None:
        return None
    per_class = {name: values for name, values in curves["precision_50_per_class"].items() if values}
    step = next(s for s in (1, 2, 4, 5, 10, 20, 25, 50, 100) if 4 * len(per_class) * 101 / s <= _POINTS or s == 100)
    return {
        **{key: _points(curves[key], step) for key in ("recall", "precision_50", "precision")},
        "precision_per_class": {name: _points(values, step) for name, values in per_class.items()},
        "thresholds": _points(f1["thresholds"], step),
        "f1": _thinned(f1["all"], step),
        "f1_per_class": {name: _thinned(f1["per_class"][name], step) for name in per_class},
    }


def _thinned(curve: Mapping[str, Any], step: int) -> dict[str, Any]:
    return {key: values if key == "best" else _points(values, step) for key, values in curve.items()}


def _points(values: Sequence[float | None], step: int) -> list[float | None]:
    """Every step-th, as fine as a drawing shows."""
    return [None if value is None else round(value, 4) for value in values[::step]]


def tide_section(tide: Mapping[str, Any]) -> dict[str, Any]:
    """Kinds of error with their worth, the costliest first, and counts by class."""
    errors = sorted(tide["errors"].items(), key=lambda item: -item[1]["dAP"])
    rows = [[kind, error["dAP"], error["count"], _ERRORS.get(kind, "")] for kind, error in errors]
    both = (
        ("false_positives", "all wrong detections gone"),
        ("false_negatives", "all objects that were not found gone"),
    )
    rows += [[key.replace("_", " "), tide[key]["dAP"], tide[key]["count"], words] for key, words in both]
    kinds = list(tide["errors"])
    return {
        "AP50": tide["AP50"],
        "foreground_iou": tide["foreground_iou"],
        "background_iou": tide["background_iou"],
        "rows": rows,
        "kinds": kinds,
        "per_class": [[name, *(counts[kind] for kind in kinds)] for name, counts in tide["per_class"].items()],
    }


def confusion_section(confusion: Mapping[str, Any]) -> dict[str, Any]:
    """The cells that are not zero; of many classes only those with the most confusions, and background."""
    names, matrix = confusion["names"], confusion["matrix"]
    background = len(names) - 1
    totals = [sum(row) for row in matrix]
    cells = [(r, c, count) for r, row in enumerate(matrix) for c, count in enumerate(row) if count]
    wrong = sorted((cell for cell in cells if cell[0] != cell[1] and background not in cell[:2]), key=lambda x: -x[2])
    kept, shortened = list(range(len(names))), None
    if len(names) > _MATRIX + 1:
        amount = [0] * len(names)
        for row, column, count in wrong:
            amount[row] += count
            amount[column] += count
        kept = [*sorted(sorted(range(background), key=lambda i: -amount[i])[:_MATRIX]), background]
        shortened = f"Of {background} classes, the {_MATRIX} that are confused most."
    place = {old: new for new, old in enumerate(kept)}
    return {
        "iou": confusion["iou"],
        "score_threshold": confusion["score_threshold"],
        "names": [names[i] for i in kept],
        "totals": [totals[i] for i in kept],
        "cells": [[place[r], place[c], count] for r, c, count in cells if r in place and c in place],
        "largest": [[names[r], names[c], count, count / totals[r]] for r, c, count in wrong[:_LARGEST]],
        "shortened": shortened,
    }


def calibration_section(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """All but the values of each class, which are in the table of classes."""
    return {key: value for key, value in calibration.items() if key != "per_class"}


def slice_section(slices: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """A table for each way of slicing."""
    tables = []
    for key, rows in slices.items():
        title, by = _SLICES.get(key, (key.replace("_", " "), key))
        key, counted = ("images", "images") if rows and "images" in rows[0] else ("truths", "objects")
        shown = [[row["name"], row["AP"], row["AP50"], row[key]] for row in rows]
        tables.append({"title": title, "by": by, "counted": counted, "rows": shown})
    text = (
        "AP on parts of the data. Objects outside a part are ignored, not missed, and so are detections outside it "
        "that match nothing."
    )
    if "brightness" not in slices:
        text += " No image was read for this, so there is nothing by brightness, contrast, sharpness or resolution."
    return {"text": text, "tables": tables}


def proposal_section(stages: Mapping[str, Any]) -> dict[str, Any]:
    """Recall of the proposals, AP and time against their number, and what the anchors reach."""
    recall, budgets, anchors = stages["recall"], stages["budgets"], stages["anchors"]
    sizes = [size for size in _SIZES if size in recall]
    tables = [
        {
            "title": f"Objects that some proposal reaches: share at IoU 0.5{words}",
            "columns": ["objects", "of them", *(f"{number} proposals" for number in recall["proposals"])],
            "rows": [[size, recall[size]["truths"], *_or_nothing(recall[size][key], recall)] for size in sizes],
        }
        for key, words in (("recall50", ""), ("recall", " to 0.95, mean"))
    ]
    tables.append(
        {
            "title": "What a number of proposals costs and gives",
            "columns": ["proposals", "AP", "AP50", "ms"],
            "rows": [[str(row["proposals"]), row["AP"], row["AP50"], row["ms"]] for row in budgets],
        }
    )
    tables.append(
        {
            "title": f"Anchors: best IoU of each object with one (foreground: {anchors['foreground_iou']:g})",
            "columns": ["objects", "of them", "out of reach", "under 0.3", "0.3 to 0.5", "0.5 to 0.7", "0.7 and more"],
            "rows": [
                [size, anchors[size]["truths"], anchors[size]["unmatched"], *_shares(anchors[size]["histogram"])]
                for size in sizes
            ],
        }
    )
    known = [row for row in budgets if row["AP"] is not None]
    return {
        "text": (
            f"The two stages apart, on {stages['images']} images, one at a time. The network proposes at most "
            f"{stages['limit']} boxes an image; {stages['ms_shared']:.3g} ms are spent before the head, whatever "
            "their number."
        ),
        "tradeoff": {
            "count": [row["proposals"] for row in known],
            "AP": [row["AP"] for row in known],
            "ms": [row["ms"] for row in known],
        }
        if known
        else None,
        "tables": [table | {"counts": ["of them"], "plain": ["ms"]} for table in tables],
    }


def _or_nothing(values: Sequence[float] | None, recall: Mapping[str, Any]) -> Sequence[float | None]:
    return values if values is not None else [None] * len(recall["proposals"])


def _shares(histogram: Sequence[int]) -> list[float | None]:
    """Shares of 20 bins of IoU in four ranges."""
    total = sum(histogram)
    parts = (histogram[:6], histogram[6:10], histogram[10:14], histogram[14:])
    return [sum(part) / total if total else None for part in parts]
