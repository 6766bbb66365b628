"""Results and ground truth in order, and hotcoco's evaluator over them: what every diagnosis starts from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detector.errors import InputError
from detector.evaluation.columns import Found, GroundTruth

# COCO scores this many detections an image and class.
MAX_DETECTIONS = 100


@dataclass(frozen=True, eq=False)
class Records:
    """M images, their G ground-truth boxes and their D detections; boxes xywh in pixels of the original pictures.

    Attributes:
        image_ids: M ids of the data set in sorted order; `image` and `truth_image` index them.
        file_names: M names as in the annotation file, "" where it has none.
        class_names: K names by ascending COCO id; labels index them.
        truth_image, truth_label: (G,) int64, sorted by image, within it in the file's order.
        truth_boxes: (G, 4) float64.
        truth_area: (G,) float64, the file's `area` (of the mask, in COCO), else the box's.
        truth_crowd: (G,) bool.
        image, label: (D,) int64, sorted by image, within it by score, best first.
        boxes: (D, 4) float64.
        scores: (D,) float64.
    """

    image_ids: list[Any]
    file_names: list[str]
    class_names: tuple[str, ...]
    truth_image: np.ndarray
    truth_label: np.ndarray
    truth_boxes: np.ndarray
    truth_area: np.ndarray
    truth_crowd: np.ndarray
    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    def per_image(self) -> Iterator[tuple[slice, slice]]:
        """The rows of the truths and of the detections of each image, all M of them."""
        borders = np.arange(len(self.image_ids) + 1)
        truths, found = np.searchsorted(self.truth_image, borders), np.searchsorted(self.image, borders)
        for i in range(len(self.image_ids)):
            yield slice(truths[i], truths[i + 1]), slice(found[i], found[i + 1])


def read_records(
    results: Sequence[Mapping[str, Any]] | str | Path,
    ground_truth: Mapping[str, Any] | str | Path,
    *,
    image_ids: Iterable[Any] | None = None,
) -> Records:
    """Sort COCO's rows into arrays. Detections beyond COCO's 100 an image and class are left out: they never count.

    Args, and Raises: as of detector.evaluation.metrics.evaluate.
    """
    truth = GroundTruth(ground_truth, image_ids)
    found = truth.find(results)
    scored = truth.scored  # places in all images of the file; ours are those in `scored`
    names = [str(truth.image_entries[place].get("file_name", "")) for place in scored]
    order, best = np.argsort(truth.images, kind="stable"), _best(found)
    return Records(
        image_ids=[truth.image_ids[place] for place in scored],
        file_names=names,
        class_names=tuple(truth.class_names),
        truth_image=np.searchsorted(scored, truth.images[order]),
        truth_label=truth.classes[order],
        truth_boxes=truth.boxes[order],
        truth_area=truth.areas[order],
        truth_crowd=truth.crowd[order],
        image=np.searchsorted(scored, found.images[best]),
        label=found.classes[best],
        boxes=found.boxes[best],
        scores=found.scores[best],
    )


def _best(found: Found) -> np.ndarray:
    """The rows that COCO scores, by image and score; equal scores stay in the order given."""
    order = np.lexsort((-found.scores, found.classes, found.images))
    group = np.stack((found.images[order], found.classes[order]), axis=1)
    starts = np.flatnonzero((np.diff(group, axis=0, prepend=-1) != 0).any(axis=1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    kept = np.sort(order[rank < MAX_DETECTIONS])
    return kept[np.lexsort((-found.scores[kept], found.images[kept]))]


@dataclass(frozen=True, eq=False)
class Quantity:
    """What to slice by in the place of COCO's area.

    Attributes:
        truths: (G,) float64, of each truth.
        detections: (D,) float64, of each detection; None: its area.
        ranges: closed ranges of it. As with COCO's sizes, truths outside a range are ignored, and so are detections
            outside it that match nothing.
    """

    truths: np.ndarray
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
    kept = np.ones(len(records.scores), bool) if keep is None else keep
    wanted = np.ones(len(records.truth_crowd), bool) if crowds else ~records.truth_crowd
    areas = records.truth_area if quantity is None else quantity.truths
    images = [{"id": number} for number in range(len(records.image_ids))]
    categories = [{"id": number, "name": name} for number, name in enumerate(records.class_names)]
    truths = hotcoco.COCO.from_arrays(
        images, categories, records.truth_image[wanted], records.truth_label[wanted], records.truth_boxes[wanted],
        area=areas[wanted], iscrowd=records.truth_crowd[wanted].astype(np.int64),
    )  # fmt: skip
    if quantity is None or quantity.detections is None:
        columns = (records.image, records.boxes, records.scores, records.label)
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
    columns = (records.image, records.label, records.boxes, records.scores, areas)
    return [
        {"id": place, "image_id": image, "category_id": label, "bbox": box, "score": score, "area": area}
        for place, (image, label, box, score, area) in enumerate(
            zip(*(column[kept].tolist() for column in columns), strict=True), start=1
        )
    ]
