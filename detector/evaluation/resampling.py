"""COCO's AP of a data set whose images are drawn again and again: matched once, accumulated for every draw.

A bootstrap draw takes M images out of M with repetition. Which object a detection finds does not depend on the other
images of the draw, so pycocotools matches once, and a draw is a whole number for each image: how often it was taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from detector.data.index import AnnotationIndex
from detector.data.results import Results
from detector.evaluation.backends import pycocotools_evaluation
from detector.evaluation.records import MAX_DETECTIONS, SIZES, best_rows, by_id

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)
# Draws that are accumulated together: few enough that a class's rows stay in the cache.
_CHUNK = 128


@dataclass(frozen=True, eq=False)
class ClassMatches:
    """What became of the D detections of one class among M images, best score first, for one range of object areas.

    Attributes:
        image: (D,) int64, the place of its image, 0..M-1.
        score: (D,) float64.
        hit: (T, D) bool; it found an object that counts, at each of T IoU thresholds.
        counted: (T, D) bool; a hit or a false alarm. The rest is ignored: in a crowd region, or of another area.
        objects: (M,) int64, objects to be found in each image.
    """

    image: np.ndarray
    score: np.ndarray
    hit: np.ndarray
    counted: np.ndarray
    objects: np.ndarray


@dataclass(frozen=True, eq=False)
class MatchedDetections:
    """The detections of one detector on M images, matched.

    Attributes:
        image_ids: M ids, sorted as pycocotools sorts them.
        class_names: K names by ascending category id.
        by_class: ClassMatches for each area of SIZES, a list of K.
    """

    image_ids: list[Any]
    class_names: list[str]
    by_class: dict[str, list[ClassMatches]]


def match_detections(results: Results, index: AnnotationIndex) -> MatchedDetections:
    """Match detections to objects as COCO does."""
    results, index = by_id(results, index)
    size = len(index)
    pair, objects = results.labels * size + results.images, index.labels * size + index.images
    # Most (image, class) pairs of a low score threshold hold no object, and nothing is left to match.
    contested = np.isin(pair, objects)
    # Ready to match one image and class: pycocotools' own loop would visit all M * K of them.
    evaluator = pycocotools_evaluation(results.rows(contested), index)
    evaluator._prepare()  # what its evaluate() begins with
    alarms = results.rows(~contested)
    alarms = alarms.rows(best_rows(alarms))
    by_class: dict[str, list[ClassMatches]] = {area: [] for area in SIZES}
    for k in range(len(index.class_names)):
        places = np.unique(index.images[index.labels == k])
        evaluator.ious = {(image, k): evaluator.computeIoU(image, k) for image in places.tolist()}
        others = alarms.rows(alarms.labels == k)
        sizes = others.boxes[:, 2] * others.boxes[:, 3]
        for area, limits in SIZES.items():
            outcomes = [evaluator.evaluateImg(image, k, list(limits), MAX_DETECTIONS) for image in places.tolist()]
            inside = (sizes >= limits[0]) & (sizes <= limits[1])
            by_class[area].append(_gather(places, outcomes, size, others, inside))
    return MatchedDetections(index.image_ids, list(index.class_names), by_class)


def _gather(places: np.ndarray, outcomes: list[Any], size: int, others: Results, inside: np.ndarray) -> ClassMatches:
    """All detections of a class by falling score; ties stay in the order of the images, as in pycocotools.

    Args:
        places: of the images with an object of the class.
        outcomes: pycocotools' for each of these.
        size: M.
        others: the detections on other images, false alarms where `inside` says that they count.
    """
    objects = np.zeros(size, np.int64)
    objects[places] = [np.count_nonzero(np.asarray(outcome["gtIgnore"]) == 0) for outcome in outcomes]
    nothing = np.zeros((len(IOU_THRESHOLDS), len(others)), bool)
    matched = np.concatenate([*(outcome["dtMatches"] > 0 for outcome in outcomes), nothing], axis=1)
    alarms = np.broadcast_to(inside, nothing.shape)
    counted = np.concatenate([*(outcome["dtIgnore"] == 0 for outcome in outcomes), alarms], axis=1)
    counts = [len(outcome["dtScores"]) for outcome in outcomes]
    image = np.concatenate((np.repeat(places, counts), others.images))
    score = np.array([*(value for outcome in outcomes for value in outcome["dtScores"]), *others.scores], np.float64)
    by_image = np.argsort(image, kind="stable")
    order = by_image[np.argsort(-score[by_image], kind="stable")]
    matched, counted = matched[:, order], counted[:, order]
    return ClassMatches(image[order], score[order], matched & counted, counted, objects)


def average_precision(matches: ClassMatches, weights: np.ndarray) -> np.ndarray:
    """COCO's AP of one class for each of S multisets of images.

    An image taken w times counts w times, its copies next to each other where scores are equal. Precision is only
    looked at where a hit is: at a false alarm it is lower than at the hit before, and recall is the same.

    Args:
        matches: of one class, for T thresholds and M images.
        weights: (M, S) whole numbers, how often each multiset has each image.

    Returns:
        (T, S) float64 in [0, 1]; NaN where a multiset holds no object of the class.
    """
    columns = range(0, weights.shape[1], _CHUNK)
    return np.concatenate([_chunk_precision(matches, weights[:, at : at + _CHUNK]) for at in columns], axis=1)


def _chunk_precision(matches: ClassMatches, weights: np.ndarray) -> np.ndarray:
    total = matches.objects @ weights  # (S,) objects to be found
    precision = np.zeros((len(matches.hit), weights.shape[1]))
    last = np.flatnonzero(matches.hit.any(axis=0))
    if len(last):
        taken = weights[matches.image[: last[-1] + 1]]  # (D, S), up to the last hit
        counted = matches.counted[:, : len(taken)]
        always = np.logical_and.reduce(counted, axis=0)  # nearly all that ever count: summed once for all thresholds
        common = _Sums(taken, always)
        for t, hit in enumerate(matches.hit):
            at = np.flatnonzero(hit)
            if len(at):
                hits = np.cumsum(taken[at], axis=0)
                so_far = common.up_to(at) + _Sums(taken, counted[t] & ~always).up_to(at)
                precision[t] = _interpolated(hits, so_far, total)
    precision[:, total == 0] = np.nan
    return precision


class _Sums:
    """How often the chosen rows of taken (D, S) have come up to and with some place."""

    def __init__(self, taken: np.ndarray, chosen: np.ndarray) -> None:
        self.rows = np.flatnonzero(chosen)
        self.sums = np.zeros((len(self.rows) + 1, taken.shape[1]), taken.dtype)
        np.cumsum(taken[self.rows], axis=0, out=self.sums[1:])

    def up_to(self, places: np.ndarray) -> np.ndarray:
        return self.sums[np.searchsorted(self.rows, places, side="right")]


def _interpolated(hits: np.ndarray, counted: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Mean over the 101 recalls of the best precision at that recall or a higher one.

    Args:
        hits, counted: (J, S) detections up to and with the j-th hit, those that are hits, and all that count.
        total: (S,) objects.
    """
    best = hits / np.maximum(counted, 1)
    best = np.maximum.accumulate(best[::-1], axis=0)[::-1]
    recall = hits / np.maximum(total, 1)
    nearest = np.rint(recall * 100).astype(np.intp)
    # How many of the 101 recalls are reached, by the same comparison of floats as in pycocotools.
    reached = nearest + (_RECALLS[nearest] <= recall)
    newly = np.diff(reached, axis=0, prepend=0)
    return np.einsum("js,js->s", newly, best) / len(_RECALLS)


def draw_images(count: int, draws: int, seed: int) -> np.ndarray:
    """(count, draws) int32: how often each image is taken when `count` are drawn with repetition, `draws` times."""
    rng = np.random.default_rng(seed)
    weights = np.empty((count, draws), np.int32)
    for draw in range(draws):  # one by one: all at once they take six times the memory
        weights[:, draw] = np.bincount(rng.integers(0, count, count), minlength=count)
    return weights


def leave_one_out(matches: ClassMatches, score_threshold: float = -np.inf) -> np.ndarray:
    """The AP of one class, mean over thresholds, without each of the M images in turn: (M,).

    Only images with an object, or with a detection of at least this score, are left out in earnest; the others get the
    AP of all images, which theirs hardly differs from.
    """
    size = len(matches.objects)
    whole = average_precision(matches, np.ones((size, 1), np.int32)).mean(axis=0)
    without = np.repeat(whole, size)
    present = np.union1d(np.flatnonzero(matches.objects), matches.image[matches.score >= score_threshold])
    for at in range(0, len(present), _CHUNK):
        places = present[at : at + _CHUNK]
        weights = np.ones((size, len(places)), np.int32)
        weights[places, np.arange(len(places))] = 0
        without[places] = average_precision(matches, weights).mean(axis=0)
    return without
