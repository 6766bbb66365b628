"""COCO annotation files as flat arrays.

The only place, with the results file, where COCO's own category ids appear: a label is an index into `class_names`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detector.data.coco_json import CocoFile, read_coco_json, show
from detector.data.images import read_image
from detector.errors import InputError

logger = logging.getLogger(__name__)

# Missing pictures are looked for among this many when a file is loaded, and the rest when they are read: asking a
# network disk for 118,000 files takes minutes.
_FILES_CHECKED = 5
# Boxes that stick out by less are rounding, not a mistake worth counting: COCO writes two decimals.
_ROUNDING = 0.01


@dataclass(frozen=True, eq=False)
class CocoIndex:
    """M pictures and their B boxes, without a Python object per box, so that forked workers share the memory.

    Attributes:
        annotation_file: where it came from; the ground truth that an evaluation reads.
        image_dir: the folder that `file_names` are relative to.
        image_ids: M ids as in the file, integers or strings.
        file_names: M names as in the file.
        sizes: (M, 2) int64, height and width that the file declares, 0 where it does not.
        offsets: (M + 1,) int64; the boxes of picture i are offsets[i]:offsets[i + 1], in the file's order.
        boxes: (B, 4) float32, xyxy in pixels of the original picture, inside it where its size is declared.
        labels: (B,) int64 index into class_names.
        crowd: (B,) bool; a region of many objects, not one.
        areas: (B,) float32, the file's `area` in square pixels (of the mask, in COCO), the box's where it has none.
        class_names: declared classes by ascending COCO id, whether or not a box uses them.
        category_ids: the COCO id of each class.
        counts: images, boxes and crowds of this index; empty (pictures without a box, kept or not), clipped and
            dropped (boxes) of the whole file.
    """

    annotation_file: Path
    image_dir: Path
    image_ids: list[Any]
    file_names: list[str]
    sizes: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.image_ids)

    def objects(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes (G, 4), labels (G,) and crowd flags (G,) of picture i, as copies."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        return self.boxes[rows].copy(), self.labels[rows].copy(), self.crowd[rows].copy()

    def path(self, i: int) -> Path:
        """The file of picture i."""
        return self.image_dir / self.file_names[i]

    def read(self, i: int) -> np.ndarray:
        """Decode picture i, in the frame that its boxes are in.

        A camera's picture may carry an EXIF rotation, and tools disagree on whether boxes refer to the picture before
        or after it. The size that the file declares decides; without one, the rotation is applied.

        Returns:
            uint8 RGB (h, w, 3).

        Raises:
            InputError: the file cannot be read, or has another size than the annotation file says.
        """
        path, name = self.path(i), f"image id {self.image_ids[i]!r}"
        try:
            image = read_image(path)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        declared = tuple(self.sizes[i].tolist())
        if 0 in declared or image.shape[:2] == declared:
            return image
        unrotated = read_image(path, exif=False)
        if unrotated.shape[:2] == declared:
            return unrotated
        raise InputError(
            f"{name}: {path} is {image.shape[1]} x {image.shape[0]} pixels, but {self.annotation_file.name} says width "
            f"{declared[1]} and height {declared[0]}, so its boxes would be in the wrong place; correct width and "
            f"height (and boxes) in the annotation file, or restore the original picture."
        )

    def summary(self) -> str:
        """One line for the log."""
        counts = self.counts
        empty = f"{counts['empty']} without a box"
        if counts["empty"]:
            empty += " (kept)" if (np.diff(self.offsets) == 0).any() else " (left out)"
        return (
            f"{self.annotation_file.name}: {counts['images']} images, {empty}; {counts['boxes']} boxes of "
            f"{len(self.class_names)} classes, {counts['crowds']} crowd regions; {counts['clipped']} boxes clipped to "
            f"the picture, {counts['dropped']} dropped (no area inside it)"
        )


def load_coco(
    annotation_file: str | os.PathLike[str],
    image_dir: str | os.PathLike[str],
    *,
    keep_empty: bool = True,
    class_names: Sequence[str] | None = None,
    limit: int | None = None,
) -> CocoIndex:
    """Read a COCO annotation file.

    Boxes are clipped to the picture where its size is declared; what has no area (left) is dropped; both are counted.
    A missing `iscrowd` means 0. Segmentations are ignored. Annotation order, and sparse ids, do not matter.

    Args:
        annotation_file: JSON with `images`, `annotations` and `categories`.
        image_dir: the folder that each `file_name` is relative to.
        keep_empty: keep pictures without a box: what a detector must stay silent on is worth training on.
        class_names: the classes that the file must declare, in this order (those of a checkpoint); None takes any.
        limit: keep only this many pictures, the first ones.

    Raises:
        InputError: a file or folder is missing; the JSON is damaged or lacks a key; an id is unknown or appears
            twice; a number is not finite; nothing is left; the classes are not `class_names`.
    """
    path, folder = Path(annotation_file), Path(image_dir)
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}: at least 1 picture; leave it out (null) to take all.")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder that holds the pictures of {path.name}.")
    content = read_coco_json(path)
    _check_class_names(path, content.class_names, class_names)
    index = _build(path, folder, content, keep_empty, limit)
    for i in range(min(_FILES_CHECKED, len(index))):
        if not index.path(i).is_file():
            raise InputError(
                f"image id {index.image_ids[i]!r}: {index.path(i)}: no such file; check image_dir ({folder}) and the "
                f"`file_name` entries of {path.name}."
            )
    logger.info(index.summary())
    return index


def _check_class_names(path: Path, names: tuple[str, ...], expected: Sequence[str] | None) -> None:
    if expected is None or names == tuple(expected):
        return
    pairs = zip(names, expected, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(names), len(expected)))
    raise InputError(
        f"{path} declares {len(names)} classes ({show(names)}), but the detector knows {len(expected)} "
        f"({show(tuple(expected))}); the first difference is class {at}. Give `categories` these names in the order of "
        f"their ids, or train a detector on this data set."
    )


def _build(path: Path, folder: Path, content: CocoFile, keep_empty: bool, limit: int | None) -> CocoIndex:
    images, columns = content.images, content.columns
    sizes = np.array([(image.get("height") or 0, image.get("width") or 0) for image in images], np.int64)
    sizes[(sizes == 0).any(axis=1)] = 0  # one without the other is no size
    boxes, clipped = _clip(columns.xywh, sizes[columns.rows])
    good = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    per_image = np.bincount(columns.rows[good], minlength=len(images))
    chosen = np.flatnonzero(per_image > 0) if not keep_empty else np.arange(len(images))
    chosen = chosen[:limit]
    if not len(chosen):
        raise InputError(f"{path}: no picture has a box; annotate some, or keep pictures without boxes (keep_empty).")
    order = np.argsort(columns.rows, kind="stable")
    order = order[good[order] & np.isin(columns.rows[order], chosen)]
    areas = np.where(np.isnan(columns.areas), columns.xywh[:, 2] * columns.xywh[:, 3], columns.areas)
    crowd = columns.crowd[order]
    counts = {
        "images": len(chosen),
        "boxes": len(order),
        "crowds": int(crowd.sum()),
        "empty": int((per_image == 0).sum()),
        "clipped": int((clipped & good).sum()),
        "dropped": int((~good).sum()),
    }
    return CocoIndex(
        annotation_file=path,
        image_dir=folder,
        image_ids=[images[row]["id"] for row in chosen],
        file_names=[images[row]["file_name"] for row in chosen],
        sizes=sizes[chosen],
        offsets=np.concatenate(([0], np.cumsum(per_image[chosen]))).astype(np.int64),
        boxes=boxes[order],
        labels=columns.labels[order],
        crowd=crowd,
        areas=areas[order].astype(np.float32),
        class_names=content.class_names,
        category_ids=content.category_ids,
        counts=counts,
    )


def _clip(xywh: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (B, 4) float32 xyxy inside their pictures (B, 2), and which of them stuck out, (B,)."""
    boxes = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1)
    limits = np.where(sizes > 0, sizes, np.inf)[:, [1, 0, 1, 0]]
    known = (sizes > 0).all(axis=1, keepdims=True)
    inside = np.where(known, boxes.clip(0, limits), boxes)
    stuck_out = (np.abs(inside - boxes) > _ROUNDING).any(axis=1)
    return inside.astype(np.float32), stuck_out
