"""Reading COCO's JSON: every key, id and number is checked once here, and every message names the entry at fault."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detector.errors import InputError


class Columns(NamedTuple):
    """The annotations of a file, column by column, in the file's order."""

    rows: np.ndarray  # (B,) int64, which picture
    labels: np.ndarray  # (B,) int64
    xywh: np.ndarray  # (B, 4) float64
    crowd: np.ndarray  # (B,) bool
    areas: np.ndarray  # (B,) float64, NaN where the file has none


class CocoFile(NamedTuple):
    """A checked annotation file."""

    images: list[dict[str, Any]]  # each with a unique `id` and a `file_name`
    class_names: tuple[str, ...]  # by ascending category id
    category_ids: tuple[int, ...]
    columns: Columns


def read_coco_json(path: Path) -> CocoFile:
    """Read and check an annotation file.

    Raises:
        InputError: names the file, the entry and the key at fault, and the remedy.
    """
    images, annotations, categories = _read_sections(path)
    class_names, category_ids = _read_categories(path, categories)
    rows = _read_images(path, images)
    labels = {number: label for label, number in enumerate(category_ids)}
    return CocoFile(images, class_names, category_ids, _read_annotations(path, annotations, rows, labels))


def show(values: Sequence[Any], most: int = 8) -> str:
    """The first values, for a message."""
    shown = ", ".join(repr(value) for value in values[:most])
    return shown if len(values) <= most else f"{shown} ... ({len(values)} in all)"


def _read_sections(path: Path) -> tuple[list[Any], list[Any], list[Any]]:
    content = _parse(path)
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: holds a JSON {type(content).__name__}, not an object with `images`, `annotations` and "
            f"`categories`; a results file is not an annotation file."
        )
    sections = []
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise InputError(
                f"{path}: no list under the key `{key}`; a COCO annotation file has `images`, `annotations` and "
                f"`categories` (add an empty `annotations` list if nothing is annotated)."
            )
        sections.append(content[key])
        for position, item in enumerate(content[key]):
            if not isinstance(item, dict):
                raise InputError(
                    f"{path}: entry {position} of `{key}` is not an object: {repr(item)[:80]}; correct it."
                )
    return sections[0], sections[1], sections[2]


def _parse(path: Path) -> Any:
    collecting = gc.isenabled()
    # Millions of new objects and no garbage: the collector would look at all of them again and again.
    gc.disable()
    try:
        return json.loads(path.read_bytes(), object_hook=_without_segmentation)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"{path}: no such annotation file; check the path.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path}: not valid JSON ({error}); the file is damaged or incomplete, fetch it again."
        ) from error
    finally:
        if collecting:
            gc.enable()


def _without_segmentation(item: dict[str, Any]) -> dict[str, Any]:
    # Most of a COCO file, and never used: dropped while parsing, or it takes gigabytes.
    item.pop("segmentation", None)
    return item


def _column(path: Path, section: str, items: list[dict[str, Any]], key: str) -> list[Any]:
    try:
        return [item[key] for item in items]
    except KeyError:
        position, item = next((i, item) for i, item in enumerate(items) if key not in item)
        raise InputError(
            f"{path}: {_name(section, item, position)} has no `{key}`; add it or remove the entry."
        ) from None


def _name(section: str, item: dict[str, Any], position: int) -> str:
    noun = {"images": "image", "annotations": "annotation", "categories": "category"}[section]
    return f"{noun} id {item['id']!r}" if "id" in item else f"{noun} number {position} (it has no id)"


def _refuse_repeats(path: Path, what: str, values: Iterable[Any]) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise InputError(f"{path}: {what} {show(repeated)} appears more than once; each must be unique, renumber them.")


def _refuse_types(
    path: Path, section: str, items: list[dict[str, Any]], key: str, good: Callable[[Any], bool], expected: str
) -> None:
    for position, item in enumerate(items):
        if not good(item[key]):
            name = _name(section, item, position)
            raise InputError(
                f"{path}: `{key}` of {name} is {repr(item[key])[:80]}, expected {expected}; correct the entry."
            )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_length(value: Any) -> bool:
    return (_is_integer(value) or (isinstance(value, float) and value.is_integer())) and value > 0


def _read_categories(path: Path, categories: list[dict[str, Any]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if not categories:
        raise InputError(f"{path}: `categories` is empty; declare every class with an `id` and a `name`.")
    _column(path, "categories", categories, "id")
    names = _column(path, "categories", categories, "name")
    _refuse_types(path, "categories", categories, "id", _is_integer, "an integer")
    _refuse_types(path, "categories", categories, "name", lambda name: isinstance(name, str), "a text")
    _refuse_repeats(path, "category id", (category["id"] for category in categories))
    _refuse_repeats(path, "category name", names)
    ordered = sorted(categories, key=lambda category: category["id"])
    return tuple(category["name"] for category in ordered), tuple(category["id"] for category in ordered)


def _read_images(path: Path, images: list[dict[str, Any]]) -> dict[Any, int]:
    """Row of each image id."""
    if not images:
        raise InputError(f"{path}: `images` is empty; list at least one picture.")
    ids = _column(path, "images", images, "id")
    _column(path, "images", images, "file_name")
    _refuse_types(path, "images", images, "id", lambda v: _is_integer(v) or isinstance(v, str), "an integer or a text")
    _refuse_types(path, "images", images, "file_name", lambda v: isinstance(v, str) and bool(v), "a file name")
    _refuse_repeats(path, "image id", ids)
    for key in ("width", "height"):
        declared = [image for image in images if image.get(key) is not None]
        _refuse_types(path, "images", declared, key, _is_length, "a positive integer")
    return {number: row for row, number in enumerate(ids)}


def _read_annotations(
    path: Path, annotations: list[dict[str, Any]], rows: dict[Any, int], labels: dict[int, int]
) -> Columns:
    image_ids = _column(path, "annotations", annotations, "image_id")
    category_ids = _column(path, "annotations", annotations, "category_id")
    xywh = _numbers(path, annotations, "bbox", _column(path, "annotations", annotations, "bbox"), (4,))
    with_area = [item for item in annotations if item.get("area") is not None]
    areas = np.full(len(annotations), np.nan)
    has_area = np.fromiter((item.get("area") is not None for item in annotations), bool, len(annotations))
    areas[has_area] = _numbers(path, with_area, "area", [item["area"] for item in with_area], ())
    return Columns(
        rows=_look_up(path, annotations, "image_id", image_ids, rows, "`images`"),
        labels=_look_up(path, annotations, "category_id", category_ids, labels, "`categories`"),
        xywh=xywh,
        crowd=np.fromiter((bool(item.get("iscrowd")) for item in annotations), bool, len(annotations)),
        areas=areas,
    )


def _look_up(
    path: Path, annotations: list[dict[str, Any]], key: str, ids: list[Any], known: dict[Any, int], where: str
) -> np.ndarray:
    try:
        found = np.fromiter((known.get(number, -1) for number in ids), np.int64, len(ids))
    except TypeError:  # A list or an object as an id.
        _refuse_types(path, "annotations", annotations, key, lambda v: isinstance(v, (int, str)), "an id")
        raise
    if len(found) and found.min() < 0:
        at = np.flatnonzero(found < 0)
        unknown = show(list(dict.fromkeys(ids[i] for i in at)))
        culprits = show([annotations[i].get("id", f"number {i}") for i in at])
        raise InputError(
            f"{path}: {key} {unknown} of annotation {culprits} is not in {where}; add the entry there, or remove these "
            f"annotations."
        )
    return found


def _numbers(
    path: Path, items: list[dict[str, Any]], key: str, values: list[Any], shape: tuple[int, ...]
) -> np.ndarray:
    """(B, *shape) float64, all finite."""
    array = _finite(values, (len(values), *shape))
    if array is None:
        at = next(i for i, value in enumerate(values) if _finite(value, shape) is None)
        name, expected = _name("annotations", items[at], at), "4 finite numbers" if shape else "a finite number"
        raise InputError(
            f"{path}: `{key}` of {name} is {repr(values[at])[:80]}, expected {expected}; correct or remove it."
        )
    return array


def _finite(value: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """The value as an array of this shape; None where it is not one, or not finite."""
    try:
        array = np.array(value, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        return None
    if array.size == 0:
        array = array.reshape(-1, *shape[1:])  # no annotation at all
    return array if array.shape == shape and np.isfinite(array).all() else None
