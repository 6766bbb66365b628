"""Two packages that match detections with objects as COCO does: hotcoco, which is fast, and pycocotools, the original.

Why hotcoco. 5,000 images, 36,000 objects and 500,000 detections of 80 classes, two CPU cores, arrays in memory to
metrics (the slow test of tests/test_evaluation_backends.py prints the first and the last column for a fifth of it):

                                pycocotools 2.0.11    faster-coco-eval 1.8.0    hotcoco 1.3.0
    seconds                     48                    7.4                       0.42
    peak memory, MB             1785                  1190                      260
    largest difference          -                     2e-16                     0, every array bit for bit

It is under MIT, needs numpy alone, and has one 3 MB wheel for all versions of Python on each of Linux (x86-64,
ARM64; glibc), macOS (both) and Windows (x86-64). It is young and has one author: pycocotools stays a choice, and
the oracle of the tests. hotcoco also knows LVIS's protocol; its metrics are those of lvis-api 0.5.3.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import numpy as np

from detector.data.index import AnnotationIndex, look_up
from detector.data.results import Results
from detector.data.rules import show
from detector.errors import InputError, require


class Scores(NamedTuple):
    """What a package found; -1 where there is no object to find.

    T IoU thresholds 0.50:0.95, R recalls 0:1, K classes, A areas (all, small, medium, large), M limits of detections
    an image (1, 10, 100; LVIS: 300).
    """

    stats: np.ndarray  # (12,), in COCO's order; LVIS: (13,)
    precision: np.ndarray  # (T, R, K, A, M)


def score(evaluation: Any) -> Scores:
    """What `hotcoco_evaluation` or `pycocotools_evaluation` finds."""
    with redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return Scores(np.asarray(evaluation.stats), evaluation.eval["precision"])


def hotcoco_evaluation(
    results: Results,
    index: AnnotationIndex,
    *,
    federated: bool = False,
    crowds: bool = True,
    areas: np.ndarray | None = None,
    detection_areas: np.ndarray | None = None,
) -> Any:
    """A hotcoco COCOeval before it matches; its image ids are places in the index, its category ids are labels.

    Args:
        results, index: what is scored, and against what.
        federated: by LVIS's rules: its metrics instead of COCO's, see detector.evaluation.metrics.
        crowds: with crowd regions.
        areas: (B,) float64, what takes the place of the objects' areas; None: their areas.
        detection_areas: (D,) float64, the same of the detections; None: the areas of their boxes.

    Raises:
        InputError: hotcoco is not installed; federated, and the ground truth does not say what was looked for.
    """
    require("hotcoco", package="[train]", what="Scoring, but of results= with metrics=pycocotools,")
    import hotcoco  # plainly, so that the import contracts see it

    images = [{"id": place} | (_looked_for(index, place) if federated else {}) for place in range(len(index))]
    categories = _categories(index)
    kept = np.flatnonzero(~index.crowd | crowds)
    objects = hotcoco.COCO.from_arrays(
        images,
        categories,
        index.images[kept],
        index.labels[kept],
        index.xywh[kept],
        ids=np.arange(1, len(kept) + 1),
        area=(index.areas if areas is None else areas)[kept],
        iscrowd=index.crowd[kept].astype(np.int64),
    )
    if detection_areas is None:
        found = objects.load_res(np.column_stack((results.images, results.boxes, results.scores, results.labels)))
    else:  # not load_res: it would put the areas of the boxes in their place
        rows = _rows(results.images, results.labels, results.boxes, area=detection_areas, score=results.scores)
        found = hotcoco.COCO({"images": images, "categories": categories, "annotations": rows})
    return hotcoco.COCOeval(objects, found, "bbox", lvis_style=federated)


def pycocotools_evaluation(results: Results, index: AnnotationIndex) -> Any:
    """A pycocotools COCOeval before it matches, with ids as in `hotcoco_evaluation`.

    Raises:
        InputError: pycocotools is not installed.
    """
    require("pycocotools", package="[train]", what="Comparing, and metrics=pycocotools,")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def api_of(annotations: list[dict[str, Any]]) -> Any:
        # Not COCO.loadRes: it fails on an empty list and on a ground truth without `info`.
        api = COCO()
        images = [{"id": place} for place in range(len(index))]
        api.dataset = {"images": images, "categories": _categories(index), "annotations": annotations}
        api.createIndex()
        return api

    objects = _rows(index.images, index.labels, index.xywh, area=index.areas, iscrowd=index.crowd.astype(int))
    areas = results.boxes[:, 2] * results.boxes[:, 3]
    detections = _rows(results.images, results.labels, results.boxes, area=areas, score=results.scores)
    with redirect_stdout(io.StringIO()):
        return COCOeval(api_of(objects), api_of(detections), "bbox")


def _rows(images: np.ndarray, classes: np.ndarray, boxes: np.ndarray, **columns: np.ndarray) -> list[dict[str, Any]]:
    """Annotations for pycocotools, with ids from 1: it takes a match with id 0 for no match."""
    names = ("id", "image_id", "category_id", "bbox", "iscrowd", *columns)
    crowd = np.zeros(len(images), dtype=int)
    values = (np.arange(1, len(images) + 1), images, classes, boxes, crowd, *columns.values())
    return [dict(zip(names, row, strict=True)) for row in zip(*(column.tolist() for column in values), strict=True)]


def _categories(index: AnnotationIndex) -> list[dict[str, Any]]:
    """Numbered categories, with LVIS's `frequency` where the file has it."""
    return [
        {"id": place, "name": str(place)} | ({"frequency": frequency} if frequency else {})
        for place, frequency in enumerate(index.frequencies)
    ]


def _looked_for(index: AnnotationIndex, place: int) -> dict[str, list[int]]:
    """The classes that an image certainly lacks, and those of which it may have more than is annotated."""
    entry = index.lvis[place] if index.lvis else {}
    found = {}
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        where = f"{index.annotation_file}: image {index.image_ids[place]!r}"
        if not isinstance(entry.get(key), list):
            raise InputError(
                f"{where} has no list `{key}`, which metrics=lvis needs of every image; take metrics=coco for a data "
                "set in which every object of every class is annotated."
            )
        numbers, _ = look_up(entry[key], index.label_of)
        if (numbers < 0).any():
            unknown = [number for number, label in zip(entry[key], numbers, strict=True) if label < 0]
            raise InputError(
                f"{where}, {key}: {len(unknown)} unknown category id(s): {show(unknown, 5)}; correct the file."
            )
        found[key] = numbers.tolist()
    return found
