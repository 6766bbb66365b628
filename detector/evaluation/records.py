"""Results and ground truth in order, and hotcoco's evaluator over them: what every diagnosis starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from detector.data.annotations import AnnotationIndex, id_order
from detector.data.results import Results
from detector.errors import InputError

# COCO scores this many detections an image and class.
MAX_DETECTIONS = 100
# Areas of objects in square pixels, lowest and highest, both inside: COCO's, as pycocotools has them.
SIZES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}


def by_id(results: Results, index: AnnotationIndex) -> tuple[Results, AnnotationIndex]:
    """Both with the images in the order of their ids, as pycocotools has them, so that ties of scores fall as there."""
    order = sorted(range(len(index)), key=lambda i: id_order(index.image_ids[i]))
    if order != list(range(len(index))):
        results, index = results.select(order), index.select(order)
    return results, index


@dataclass(frozen=True, eq=False)
class Records:
    """What is scored, in order.

    Attributes:
        index: M images in the order of their ids, and their G ground-truth boxes, crowd regions included.
        results: D detections, sorted by image, within it by score, best first; at most 100 an image and class.
    """

    index: AnnotationIndex
    results: Results

    def per_image(self) -> Iterator[tuple[slice, slice]]:
        """The rows of the objects and of the detections of each image, all M of them."""
        objects = self.index.offsets
        found = np.searchsorted(self.results.images, np.arange(len(self.index) + 1))
        for i in range(len(self.index)):
            yield slice(objects[i], objects[i + 1]), slice(found[i], found[i + 1])


def sort_records(results: Results, index: AnnotationIndex) -> Records:
    """In order. Detections beyond COCO's 100 an image and class are left out: they never count."""
    results, index = by_id(results, index)
    best = _best(results)
    return Records(index, Results(*(column[best] for column in vars(results).values())))


def _best(found: Results) -> np.ndarray:
    """The rows that COCO scores, by image and score; equal scores stay in the order given."""
    order = np.lexsort((-found.scores, found.labels, found.images))
    group = np.stack((found.images[order], found.labels[order]), axis=1)
    starts = np.flatnonzero((np.diff(group, axis=0, prepend=-1) != 0).any(axis=1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    kept = np.sort(order[rank < MAX_DETECTIONS])
    return kept[np.lexsort((-found.scores[kept], found.images[kept]))]


@dataclass(frozen=True, eq=False)
class Quantity:
    """What to slice by in the place of COCO's area.

    Attributes:
        objects: (G,) float64, of each object.
        detections: (D,) float64, of each detection; None: its area.
        ranges: closed ranges of it. As with COCO's sizes, objects outside a range are ignored, and so are detections
            outside it that match nothing.
    """

    objects: np.ndarray
    detections: np.ndarray | None
    ranges: Sequence[tuple[float, float]]


def evaluator(
    records: Records, *, keep: np.ndarray | None = None, crowds: bool = True, quantity: Quantity | None = None
) -> Any:
    """A hotcoco COCOeval that has matched everything (evaluate); its image and category ids are our numbers.

    Args:
        keep: (D,) bool, the detections to take; None takes all.
        crowds: take crowd regions too.
        quantity: slice by this; None slices by COCO's areas.

    Raises:
        InputError: hotcoco is not installed.
    """
    hotcoco = _hotcoco()
    kept = np.ones(len(records.results), bool) if keep is None else keep
    wanted = np.ones(len(records.index.crowd), bool) if crowds else ~records.index.crowd
    areas = records.index.areas if quantity is None else quantity.objects
    images = [{"id": number} for number in range(len(records.index))]
    categories = [{"id": number, "name": name} for number, name in enumerate(records.index.class_names)]
    truths = hotcoco.COCO.from_arrays(
        images, categories, records.index.images[wanted], records.index.labels[wanted], records.index.xywh[wanted],
        area=areas[wanted], iscrowd=records.index.crowd[wanted].astype(np.int64),
    )  # fmt: skip
    if quantity is None or quantity.detections is None:
        columns = (records.results.images, records.results.boxes, records.results.scores, records.results.labels)
        found = truths.load_res(np.column_stack([column[kept] for column in columns]))
    else:  # not load_res: it would put the box's area in the quantity's place
        rows = _rows(records, quantity.detections, kept)
        found = hotcoco.COCO({"images": images, "categories": categories, "annotations": rows})
    scores = hotcoco.COCOeval(truths, found, "bbox")
    if quantity is not None:
        scores.params.areaRng = [list(limits) for limits in quantity.ranges]
        scores.params.areaRngLbl = [str(place) for place in range(len(quantity.ranges))]
    scores.evaluate()
    return scores


def existing_mean(precision: np.ndarray) -> float | None:
    """The mean of the part of hotcoco's precision table that exists, as COCO takes it; None where nothing does."""
    exists = precision > -1
    return float(precision[exists].mean()) if exists.any() else None


def _hotcoco() -> Any:
    try:
        import hotcoco
    except ImportError as error:
        raise InputError("A diagnosis needs the package hotcoco: pip install '.[train]'.") from error
    return hotcoco


def _rows(records: Records, areas: np.ndarray, kept: np.ndarray) -> list[dict[str, Any]]:
    columns = (records.results.images, records.results.labels, records.results.boxes, records.results.scores, areas)
    return [
        {"id": place, "image_id": image, "category_id": label, "bbox": box, "score": score, "area": area}
        for place, (image, label, box, score, area) in enumerate(
            zip(*(column[kept].tolist() for column in columns), strict=True), start=1
        )
    ]
