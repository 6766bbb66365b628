"""Images and their annotated boxes as flat arrays: what training, metrics and the data doctor work on."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from detector.data.boxes import corners
from detector.data.finding import ERROR, KEPT, Finding
from detector.data.images import exif_orientation, read_image
from detector.data.rules import RULES, fault
from detector.errors import InputError

logger = logging.getLogger(__name__)

# Boxes that stick out by less are rounding, not a mistake worth counting: COCO writes two decimals.
_ROUNDING = 0.01


@dataclass(frozen=True, eq=False)
class AnnotationIndex:
    """M images and their B annotated boxes, without a Python object per box, so that forked workers share the memory.

    Attributes:
        annotation_file: where it came from.
        image_dir: the folder that `file_names` are relative to.
        image_ids: M ids as in the file, integers or texts.
        file_names: M names as in the file, "" where it has none.
        sizes: (M, 2) int64, height and width in the frame of the boxes, 0 where the file declares none.
        upright: (M,) bool; the boxes are in the frame after an EXIF rotation, if there is one.
        offsets: (M + 1,) int64; the boxes of image i are offsets[i]:offsets[i + 1], in the file's order.
        xywh: (B, 4) float64, as in the file, in pixels of the original image: what metrics count.
        boxes: (B, 4) float32, xyxy, inside the image where its size is declared: what training sees.
        labels: (B,) int64 index into class_names.
        crowd: (B,) bool; a region of many objects, not one.
        difficult: (B,) bool; `difficult` or `ignore` is set, or a crowd region: Pascal VOC does not count these.
        areas: (B,) float64, the file's `area` in square pixels (of the mask, in COCO), the box's where it has none.
        class_names: declared classes by ascending COCO id, whether or not a box uses them.
        category_ids: the COCO id of each class.
        annotation_ids: (B,) as in the file, int64 where all are numbers; for messages only.
        faults: what is wrong with the file.
        lvis: for each image its LVIS lists of classes, see detector.evaluation.metrics; None where no image has them.
        frequencies: LVIS's `frequency` of each class, None where there is none.
        other_ids: of images of the file that are not in this index (see `select`).
        frame: of boxes on images with an EXIF rotation, where the layout says it; None: `match_files` finds out.
    """

    annotation_file: Path
    image_dir: Path
    image_ids: list[Any]
    file_names: list[str]
    sizes: np.ndarray
    upright: np.ndarray
    offsets: np.ndarray
    xywh: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray
    areas: np.ndarray
    class_names: tuple[str, ...]
    category_ids: tuple[Any, ...]
    annotation_ids: np.ndarray
    faults: tuple[Finding, ...] = ()
    lvis: list[dict[str, Any]] | None = None
    frequencies: tuple[str | None, ...] = ()
    other_ids: frozenset[Any] = frozenset()
    frame: Literal["turned", "stored"] | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    @cached_property
    def place(self) -> dict[Any, int]:
        """Place of each image id."""
        return {image_id: i for i, image_id in enumerate(self.image_ids)}

    @cached_property
    def label_of(self) -> dict[Any, int]:
        """Label of each COCO id of a class."""
        return {category_id: label for label, category_id in enumerate(self.category_ids)}

    @property
    def images(self) -> np.ndarray:
        """(B,) int64, the image of each box."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @property
    def corners(self) -> np.ndarray:
        """(B, 4) float64, xyxy, as in the file."""
        return corners(self.xywh)

    @property
    def degenerate(self) -> np.ndarray:
        """(B,) bool; no area inside its image. Training leaves it out, metrics count it, it can never be found."""
        return np.less_equal(self.boxes[:, 2:], self.boxes[:, :2]).any(axis=1)

    @property
    def clipped(self) -> np.ndarray:
        """(B,) bool; the box sticks out of its image, by more than rounding."""
        return (np.abs(self.boxes - self.corners) > _ROUNDING).any(axis=1)

    @property
    def empty(self) -> np.ndarray:
        """(M,) bool; no box to train on."""
        return np.bincount(self.images[~self.degenerate], minlength=len(self)) == 0

    @property
    def counts(self) -> dict[str, int]:
        """How many images, boxes to train on, crowds among them, images without one, clipped and degenerate boxes."""
        good = ~self.degenerate
        return {
            "images": len(self),
            "boxes": int(good.sum()),
            "crowds": int((self.crowd & good).sum()),
            "empty": int(self.empty.sum()),
            "clipped": int((self.clipped & good).sum()),
            "degenerate": int((~good).sum()),
        }

    def objects(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes (G, 4), labels (G,) and crowd flags (G,) of image i to train on, as copies."""
        rows = np.arange(self.offsets[:-1][i], self.offsets[1:][i])  # i may count from the end
        rows = rows[(self.boxes[rows, 2:] > self.boxes[rows, :2]).all(axis=1)]
        return self.boxes[rows], self.labels[rows], self.crowd[rows]

    def path(self, i: int) -> Path:
        """The file of image i."""
        return self.image_dir / self.file_names[i]

    def read(self, i: int, reduce: int = 1) -> np.ndarray:
        """Decode image i, in the frame that its boxes are in.

        That is after an EXIF rotation, or before it: see `detector.data.image_files.match_files`. Where nobody looked,
        the size that the file declares decides; without one, the rotation is applied.

        Args:
            i: which.
            reduce: see `read_image`: of a JPEG of a declared size, that fraction may come.

        Returns:
            uint8 RGB (h, w, 3).

        Raises:
            InputError: the file cannot be read, or has another size than the annotation file says.
        """
        path, name, upright = self.path(i), f"image id {self.image_ids[i]!r}", bool(self.upright[i])
        declared = tuple(self.sizes[i].tolist())
        if reduce > 1 and exif_orientation(path)[1] not in (declared, declared[::-1]):
            reduce = 1  # a file of another size must not pass for a reduced one
        right = (declared, tuple(-(-side // reduce) for side in declared))
        try:
            image = read_image(path, exif=upright, reduce=reduce)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if 0 in declared or image.shape[:2] in right:
            return image
        other = read_image(path, exif=not upright, reduce=reduce)
        if other.shape[:2] in right:
            return other
        raise InputError(
            f"{name}: {path} is {image.shape[1]} x {image.shape[0]} pixels, but {self.annotation_file.name} says width "
            f"{declared[1]} and height {declared[0]}, so its boxes would be in the wrong place; correct width and "
            f"height (and boxes) in the annotation file, or restore the original image."
        )

    def select(self, places: Sequence[int] | np.ndarray) -> AnnotationIndex:
        """These images only, in this order."""
        chosen = np.asarray(places, np.int64)
        counts = np.diff(self.offsets)[chosen]
        offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][chosen] - offsets[:-1], counts)
        names = ("xywh", "boxes", "labels", "crowd", "difficult", "areas", "annotation_ids")
        ids = [self.image_ids[i] for i in chosen]
        return replace(
            self,
            image_ids=ids,
            file_names=[self.file_names[i] for i in chosen],
            sizes=self.sizes[chosen],
            upright=self.upright[chosen],
            offsets=offsets,
            lvis=[self.lvis[i] for i in chosen] if self.lvis is not None else None,
            other_ids=self.other_ids.union(self.image_ids) - frozenset(ids),
            **{name: getattr(self, name)[rows] for name in names},
        )

    def in_order(self, class_names: Sequence[str]) -> AnnotationIndex:
        """With labels that count its classes in this order: the same names, each once."""
        order = [self.class_names.index(name) for name in class_names]
        return replace(
            self,
            labels=np.argsort(order)[self.labels],
            class_names=tuple(class_names),
            category_ids=tuple(self.category_ids[label] for label in order),
            frequencies=tuple(self.frequencies[label] for label in order) if self.frequencies else (),
        )

    def check(self) -> AnnotationIndex:
        """This index, if its file has no error; warnings are logged.

        Raises:
            InputError: the first error, and how many more there are.
        """
        places = list(RULES)
        faults = sorted(self.faults, key=lambda one: places.index(one.check))
        errors = [one for one in faults if one.severity == ERROR]
        if errors:
            remedy = "" if errors[0].check == "file" else f"; {errors[0].remedy}"  # each of these says its own
            more = sum(one.count for one in errors) - 1
            hint = f" {more} more of its entries are at fault: tools/doctor.py lists them." if more else ""
            raise InputError(f"{self.annotation_file}: {errors[0].examples[0]}{remedy}.{hint}")
        for one in faults:
            what = f"{one.count} {one.message}, the first: {one.examples[0]}; {one.remedy}"
            logger.warning("%s: %s.", self.annotation_file, what)
        return self

    def describe(self, row: int) -> str:
        """Which box this is, for a message."""
        image = int(np.searchsorted(self.offsets, row, side="right")) - 1
        annotation = self.annotation_ids[row : row + 1].tolist()[0]
        return f"annotation {'(no id)' if annotation is None else repr(annotation)} of image {self.image_ids[image]!r}"

    def degenerate_boxes(self) -> list[Finding]:
        """The fault that some boxes have no area inside their images; none where all have."""
        bad = np.flatnonzero(self.degenerate).tolist()
        texts = [f"`bbox` of {self.describe(row)} is {self.xywh[row].tolist()}" for row in bad[:KEPT]]
        return fault("degenerate_boxes", texts, len(bad))

    def summary(self) -> str:
        """One line for the log."""
        counts = self.counts
        return (
            f"{self.annotation_file.name}: {counts['images']} images, {counts['empty']} without a box; "
            f"{counts['boxes']} boxes of {len(self.class_names)} classes, {counts['crowds']} crowd regions; "
            f"{counts['clipped']} boxes clipped to the image, {counts['degenerate']} without area inside it"
            + (" (not trained on; counted by metrics, can never be found)" if counts["degenerate"] else "")
        )


# The splits of a data set by name, the training split first.
Splits: TypeAlias = Mapping[str, AnnotationIndex]


def id_order(value: Any) -> tuple[bool, Any]:
    """Key to sort ids by that may be numbers and texts."""
    return isinstance(value, str), value


def look_up(ids: Sequence[Any], known: Mapping[Any, int]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (N,) int64 of ids, -1 for unknown ones; and (N,) bool, which were only found as text or as number."""
    try:
        found = np.fromiter(map(known.get, ids, repeat(-1)), np.int64, len(ids))
    except TypeError:
        found = np.array([_number(value, known) for value in ids], np.int64)
    other_type = np.zeros(len(ids), bool)
    for place in np.flatnonzero(found < 0).tolist():
        found[place] = known.get(_other_type(ids[place]), -1)
        other_type[place] = found[place] >= 0
    return found, other_type


def _number(value: Any, known: Mapping[Any, int]) -> int:
    try:
        return known.get(value, -1)
    except TypeError:  # a list, for example, which no mapping can have as a key
        return -1


def _other_type(value: Any) -> Any:
    if not isinstance(value, str):
        return str(value)
    return int(value) if re.fullmatch(r"-?\d{1,20}", value) else None
