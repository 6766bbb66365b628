"""Where the splits of a data set lie, and how one of them is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detector.data.annotations import load_annotations
from detector.data.image_files import ExifBoxes
from detector.data.index import AnnotationIndex
from detector.data.shapes import ShapesOptions, ensure_shapes
from detector.errors import InputError
from detector.options import Count, Flag, Options


class SplitOptions(Options):
    """Where one split lies."""

    annotations: str
    """COCO's JSON, relative to data.root"""
    images: str = "images"
    """folder of the images, relative to data.root"""
    limit: Count | None = None
    """only the first N images; null: all"""


class DataOptions(Options):
    """A data set of two splits."""

    root: str | None = None
    """folder of the data set"""
    generate: ShapesOptions | None = None
    """draw the embedded data set there"""
    train: SplitOptions = SplitOptions(annotations="annotations/train.json")
    val: SplitOptions = SplitOptions(annotations="annotations/val.json")
    exif_boxes: ExifBoxes | None = None
    """frame of the boxes where images have an EXIF rotation: before it, or after it; null: the one that they fit"""
    keep_empty: Flag = True
    """images without objects are training data too; validation always has them"""
    cache: Flag = True
    """keep decoded training images in memory"""
    missing: str | None = None
    """what to say where the annotations are not there"""

    def prepared(self) -> Path:
        """The root, with the embedded data set in it where that is asked for.

        Raises:
            InputError: it is not set.
        """
        if not self.root:
            raise InputError(
                "data.root is not set: give the folder of your data set, data.root=DIR, holding images/ and "
                "annotations/train.json and annotations/val.json, or use recipe=demo."
            )
        root = Path(self.root)
        if self.generate:
            ensure_shapes(root, **self.generate.to_dict())
        return root

    def split(self, name: str) -> SplitOptions:
        """ "train" or "val"."""
        return self.train if name == "train" else self.val

    def files(self, split: str) -> tuple[Path, Path]:
        """Annotation file and image folder of one split."""
        root = self.prepared()
        return root / self.split(split).annotations, root / self.split(split).images


def load_split(
    data: DataOptions | Mapping[str, Any], split: str, class_names: tuple[str, ...] | None = None
) -> AnnotationIndex:
    """The index of one split; makes the embedded data set where it is asked for and missing.

    Args:
        data: what data set; plain values are parsed.
        split: "train" or "val". `keep_empty` leaves images out of the training split only: metrics need all.
        class_names: of a checkpoint; the data set's must be the same.

    Raises:
        InputError: data.root is not set, or as detector.data.annotations.load_annotations.
    """
    options = data if isinstance(data, DataOptions) else DataOptions.parse(data, "data")
    annotations, images = options.files(split)
    if not annotations.is_file() and options.missing:
        root = Path(str(options.root)).resolve()
        raise InputError(f"No {annotations} here (looked in '{root}'). {options.missing}")
    return load_annotations(
        annotations,
        images,
        keep_empty=options.keep_empty or split == "val",
        class_names=class_names,
        limit=options.split(split).limit,
        exif_boxes=options.exif_boxes,
    )
