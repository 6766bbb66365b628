"""The rule book for annotation files in COCO's format: what each key holds, what is repaired, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ERROR, WARNING, INFO = "error", "warning", "info"
EXAMPLES = 5  # of the entries that break a rule
_LONGEST_NAME = 255  # bytes of a file name on every common file system


class Rule(NamedTuple):
    """severity: error (training and evaluation refuse the file) or warning; message: what the entries are."""

    severity: str
    message: str
    remedy: str


RULES: dict[str, Rule] = {
    "file": Rule(ERROR, "annotation file that cannot be used at all", "give the right path, or fetch the file again"),
    "entries": Rule(
        ERROR,
        "entries that lack a key, or whose value is no id, name, length or box of four finite numbers",
        "add or correct it, or remove the entry",
    ),
    "no_categories": Rule(ERROR, "files without any category", "declare every class with an `id` and a `name`"),
    "image_ids": Rule(
        ERROR,
        "image ids that more than one image has",
        "each must be unique, renumber the images and their annotations",
    ),
    "category_ids": Rule(
        ERROR,
        "category ids that more than one category has",
        "each must be unique, renumber the categories and the annotations that use them",
    ),
    "category_names": Rule(
        ERROR, "class names that more than one category has", "merge these categories, or rename one"
    ),
    "unknown_images": Rule(
        ERROR,
        "annotations of images that the file does not list",
        "add the entry to `images`, or remove these annotations",
    ),
    "unknown_categories": Rule(
        ERROR,
        "annotations of categories that the file does not declare",
        "add the entry to `categories`, or correct the ids",
    ),
    "repaired_values": Rule(
        WARNING,
        "values that are not as COCO writes them, but plain",
        "nothing need be done; other tools may fail on them",
    ),
    "annotation_ids": Rule(
        WARNING,
        "annotation ids that more than one annotation has; not used here, but COCO's own code counts them wrongly",
        "renumber the annotations",
    ),
    "file_names": Rule(
        WARNING,
        "files that more than one image entry names; an entry that lacks the objects of the other teaches wrongly",
        "merge the entries",
    ),
    "exif_frame": Rule(
        WARNING,
        "images with an EXIF rotation, width and height before it, and boxes that only fit after it; read as after it",
        "nothing need be done here; swap `width` and `height` for other tools",
    ),
    "degenerate_boxes": Rule(
        WARNING,
        "boxes without area inside their image: training leaves them out, metrics count them, and they can never be "
        "found",
        "correct or remove them",
    ),
}


@dataclass(frozen=True)
class Fault:
    """What breaks one rule at one key of one file.

    Attributes:
        rule: a key of RULES.
        file: the annotation file.
        count: how many entries are concerned.
        examples: the first few, each naming its entry and key.
    """

    rule: str
    file: Path
    count: int
    examples: tuple[str, ...]

    @property
    def severity(self) -> str:
        return RULES[self.rule].severity

    def __str__(self) -> str:
        """One sentence: the file, the first entry at fault, the remedy."""
        if self.severity == WARNING:
            message = f"{self.count} {RULES[self.rule].message}, the first: {self.examples[0]}"
        else:
            message = self.examples[0]
        remedy = "" if self.rule == "file" else f"; {RULES[self.rule].remedy}"  # each of these says its own
        return f"{self.file}: {message}{remedy}."


class Key(NamedTuple):
    """One key of the entries of one section.

    Attributes:
        section, name: where it is.
        required: an entry without it is refused; otherwise absent and null mean the same.
        plain: the types of values that need no look, None for those of a box, which are looked at together.
        read: the value as it is used, for all other types; raises ValueError, TypeError or OverflowError.
        expected: what it must be, in words.
    """

    section: str
    name: str
    required: bool
    plain: tuple[type, ...]
    read: Callable[[Any], Any]
    expected: str


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _integer(value: Any) -> int:
    number = _number(value)
    if not number.is_integer():
        raise ValueError
    return int(value) if isinstance(value, int) else int(number)


def _image_id(value: Any) -> int | str:
    return value if isinstance(value, str) else _integer(value)


def _category_id(value: Any) -> int | str:
    """A text of digits is a number; another text is an id too."""
    try:
        return _integer(value)
    except ValueError:
        if isinstance(value, str) and value:
            return value
        raise


def _length(value: Any) -> int:
    length = _integer(value)
    if length <= 0:
        raise ValueError
    return length


def read_flag(value: Any) -> bool:
    words = {"false": False, "true": True}
    text = value.strip().lower() if isinstance(value, str) else value
    return words[text] if text in words else bool(_number(value))


def _name(value: Any) -> str:
    return value if isinstance(value, str) else str(_integer(value))


def _file_name(value: Any) -> str:
    parts = value.replace("\\", "/").split("/") if isinstance(value, str) else [""]
    if not value or "\0" in value or any(len(part.encode(errors="replace")) > _LONGEST_NAME for part in parts):
        raise ValueError
    if value.startswith("data:image/"):
        raise ValueError
    return str(value)


def read_box(value: Any) -> list[float]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 4:
        raise ValueError
    return [_number(number) for number in value]


KEYS: tuple[Key, ...] = (
    Key("images", "id", True, (int,), _image_id, "an integer or a text"),
    Key("images", "file_name", True, (), _file_name, "a file name, relative to the folder of the images"),
    Key("images", "width", False, (), _length, "a positive integer"),
    Key("images", "height", False, (), _length, "a positive integer"),
    Key("categories", "id", True, (int,), _category_id, "an integer or a text"),
    Key("categories", "name", True, (str,), _name, "a text"),
    Key("annotations", "image_id", True, (int,), _image_id, "an id, an integer or a text"),
    Key("annotations", "category_id", True, (int,), _category_id, "an id, an integer or a text"),
    Key("annotations", "bbox", True, (), read_box, "4 finite numbers"),
    Key("annotations", "area", False, (), _number, "a finite number"),
    Key("annotations", "iscrowd", False, (int, bool), read_flag, "0 or 1"),
    Key("annotations", "difficult", False, (int, bool), read_flag, "0 or 1"),
    Key("annotations", "ignore", False, (int, bool), read_flag, "0 or 1"),
)
