"""AP on parts of a data set: by size, shape and crowding of the objects, and by properties of the images.

As with COCO's sizes, objects outside a slice are ignored, not missed, and so are unmatched detections outside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from detector.data.boxes import box_iou
from detector.evaluation.backends import hotcoco_evaluation
from detector.evaluation.outcomes import Outcomes
from detector.evaluation.records import SIZES, Records, evaluator, existing_mean

Bin = tuple[str, float, float]  # name, lowest and highest value; both belong to it

_NONE = SIZES["all"][1]  # COCO's own bound for "no bound"
_SIDES = (0, 8, 16, 32, 64, 96, 128, 256, 512)
COCO_SIZES: tuple[Bin, ...] = tuple((name, *limits) for name, limits in SIZES.items() if name != "all")
SIDES: tuple[Bin, ...] = (
    *((f"{low}-{high} px", low**2, high**2) for low, high in pairwise(_SIDES)),
    (f"{_SIDES[-1]} px and more", _SIDES[-1] ** 2, _NONE),
)
ASPECTS: tuple[Bin, ...] = (
    ("wide, over 3:1", 0, 1 / 3),
    ("3:1 to 1.5:1", 1 / 3, 1 / 1.5),
    ("about square", 1 / 1.5, 1.5),
    ("1:1.5 to 1:3", 1.5, 3),
    ("tall, over 1:3", 3, _NONE),
)
NEIGHBOURS: tuple[Bin, ...] = (("none", 0, 0), ("1", 1, 1), ("2-3", 2, 3), ("4 and more", 4, _NONE))
OVERLAPS: tuple[Bin, ...] = (
    ("none", 0, 0),
    ("up to 0.1", 1e-9, 0.1),
    ("0.1-0.3", 0.1, 0.3),
    ("0.3-0.5", 0.3, 0.5),
    ("0.5 and more", 0.5, 1),
)
OBJECTS: tuple[Bin, ...] = (("1", 1, 1), ("2-4", 2, 4), ("5-9", 5, 9), ("10-19", 10, 19), ("20 and more", 20, _NONE))


def score_subsets(outcomes: Outcomes, properties: Mapping[Any, Mapping[str, float]] | None = None) -> dict[str, Any]:
    """COCO's AP and AP50 for each slice.

    Slices of objects; a bin's bounds belong to it, as with COCO's sizes, so that a value on a bound is in two bins:
        coco_size, size: area in square pixels, the file's (of the mask, in COCO); a detection's own box.
        aspect: height / width of the box.
        neighbours: how many other objects of any class the box touches.
        overlap: its largest IoU with one of them.
        A detection has the neighbours and the overlap of the object that it found or is wrong about (Outcomes.about),
        none where there is no such object.
    Slices of images, all of their objects and detections in:
        objects: how many an image has, crowd regions left out.
        brightness, contrast, sharpness, resolution: thirds of the images, if `properties` are given.

    Args:
        properties: what image_properties returned; images that it lacks are in none of its slices.

    Returns:
        {slice: [{"name", "low", "high": bounds, "images" or "truths": how many (crowd regions left out), "AP",
        "AP50": in [0, 1], None where no object is}]}.
    """
    records = outcomes.records
    width_height = records.index.xywh[:, 2:], records.results.boxes[:, 2:]
    aspect, own_aspect = ((sides[:, 1] / sides[:, 0].clip(min=1e-9)).clip(max=_NONE) for sides in width_height)
    neighbours, overlap = _crowding(records)
    counts = np.bincount(records.index.images[~records.index.crowd], minlength=len(records.index))
    quantities = (
        ({"coco_size": COCO_SIZES, "size": SIDES}, records.index.areas, None),
        ({"aspect": ASPECTS}, aspect, own_aspect),
        ({"neighbours": NEIGHBOURS}, neighbours, _of_its_object(outcomes, neighbours)),
        ({"overlap": OVERLAPS}, overlap, _of_its_object(outcomes, overlap)),
    )
    found: dict[str, list[dict[str, Any]]] = {}
    for tables, values, own in quantities:
        found |= _by_object(records, tables, values, own)
    for table, (bins, values) in ({"objects": (OBJECTS, counts)} | _thirds(records, properties or {})).items():
        found[table] = _by_image(records, bins, values)
    return found


def _by_object(
    records: Records, tables: Mapping[str, tuple[Bin, ...]], values: np.ndarray, own: np.ndarray | None
) -> dict[str, list[dict[str, Any]]]:
    """One evaluation for all bins of all tables of a quantity."""
    bins = [(table, *bin_) for table, rows in tables.items() for bin_ in rows]
    scores = hotcoco_evaluation(records.results, records.index, areas=values, detection_areas=own)
    scores.params.areaRng = [[low, high] for _, _, low, high in bins]
    scores.params.areaRngLbl = [str(place) for place in range(len(bins))]
    scores.evaluate()
    scores.accumulate()
    precision = scores.eval["precision"][:, :, :, :, -1]  # (IoU, recall, class, bin)
    found: dict[str, list[dict[str, Any]]] = {table: [] for table in tables}
    for place, (table, name, low, high) in enumerate(bins):
        inside = int((_inside(values, low, high) & ~records.index.crowd).sum())
        ap, ap50 = existing_mean(precision[..., place]), existing_mean(precision[0, ..., place])
        found[table].append({"name": name, "low": low, "high": high, "truths": inside, "AP": ap, "AP50": ap50})
    return found


def _by_image(records: Records, bins: tuple[Bin, ...], values: np.ndarray) -> list[dict[str, Any]]:
    members = [np.flatnonzero(_inside(values, low, high)).tolist() for _, low, high in bins]
    metrics = evaluator(records).slice_by({str(place): ids for place, ids in enumerate(members)})
    rows = []
    for place, (name, low, high) in enumerate(bins):
        ap, ap50 = (None if value < 0 else float(value) for value in map(metrics[str(place)].get, ("AP", "AP50")))
        rows.append({"name": name, "low": low, "high": high, "images": len(members[place]), "AP": ap, "AP50": ap50})
    return rows


def _inside(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return (values >= low) & (values <= high)


def _crowding(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """For each object: how many others it touches and its largest IoU with one, (G,) each; 0 for crowd regions."""
    neighbours, overlap = np.zeros(len(records.index.crowd)), np.zeros(len(records.index.crowd))
    for objects, _ in records.per_image():
        real = objects.start + np.flatnonzero(~records.index.crowd[objects])
        if len(real) > 1:
            boxes = records.index.corners[real]
            iou = box_iou(boxes, boxes)
            np.fill_diagonal(iou, 0.0)
            neighbours[real], overlap[real] = (iou > 0).sum(axis=1), iou.max(axis=1)
    return neighbours, overlap


def _of_its_object(outcomes: Outcomes, values: np.ndarray) -> np.ndarray:
    return np.append(values, 0.0)[outcomes.about]  # -1, no object: the last


def _thirds(
    records: Records, properties: Mapping[Any, Mapping[str, float]]
) -> dict[str, tuple[tuple[Bin, ...], np.ndarray]]:
    """Bins of equally many images, fewer where many have the same value, and the value of each image (M,)."""
    rows = [properties.get(image_id, {}) for image_id in records.index.image_ids]
    tables = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = np.array([row.get(name, np.nan) for row in rows])
        there = np.sort(values[~np.isnan(values)])
        edges = (-np.inf, *np.quantile(there, [1 / 3, 2 / 3]).tolist(), np.inf)
        groups = [there[(there > low) & (there <= high)].tolist() for low, high in pairwise(edges)]
        bins = [(f"{_short(group[0])}-{_short(group[-1])}", group[0], group[-1]) for group in groups if group]
        tables[name] = (tuple(bins), values)
    return tables


def _short(value: float) -> str:
    """Three digits, more only before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
