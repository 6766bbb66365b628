"""Where the splits of a data set lie, and how one of them is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from detector.data.coco import CocoIndex, load_coco
from detector.data.shapes import ensure_shapes
from detector.errors import InputError
from detector.options import Count, Flag, Natural, Options


class GenerateOptions(Options):
    """The embedded data set, drawn at first use; see data/README.md."""

    seed: Natural = 0
    """of the scenes"""
    train: Count = 1200
    """images of the training split"""
    val: Count = 200
    """images of the validation split"""
    size: Count = 256
    """side of an image in pixels"""


class SplitOptions(Options):
    """Where one split lies."""

    annotations: str = Field(coerce_numbers_to_str=True)
    """COCO's JSON, relative to data.root"""
    images: str = Field(default="images", coerce_numbers_to_str=True)
    """folder of the images, relative to data.root"""
    limit: Count | None = None
    """only the first N images; null: all"""


class DataOptions(Options):
    """A data set of two splits."""

    root: str | None = Field(default=None, coerce_numbers_to_str=True)
    """folder of the data set"""
    generate: GenerateOptions | None = None
    """draw the embedded data set there"""
    train: SplitOptions = SplitOptions(annotations="annotations/train.json")
    val: SplitOptions = SplitOptions(annotations="annotations/val.json")
    keep_empty: Flag = True
    """images without objects are training data too"""
    cache: Flag = True
    """keep decoded training images in memory"""
    missing: str | None = None
    """what to say where the annotations are not there"""


def load_split(data: Mapping[str, Any], split: str, class_names: tuple[str, ...] | None = None) -> CocoIndex:
    """The index of one split; makes the embedded data set where it is asked for and missing.

    Args:
        data: the `data` node of a configuration.
        split: "train" or "val".
        class_names: of a checkpoint; the data set's must be the same.
    """
    if not data["root"]:
        raise InputError(
            "data.root is not set: give the folder of your data set, data.root=DIR, holding images/ and "
            "annotations/train.json and annotations/val.json, or use recipe=demo."
        )
    root = Path(str(data["root"]))
    if data["generate"]:
        ensure_shapes(root, **data["generate"])
    annotations, images = root / data[split]["annotations"], root / data[split]["images"]
    if not annotations.is_file() and data["missing"]:
        raise InputError(f"No {annotations} here (looked in '{root.resolve()}'). {data['missing']}")
    return load_coco(
        annotations, images, keep_empty=data["keep_empty"], class_names=class_names, limit=data[split]["limit"]
    )
