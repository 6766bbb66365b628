"""An annotation file as the data doctor sees it: whatever can be read of it, and a list of what cannot.

`load_annotations` stops at the first fault, because a run must not start with it. Here the sound entries are kept, so
that one look finds all faults.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from detector.data.rules import read_flag

ERROR, WARNING, INFO = "error", "warning", "info"
EXAMPLES = 5


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its id.
        severity: error (training refuses it, or its figures would be wrong), warning (look at it), info.
        count: how many entries are concerned.
        message: what it is.
        examples: the first few, with split and id or file.
        remedy: what to do; empty for info that needs nothing.
        figures: numbers behind it, plain values.
    """

    check: str
    severity: str
    count: int
    message: str
    examples: tuple[str, ...] = ()
    remedy: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self)) | {"examples": list(self.examples)}


@dataclass(frozen=True, eq=False)
class Split:
    """The M sound images, B sound annotations and K sound categories of one file.

    Attributes:
        name: "train" or "val".
        annotation_file, image_dir: where it comes from.
        images: M dicts with an `id` and a `file_name`.
        sizes: (M, 2) int64, height and width that the file declares, 0 where it does not.
        annotations: dicts with `image_id`, `category_id` and `bbox`; these may be unknown ids.
        categories: K dicts with an `id` and a `name`.
        faults: one line for each entry that is not sound.
        broken: why nothing could be read at all; None otherwise.
    """

    name: str
    annotation_file: Path
    image_dir: Path
    images: list[dict[str, Any]]
    sizes: np.ndarray
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    faults: list[str]
    broken: str | None = None

    def path(self, row: int) -> Path:
        return self.image_dir / self.images[row]["file_name"]


@dataclass(frozen=True, eq=False)
class Boxes:
    """The B annotations of a split whose image and category are known.

    Attributes:
        rows: (B,) int64, place in `images`.
        names: B class names.
        xywh: (B, 4) float64, pixels of the original image, as in the file.
        crowd: (B,) bool.
        where: B descriptions, for examples.
    """

    rows: np.ndarray
    names: np.ndarray
    xywh: np.ndarray
    crowd: np.ndarray
    where: list[str]


def found(
    check: str, severity: str, culprits: Sequence[str], message: str, remedy: str, **figures: Any
) -> list[Finding]:
    """A finding about these culprits; none where there are none."""
    if not culprits:
        return []
    return [Finding(check, severity, len(culprits), message, tuple(culprits[:EXAMPLES]), remedy, figures)]


def read_split(name: str, annotation_file: Path, image_dir: Path) -> Split:
    """Read what can be read; raises nothing about the file's content."""
    try:
        content = json.loads(annotation_file.read_bytes(), object_hook=_without_segmentation)
    except OSError as error:
        return _broken(name, annotation_file, image_dir, f"cannot be read ({error.strerror})")
    except ValueError as error:
        return _broken(name, annotation_file, image_dir, f"is not valid JSON ({error})")
    lists = {key: content.get(key) for key in ("images", "annotations", "categories")} if _is_object(content) else {}
    lacking = [key for key in ("images", "annotations", "categories") if not isinstance(lists.get(key), list)]
    if lacking:
        return _broken(name, annotation_file, image_dir, f"has no list under the key `{'`, `'.join(lacking)}`")
    faults: list[str] = []
    sound = {
        key: [item for place, item in enumerate(lists[key]) if _is_sound(name, key, place, item, faults)]
        for key in lists
    }
    if not sound["images"]:
        return _broken(name, annotation_file, image_dir, "has no usable entry under `images`")
    sizes = [_size(name, image, faults) for image in sound["images"]]
    return Split(
        name, annotation_file, image_dir, sound["images"], np.array(sizes, np.int64), sound["annotations"],
        sound["categories"], faults,
    )  # fmt: skip


def known_boxes(split: Split) -> Boxes:
    """The annotations whose image and category exist; of a repeated id, the first entry."""
    rows = {image["id"]: row for row, image in reversed(list(enumerate(split.images)))}
    names = {category["id"]: category["name"] for category in reversed(split.categories)}
    kept = [a for a in split.annotations if a["image_id"] in rows and a["category_id"] in names]
    return Boxes(
        rows=np.array([rows[a["image_id"]] for a in kept], np.int64),
        names=np.array([names[a["category_id"]] for a in kept], dtype=object),
        xywh=np.array([a["bbox"] for a in kept], np.float64).reshape(-1, 4),
        crowd=np.array([_is_crowd(a.get("iscrowd")) for a in kept], bool),
        where=[describe(split, a) for a in kept],
    )


def _is_crowd(value: Any) -> bool:
    try:
        return value is not None and bool(read_flag(value))
    except (ValueError, TypeError):  # the reader refuses it
        return False


def describe(split: Split, annotation: dict[str, Any]) -> str:
    return f"{split.name}: annotation {annotation.get('id', '(no id)')!r} of image {annotation['image_id']!r}"


def _broken(name: str, annotation_file: Path, image_dir: Path, why: str) -> Split:
    return Split(name, annotation_file, image_dir, [], np.zeros((0, 2), np.int64), [], [], [], why)


def _without_segmentation(item: dict[str, Any]) -> dict[str, Any]:
    item.pop("segmentation", None)  # most of a COCO file, and not looked at
    return item


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


# What each key of an entry must be: the rules of `load_annotations`.
_KEYS = {
    "images": {"id": _is_id, "file_name": lambda value: isinstance(value, str) and bool(value)},
    "annotations": {"image_id": _is_id, "category_id": _is_id, "bbox": _is_box},
    "categories": {
        "id": lambda value: _is_id(value) and not isinstance(value, str),
        "name": lambda value: isinstance(value, str),
    },
}


def _is_sound(split: str, section: str, place: int, item: Any, faults: list[str]) -> bool:
    if not isinstance(item, dict):
        faults.append(f"{split}: {section}[{place}] is no object: {repr(item)[:60]}")
        return False
    who = f"{split}: {section}[{place}] (id {item['id']!r})" if "id" in item else f"{split}: {section}[{place}]"
    for key, is_good in _KEYS[section].items():
        if key not in item:
            faults.append(f"{who} has no `{key}`")
            return False
        if not is_good(item[key]):
            faults.append(f"{who}: `{key}` is {repr(item[key])[:60]}")
            return False
    if section == "annotations" and not (item.get("area") is None or _is_number(item["area"])):
        faults.append(f"{who}: `area` is {repr(item['area'])[:60]}")  # the box is still worth looking at
    return True


def _size(split: str, image: dict[str, Any], faults: list[str]) -> tuple[int, int]:
    """Height and width; (0, 0) where one is absent or no length, which is a fault."""
    lengths = [image.get("height"), image.get("width")]
    for key, value in zip(("height", "width"), lengths, strict=True):
        if value is not None and not (_is_number(value) and value > 0 and float(value).is_integer()):
            faults.append(f"{split}: image {image['id']!r}: `{key}` is {repr(value)[:60]}")
            return 0, 0
    return (int(lengths[0]), int(lengths[1])) if None not in lengths else (0, 0)  # type: ignore[arg-type]
