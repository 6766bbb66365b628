"""What a report shows of a diagnosis that is too much, or too deep, for a reader: in the form that page.html draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Numbers in all curves together; more classes get fewer points each.
_POINTS = 120_000
_MATRIX = 100  # classes that a reader can tell apart in a matrix
_LARGEST = 25

_SIZES = ("all", "small", "medium", "large")


def class_section(metrics: Mapping[str, Any], diagnosis: Mapping[str, Any]) -> dict[str, Any]:
    """A row for each class, with what the diagnosis knows of it."""
    curves = diagnosis["curves"]
    confusion = diagnosis["confusion"]
    gaps = (diagnosis["calibration"] or {}).get("per_class", {})
    objects = {name: sum(row) for name, row in zip(confusion["names"][:-1], confusion["matrix"][:-1], strict=True)}
    rows = []
    for name, value in metrics.get("per_class", {}).items():
        precision = curves["precision_50_per_class"].get(name)
        best = (curves["f1"]["per_class"].get(name) or {}).get("best", {})
        rows.append(
            [name, value, sum(precision) / len(precision) if precision else None, objects.get(name)]
            + [best.get(key) for key in ("threshold", "f1", "precision", "recall")]
            + [gaps.get(name)]
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


def confusion_section(confusion: Mapping[str, Any]) -> dict[str, Any]:
    """The cells that are not zero; of many classes only those with the most confusions, and background."""
    names, matrix = np.array(confusion["names"], object), np.array(confusion["matrix"])
    background = len(names) - 1
    totals = matrix.sum(axis=1)
    wrong = matrix[:background, :background] * ~np.eye(background, dtype=bool)
    rows, columns = np.nonzero(wrong)
    largest = np.argsort(-wrong[rows, columns], kind="stable")[:_LARGEST]
    kept, shortened = np.arange(len(names)), None
    if background > _MATRIX:
        most = np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")[:_MATRIX]
        kept = np.append(np.sort(most), background)
        shortened = f"Of {background} classes, the {_MATRIX} that are confused most."
    shown = matrix[np.ix_(kept, kept)]
    return {
        **{key: confusion[key] for key in ("iou", "score_threshold")},
        "names": names[kept].tolist(),
        "totals": totals[kept].tolist(),
        "cells": np.column_stack((*np.nonzero(shown), shown[shown > 0])).tolist(),
        "largest": [
            [names[r], names[c], int(wrong[r, c]), float(wrong[r, c] / totals[r])]
            for r, c in zip(rows[largest], columns[largest], strict=True)
        ],
        "shortened": shortened,
    }


def proposal_section(stages: Mapping[str, Any]) -> dict[str, Any]:
    """Recall of the proposals, AP and time against their number, and what the anchors reach."""
    recall, budgets, anchors = stages["recall"], stages["budgets"], stages["anchors"]
    sizes = [size for size in _SIZES if size in recall]
    numbers = recall["proposals"]
    none = [None] * len(numbers)
    reached = [
        _table(
            f"Objects that some proposal reaches: share at IoU 0.5{words}",
            ["objects", "of them", *(f"{number} proposals" for number in numbers)],
            [[size, recall[size]["truths"], *(recall[size][key] or none)] for size in sizes],
        )
        for key, words in (("recall50", ""), ("recall", " to 0.95, mean"))
    ]
    cost = _table(
        "What a number of proposals costs and gives",
        ["proposals", "AP", "AP50", "ms"],
        [[str(row["proposals"]), row["AP"], row["AP50"], row["ms"]] for row in budgets],
    )
    best = _table(
        f"Anchors: best IoU of each object with one (foreground: {anchors['foreground_iou']:g})",
        ["objects", "of them", "out of reach", "under 0.3", "0.3 to 0.5", "0.5 to 0.7", "0.7 and more"],
        [
            [size, anchors[size]["truths"], anchors[size]["unmatched"], *_shares(anchors[size]["histogram"])]
            for size in sizes
        ],
    )
    known = [row for row in budgets if row["AP"] is not None]
    tradeoff = {"count": "proposals", "AP": "AP", "ms": "ms"}
    return {
        "text": (
            f"The two stages apart, on {stages['images']} images, one at a time. The network proposes at most "
            f"{stages['limit']} boxes an image; {stages['ms_shared']:.3g} ms are spent before the head, whatever "
            "their number."
        ),
        "tradeoff": {key: [row[source] for row in known] for key, source in tradeoff.items()} if known else None,
        "tables": [*reached, cost, best],
    }


def _table(title: str, columns: list[str], rows: list[list[Any]]) -> dict[str, Any]:
    return {"title": title, "columns": columns, "rows": rows, "counts": ["of them"], "plain": ["ms"]}


def _shares(histogram: Sequence[int]) -> list[float | None]:
    """Shares of 20 bins of IoU in four ranges."""
    total = sum(histogram)
    parts = np.add.reduceat(histogram, (0, 6, 10, 14)).tolist()
    return [part / total if total else None for part in parts]
