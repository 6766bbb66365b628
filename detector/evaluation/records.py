"""Results and ground truth in order, and hotcoco's evaluator over them: what every diagnosis starts from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from detector.data.index import AnnotationIndex, id_order
from detector.data.results import Results
from detector.evaluation.backends import hotcoco_evaluation

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
    results = results.rows(np.sort(best_rows(results)))
    return Records(index, results.rows(np.lexsort((-results.scores, results.images))))


def best_rows(found: Results) -> np.ndarray:
    """The rows that COCO scores, by class, image and score; equal scores stay in the order given."""
    order = np.lexsort((-found.scores, found.images, found.labels))
    pair = found.labels[order] * (1 + found.images.max(initial=0)) + found.images[order]
    rank = np.arange(len(order)) - np.searchsorted(pair, pair)
    return order[rank < MAX_DETECTIONS]


def evaluator(records: Records, keep: np.ndarray | None = None) -> Any:
    """A hotcoco COCOeval that has matched everything (evaluate); its ids are places and labels.

    Args:
        keep: (D,) bool; only these detections, and no crowd regions. None takes all of both.

    Raises:
        InputError: hotcoco is not installed.
    """
    results = records.results if keep is None else records.results.rows(keep)
    scores = hotcoco_evaluation(results, records.index, crowds=keep is None)
    scores.evaluate()
    return scores


def existing_mean(precision: np.ndarray) -> float | None:
    """The mean of the part of hotcoco's precision table that exists, as COCO takes it; None where nothing does."""
    exists = precision > -1
    return float(precision[exists].mean()) if exists.any() else None
