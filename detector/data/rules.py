"""The rule book for annotation files in COCO's format: what each key holds, what is repaired, and what is refused."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from detector.data.finding import ERROR, WARNING, Finding, found

_LONGEST_NAME = 255  # bytes of a file name on every common file system
_FARTHEST = 1e9  # pixels; what lies beyond is no place in any image

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 3


def brief(value: Any) -> str:
    """A value from a file, for a message: as Python writes it, shortened."""
    return _SHORT.repr(value)


def show(values: Sequence[Any], most: int = 8) -> str:
    """The first values, for a message."""
    shown = ", ".join(map(brief, values[:most]))
    return shown if len(values) <= most else f"{shown} ... ({len(values)} in all)"


class Rule(NamedTuple):
    """severity: error (training and evaluation refuse the file) or warning; message: what the entries are."""

    severity: str
    message: str
    remedy: str


# fmt: off
RULES: dict[str, Rule] = {
    "broken_files": Rule(ERROR,
        "files of a split that are missing or cannot be read",
        "correct it, or take it out of the data"),
    "file": Rule(ERROR,
        "annotation file that cannot be used at all",
        "give the right path, or fetch the file again"),
    "entries": Rule(ERROR,
        "entries that lack a key, or whose value is no id, name, length or box of four finite numbers",
        "add or correct it, or remove the entry"),
    "no_categories": Rule(ERROR,
        "files without any category",
        "declare every class with an `id` and a `name`"),
    "image_ids": Rule(ERROR,
        "image ids that more than one image has",
        "each must be unique, renumber the images and their annotations"),
    "category_ids": Rule(ERROR,
        "category ids that more than one category has",
        "each must be unique, renumber the categories and the annotations that use them"),
    "category_names": Rule(ERROR,
        "class names that more than one category has",
        "merge these categories, or rename one"),
    "unknown_images": Rule(ERROR,
        "annotations of images that the file does not list",
        "add the entry to `images`, or remove these annotations"),
    "unknown_categories": Rule(ERROR,
        "annotations of categories that the file does not declare",
        "add the entry to `categories` (`names` in YOLO's data.yaml), or correct the ids"),
    "missing_files": Rule(ERROR,
        "images that are not there",
        "check image_dir (data.train.images, data.val.images) and `file_name`, or remove these entries"),
    "exif_unknown": Rule(ERROR,
        "images with an EXIF rotation whose boxes may be in the frame before it or after it",
        "say which one: data.exif_boxes=turned (after it, as people see the image), or data.exif_boxes=stored; in "
        "tools/prepare_data.py exif_boxes="),
    "repaired_values": Rule(WARNING,
        "values that are not as COCO writes them, but plain",
        "nothing need be done; other tools may fail on them"),
    "annotation_ids": Rule(WARNING,
        "annotation ids that more than one annotation has; not used here, but COCO's own code counts them wrongly",
        "renumber the annotations"),
    "file_names": Rule(WARNING,
        "files that more than one image entry names; an entry that lacks the objects of the other teaches wrongly",
        "merge the entries"),
    "foreign_names": Rule(WARNING,
        "names of files with the folders of another machine; these files were found by the end of their names",
        "nothing need be done here; write names relative to the folder of the images for other tools"),
    "exif_frame": Rule(WARNING,
        "images with an EXIF rotation whose width and height belong to another frame than the boxes; read in the "
        "frame of the boxes",
        "nothing need be done here; swap `width` and `height` for other tools"),
    "areas": Rule(WARNING,
        "values of `area` that are no area of the object in its box (0 or less, or larger than the box); metrics by "
        "size go by them, and leave an object of less than 0 out",
        "leave `area` out, or give that of the mask"),
    "degenerate_boxes": Rule(WARNING,
        "boxes without area inside their image: training leaves them out, metrics count them, and they can never be "
        "found",
        "correct or remove them"),
}
# fmt: on


def fault(rule: str, texts: Sequence[str], count: int | None = None) -> list[Finding]:
    """What breaks a rule: these entries, or `count` of them; nothing where there are none."""
    severity, message, remedy = RULES[rule]
    return found(rule, severity, texts, message, remedy, count)


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError
    return value


def _is_file_name(text: str) -> bool:
    parts = text.replace("\\", "/").split("/")
    short = all(len(part.encode(errors="replace")) <= _LONGEST_NAME for part in parts)
    return text != "" and "\0" not in text and short and not text.startswith("data:image/")


def _where(condition: Callable[[Any], bool]) -> AfterValidator:
    def check(value: Any) -> Any:
        if not condition(value):
            raise ValueError
        return value

    return AfterValidator(check)


# A bool is an int in Python; here it is no number.
_NoFlag = BeforeValidator(_no_flag)
_Number = Annotated[float, Field(allow_inf_nan=False), _NoFlag]
_Place = Annotated[float, Field(ge=-_FARTHEST, le=_FARTHEST), _NoFlag]
_Length = Annotated[int, Field(gt=0, lt=_FARTHEST), _NoFlag]
_ImageId = Annotated[int | str, _NoFlag]
# A text of digits is a number; another text is an id too.
_CategoryId = Annotated[
    int | Annotated[str, _where(lambda text: text.strip("0123456789.+-") != "")],
    Field(union_mode="left_to_right"),
    _NoFlag,
]
# Neither `min_length` nor `pattern`: pydantic then refuses half a surrogate pair.
_Name = Annotated[str, Field(coerce_numbers_to_str=True), _where(bool), _NoFlag]
_FileName = Annotated[str, _where(_is_file_name)]
_Flag = Annotated[bool | _Number, Field(union_mode="left_to_right"), AfterValidator(bool)]


class Key:
    """One key of the entries of one section.

    Attributes:
        section, name: where it is.
        required: an entry without it is refused; otherwise absent and null mean the same.
        expected: what it must be, in words.
    """

    def __init__(self, section: str, name: str, required: bool, kind: Any, expected: str) -> None:
        """
        Args:
            kind: its type: what passes it in pydantic's strict mode is as COCO writes it, what passes in lax mode only
                is repaired.
        """
        self.section, self.name, self.required, self.expected = section, name, required, expected
        self._one: TypeAdapter[Any] = TypeAdapter(kind)
        self._all: TypeAdapter[list[Any]] = TypeAdapter(list[kind])

    def all_plain(self, values: list[Any]) -> bool:
        """Whether all values are as COCO writes them."""
        with suppress(ValidationError):
            self._all.validate_python(values, strict=True)
            return True
        return False

    def read(self, value: Any) -> tuple[Any, bool]:
        """A value as it is used, and whether it is as COCO writes it.

        Raises:
            ValidationError: it is not what is expected.
        """
        with suppress(ValidationError):
            return self._one.validate_python(value, strict=True), True
        return self._one.validate_python(value), False


KEYS: tuple[Key, ...] = (
    Key("images", "id", True, _ImageId, "an integer or a text"),
    Key("images", "file_name", True, _FileName, "a file name, relative to the folder of the images"),
    Key("images", "width", False, _Length, "a positive integer below a billion"),
    Key("images", "height", False, _Length, "a positive integer below a billion"),
    Key("categories", "id", True, _CategoryId, "an integer or a text"),
    Key("categories", "name", True, _Name, "a text"),
    Key("annotations", "image_id", True, _ImageId, "an id, an integer or a text"),
    Key("annotations", "category_id", True, _CategoryId, "an id, an integer or a text"),
    Key(
        "annotations",
        "bbox",
        True,
        Annotated[list[_Place], Field(min_length=4, max_length=4)],
        "4 finite numbers, none beyond a billion",
    ),
    Key("annotations", "area", False, _Number, "a finite number"),
    Key("annotations", "iscrowd", False, _Flag, "0 or 1"),
    Key("annotations", "difficult", False, _Flag, "0 or 1"),
    Key("annotations", "ignore", False, _Flag, "0 or 1"),
)
