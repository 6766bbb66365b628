"""Where the splits of a data set lie, and how one of them is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detector.data.coco import CocoIndex, load_coco
from detector.data.shapes import ensure_shapes
from detector.errors import InputError


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
