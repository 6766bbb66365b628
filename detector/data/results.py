"""What a detector found, as flat arrays, and files of it in COCO's results format."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from detector.data.index import AnnotationIndex, id_order, look_up
from detector.data.json_file import read_json
from detector.data.rules import brief, show
from detector.errors import InputError
from detector.files import UNENCODABLE, replacing

logger = logging.getLogger(__name__)

_KEYS = ("image_id", "category_id", "bbox", "score")
_LARGEST = 1e150  # pixels; areas of larger boxes, and their sums, are no finite numbers
_EXPECTED = f"expected a list with one {{{', '.join(_KEYS)}}} for each detection."


class _Boxes(Protocol):
    """What a detector gives for one image: boxes (D, 4) xyxy in pixels of the original image, scores, labels (D,)."""

    @property
    def boxes(self) -> np.ndarray: ...
    @property
    def scores(self) -> np.ndarray: ...
    @property
    def labels(self) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Results:
    """D detections on the images of an index.

    Attributes:
        images: (D,) int64, place of the image in the index.
        labels: (D,) int64, index into class_names.
        boxes: (D, 4) float64, xywh in pixels of the original image.
        scores: (D,) float64.
    """

    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def of(cls, places: Iterable[int], found: Iterable[_Boxes]) -> Results:
        """From what was found in each of these images."""
        pairs = list(zip(places, found, strict=True))
        corners = np.concatenate([np.zeros((0, 4)), *(boxes.boxes for _, boxes in pairs)]).astype(np.float64)
        counts = [len(boxes.scores) for _, boxes in pairs]
        return cls(
            images=np.repeat(np.array([place for place, _ in pairs], np.int64), counts),
            labels=np.concatenate([np.zeros(0, np.int64), *(boxes.labels for _, boxes in pairs)]).astype(np.int64),
            boxes=np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1),
            scores=np.concatenate([np.zeros(0), *(boxes.scores for _, boxes in pairs)]).astype(np.float64),
        )

    @classmethod
    def joined(cls, parts: Iterable[Results]) -> Results:
        """All detections, in the order of the images; within one, in the order given."""
        listed = [cls.of([], []), *parts]
        columns = [np.concatenate([getattr(part, name) for part in listed]) for name in vars(listed[0])]
        return cls(*columns).rows(np.argsort(columns[0], kind="stable"))

    def rows(self, which: np.ndarray) -> Results:
        """These detections only: a mask (D,), or numbers of rows in their new order."""
        return Results(*(column[which] for column in vars(self).values()))

    def select(self, places: Sequence[int] | np.ndarray) -> Results:
        """Those on these images, in the order given, with places in `index.select(places)`."""
        chosen = np.asarray(places, np.int64)
        size = 1 + max(self.images.max(initial=-1), chosen.max(initial=-1))
        new = np.full(size, -1)
        new[chosen] = np.arange(len(chosen))
        moved = replace(self, images=new[self.images])
        return moved.rows(moved.images >= 0)


def read_results(source: str | Path | Sequence[Mapping[str, Any]], index: AnnotationIndex) -> Results:
    """Read anybody's detections in COCO's results format.

    Args:
        source: a JSON file, or its content: {"image_id", "category_id", "bbox", "score"} each, boxes xywh in pixels of
            the original image. May be empty.
        index: the images; detections on other images of its file do not count.

    Raises:
        InputError: names the first row at fault, or the unknown ids.
    """
    where = f"{source}" if isinstance(source, str | Path) else "results"
    rows = read_json(source, "results file") if isinstance(source, str | Path) else source
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise InputError(f"{where}: {_EXPECTED}")
    try:
        image_ids, category_ids, boxes, scores = (list(map(itemgetter(key), rows)) for key in _KEYS)
    except (KeyError, TypeError, IndexError):
        raise InputError(f"{where}{_malformed(rows)}") from None
    known = dict.fromkeys(index.other_ids, len(index)) | index.place
    images = _numbers_of(image_ids, known, where, "image")
    labels = _numbers_of(category_ids, index.label_of, where, "category")
    found = Results(images, labels, _finite(boxes, "bbox", (4,), where), _finite(scores, "score", (), where))
    return found.rows(images < len(index)) if index.other_ids else found


def within_unit(results: Results) -> tuple[Results, str]:
    """Results with scores from 0 to 1, for what sets thresholds or compares scores with shares.

    Where scores are none such (percent, logits), each is replaced by its rank among the distinct ones, as a share: the
    order stays, and with it all metrics.

    Returns:
        The results, and what was done to them, "" for nothing.
    """
    outside = (results.scores < 0) | (results.scores > 1)
    if not outside.any():
        return results, ""
    distinct, rank = np.unique(results.scores, return_inverse=True)
    note = (
        f"{outside.sum()} of {len(results)} scores lie outside 0 to 1 (all: from {distinct[0]:g} to {distinct[-1]:g}): "
        "ranks stand for the scores, 0.7 is above 70 % of them"
    )
    return replace(results, scores=(rank + 1) / len(distinct)), note


def write_results(path: str | Path, results: Results, index: AnnotationIndex) -> None:
    """Write COCO's results format, a line for each detection, complete or not at all."""
    rows = zip(*(column.tolist() for column in vars(results).values()), strict=True)
    named = (
        dict(zip(_KEYS, (index.image_ids[image], index.category_ids[label], box, score), strict=True))
        for image, label, box, score in rows
    )
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in named)
    with replacing(path) as partial:
        partial.write_text("[" + ",\n ".join(lines) + "]\n", encoding="utf-8", errors=UNENCODABLE)


def _numbers_of(ids: list[Any], known: Mapping[Any, int], where: str, what: str) -> np.ndarray:
    found, other_type = look_up(ids, known)
    if len(found) and found.min() < 0:
        unknown = sorted({brief(ids[i]): i for i in np.flatnonzero(found < 0)[::-1]}.values())
        raise InputError(
            f"{where}[{unknown[0]}]: {len(unknown)} unknown {what} id(s): {show([ids[i] for i in unknown], 5)}; the "
            f"ground truth has {show(sorted(known, key=id_order), 5)}. Do both belong to the same data set?"
        )
    if other_type.any():
        how = f"{what} ids are numbers here and texts in the annotations, or the other way round"
        logger.warning("%s: %d %s", where, other_type.sum(), how)
    return found


def _malformed(rows: Sequence[Any]) -> str:
    """What is wrong with the first row that is no mapping or lacks a key."""
    for place, row in enumerate(rows):
        if not isinstance(row, Mapping):
            break
        missing = [key for key in _KEYS if key not in row]
        if missing:
            return f"[{place}] lacks {', '.join(missing)}; it has {brief(list(row)) if row else 'no keys'}."
    return f": {_EXPECTED}"


def _finite(values: list[Any], key: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    """float64 (D, *shape), or an error that names the first value that does not fit."""
    array = _valid(values, (len(values), *shape))
    if array is not None:
        return array
    place = next((place for place, value in enumerate(values) if _valid([value], (1, *shape)) is None), 0)
    sizes = f"four finite numbers x, y, width, height with no negative size, all within {_LARGEST:g} pixels"
    wanted = sizes if shape else "one finite number"
    raise InputError(f"{where}[{place}]: {key} is {brief(values[place])}; expected {wanted}.")


def _valid(values: list[Any], shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        array = np.array(values) if values else np.zeros(shape)
    except ValueError:  # ragged
        return None
    if array.shape != shape or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        return None
    if array.ndim == 2 and ((array[:, 2:] < 0).any() or (np.abs(array) > _LARGEST).any()):
        return None
    return array.astype(np.float64)
