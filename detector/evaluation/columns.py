"""Ground truth and results, read and checked: one array for each column, with every id counted anew.

A data set of 5,000 pictures has half a million detections; arrays keep checking them a matter of tenths of a second.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detector.errors import InputError

_RESULT_KEYS = ("image_id", "category_id", "bbox", "score")


class Found(NamedTuple):
    """D detections on the scored images, in the order of the results."""

    images: np.ndarray  # (D,) int64, place in GroundTruth.image_ids
    classes: np.ndarray  # (D,) int64, place in GroundTruth.class_names
    boxes: np.ndarray  # (D, 4) float64, xywh in pixels of the original picture
    scores: np.ndarray  # (D,) float64


class GroundTruth:
    """The B objects of the scored images.

    Images and categories are counted from 0 in sorted order, so that ids may be strings and annotation ids do not
    matter: pycocotools takes a match with annotation id 0 for no match, and counts a repeated id twice. The sorted
    order is pycocotools' own, so ties fall as in its figures.

    Attributes:
        image_ids, category_ids: as in the file, sorted; an id's number here is its place there.
        class_names: of each category.
        scored: (N,) int64, the images that count, ascending.
        images, classes: (B,) int64 places in image_ids and class_names.
        boxes: (B, 4) float64, xywh in pixels of the original picture.
        areas: (B,) float64, the file's `area` (of the mask, in COCO), the box's where it has none.
        crowd: (B,) bool, a region of many objects.
        difficult: (B,) bool, `difficult` or `ignore` is set, or the object is a crowd region; Pascal VOC skips these.
        image_entries, category_entries: what the file says of each image and category, in the order of the ids.
    """

    def __init__(self, source: Any, image_ids: Iterable[Any] | None) -> None:
        data = _read(source, "ground truth")
        _check_sections(data)
        self.category_entries = sorted(data["categories"], key=lambda category: _sortable(category["id"]))
        self.category_ids = [category["id"] for category in self.category_entries]
        self.class_names = [str(category["name"]) for category in self.category_entries]
        if len(set(self.class_names)) < len(self.class_names):
            raise InputError(f"ground truth: class names are not unique: {_few(self.class_names)}; rename some.")
        entries = {image["id"]: image for image in data["images"]}
        self.image_ids = sorted(entries, key=_sortable)
        self.image_entries = [entries[image_id] for image_id in self.image_ids]
        self._image_numbers = {image_id: place for place, image_id in enumerate(self.image_ids)}
        self._class_numbers = {category_id: place for place, category_id in enumerate(self.category_ids)}
        self.scored = np.arange(len(self.image_ids))
        if image_ids is not None:
            self.scored = np.unique(number(list(image_ids), self._image_numbers, "image_ids", "image"))
        rows = [self._row(place, item) for place, item in enumerate(data["annotations"])]
        columns = np.array(rows, dtype=np.float64).reshape(len(rows), 9)
        if not np.isfinite(columns).all():
            place = int(np.flatnonzero(~np.isfinite(columns).all(axis=1))[0])
            raise InputError(
                f"ground truth: annotation {_name(data, place)} has a number that is not finite; correct it."
            )
        columns = columns[self._is_scored(columns[:, 0].astype(np.int64))]
        self.images, self.classes = columns[:, 0].astype(np.int64), columns[:, 1].astype(np.int64)
        self.boxes, self.areas = columns[:, 2:6], columns[:, 6]
        self.crowd, self.difficult = columns[:, 7] > 0, columns[:, 8] > 0

    def find(self, source: Any) -> Found:
        """The results that lie on scored images, checked.

        Args:
            source: COCO's results format, or a JSON file of it.

        Raises:
            InputError: names the first row at fault, or the unknown ids.
        """
        image_ids, category_ids, boxes, scores = _columns(_read(source, "results"))
        images = number(image_ids, self._image_numbers, "results", "image")
        classes = number(category_ids, self._class_numbers, "results", "category")
        kept = self._is_scored(images)
        return Found(images[kept], classes[kept], boxes[kept], scores[kept])

    def number_classes(self, category_ids: Sequence[Any], where: str) -> list[int]:
        """The places of category ids in class_names; `where` names them in the error about an unknown one."""
        return number(category_ids, self._class_numbers, where, "category").tolist()

    def _is_scored(self, images: np.ndarray) -> np.ndarray:
        scored = np.zeros(len(self.image_ids), dtype=bool)
        scored[self.scored] = True
        return scored[images]

    def _row(self, place: int, item: Mapping[str, Any]) -> tuple[float, ...]:
        """Image, class, x, y, width, height, area, crowd, difficult."""
        try:
            x, y, width, height = map(float, item["bbox"])
            area = float(item["area"]) if "area" in item else width * height
            crowd = int(item.get("iscrowd", 0))
            difficult = crowd or int(item.get("difficult", 0)) or int(item.get("ignore", 0))
            image, label = self._image_numbers[item["image_id"]], self._class_numbers[item["category_id"]]
        except (KeyError, TypeError, ValueError) as error:
            name = item.get("id", place) if isinstance(item, Mapping) else place
            raise InputError(
                f"ground truth: annotation {name!r} lacks a key, a box of four numbers, or a known "
                f"image or category id ({type(error).__name__}: {error}); correct the annotation file."
            ) from error
        return image, label, x, y, width, height, area, crowd, difficult


def number(ids: Sequence[Any], known: Mapping[Any, int], where: str, what: str) -> np.ndarray:
    """int64 (len(ids),), the number of each id; an error that counts the unknown ones and shows the first."""
    try:
        return np.fromiter(map(known.__getitem__, ids), dtype=np.int64, count=len(ids))
    except TypeError as error:  # a list, for example
        raise InputError(f"{where}: an {what} id is no number or text ({error}); correct it.") from error
    except KeyError:
        unknown = sorted({value for value in ids if value not in known}, key=_sortable)
    raise InputError(
        f"{where}: {len(unknown)} unknown {what} id(s): {_few(unknown)}; the ground truth has {_few(list(known))}. "
        "Do both belong to the same data set?"
    )


def _read(source: Any, what: str) -> Any:
    if not isinstance(source, str | Path):
        return source
    path = Path(source)
    collecting = gc.isenabled()
    # Millions of new objects and no garbage: the collector would look at all of them again and again.
    gc.disable()
    try:
        return json.loads(path.read_bytes(), object_hook=_without_segmentation if what == "ground truth" else None)
    except OSError as error:
        raise InputError(f"{what}: cannot read {path} ({error.strerror}); check the path.") from error
    except ValueError as error:
        raise InputError(f"{what}: {path} is not JSON ({error}); write it again.") from error
    finally:
        if collecting:
            gc.enable()


def _without_segmentation(item: dict[str, Any]) -> dict[str, Any]:
    # Most of a COCO file, and never used: dropped while parsing, or it takes gigabytes.
    item.pop("segmentation", None)
    return item


def _check_sections(data: Any) -> None:
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, Mapping) or not isinstance(data.get(key), list):
            raise InputError(f"ground truth: no list `{key}`; give a COCO annotation file that has objects.")
    for key, needed in (("images", ["id"]), ("categories", ["id", "name"])):
        for place, item in enumerate(data[key]):
            if not isinstance(item, Mapping) or any(name not in item for name in needed):
                raise InputError(f"ground truth: {key}[{place}] lacks {' or '.join(needed)}: {item!r}; add it.")


def _columns(results: Any) -> tuple[list[Any], list[Any], np.ndarray, np.ndarray]:
    """Image ids, category ids, boxes (D, 4) and scores (D,) of results that are well formed."""
    if not isinstance(results, Sequence):
        raise InputError(_EXPECTED)
    try:
        image_ids, category_ids, boxes, scores = (list(map(itemgetter(key), results)) for key in _RESULT_KEYS)
    except (KeyError, TypeError, IndexError):
        raise InputError(_malformed(results)) from None
    return image_ids, category_ids, _numbers(boxes, "bbox", (4,)), _numbers(scores, "score", ())


_EXPECTED = f"results: expected a list with one {{{', '.join(_RESULT_KEYS)}}} for each detection."


def _malformed(results: Sequence[Any]) -> str:
    """What is wrong with the first result that is no mapping or lacks a key."""
    for place, result in enumerate(results):
        if not isinstance(result, Mapping):
            break
        missing = [key for key in _RESULT_KEYS if key not in result]
        if missing:
            return f"results[{place}] lacks {', '.join(missing)}; it has {', '.join(result) or 'no keys'}."
    return _EXPECTED


def _numbers(values: list[Any], key: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 (D, *shape), or an error that names the first value that does not fit."""
    array = _valid(values, (len(values), *shape))
    if array is not None:
        return array
    place = next((place for place, value in enumerate(values) if _valid([value], (1, *shape)) is None), 0)
    wanted = "four finite numbers x, y, width, height with no negative size" if shape else "one finite number"
    raise InputError(f"results[{place}]: {key} is {values[place]!r}; expected {wanted}.")


def _valid(values: list[Any], shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        array = np.array(values) if values else np.zeros(shape)
    except ValueError:  # ragged
        return None
    if array.shape != shape or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        return None
    return None if array.ndim == 2 and (array[:, 2:] < 0).any() else array.astype(np.float64)


def _name(data: Mapping[str, Any], place: int) -> str:
    return repr(data["annotations"][place].get("id", place))


def _few(values: Sequence[Any]) -> str:
    return ", ".join(map(repr, values[:5])) + (f", ... ({len(values)} in all)" if len(values) > 5 else "")


def _sortable(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value
