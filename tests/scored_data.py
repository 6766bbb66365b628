"""A data set on which a detector with random weights scores neither 0 nor 1, so that figures can be compared."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detector.inference.detector import Detector

SIZES = ((48, 64), (64, 48), (64, 96), (40, 100), (80, 60))  # height, width: three canvases at 64 x 96


def write_scored_data(
    root: Path, detector: Detector, sizes: Sequence[tuple[int, int]] = SIZES, empty: Collection[int] = ()
) -> Path:
    """Images of noise whose objects are some of what the detector finds on them, moved a little.

    Args:
        root: gets images/ and annotations/{train,val}.json, the same images in both.
        detector: of three classes or fewer.
        sizes: height and width of each image; its id is 100 minus its place.
        empty: places of images without objects.
    """
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    category_ids = (3, 17, 90)[: len(detector.class_names)]
    images, annotations = [], []
    for place, (height, width) in enumerate(sizes):
        path = root / "images" / f"{place}.png"
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height)).save(path)
        images.append({"id": 100 - place, "file_name": path.name, "width": width, "height": height})
        if place in empty:
            continue
        for found in detector.predict(path, score_threshold=0)[0].to_coco(100 - place, category_ids)[:12:3]:
            annotations.append(_moved(found, rng) | {"id": len(annotations) + 1, "iscrowd": 0})
    categories = [{"id": i, "name": name} for i, name in zip(category_ids, detector.class_names, strict=True)]
    content: dict[str, Any] = {"images": images, "annotations": annotations, "categories": categories}
    for split in ("train", "val"):
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


def _moved(found: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    x, y, width, height = found["bbox"]
    x, y = x + rng.uniform(-0.1, 0.1) * width, y + rng.uniform(-0.1, 0.1) * height
    return {key: found[key] for key in ("image_id", "category_id")} | {
        "bbox": [x, y, width, height],
        "area": width * height,
    }


def renumber_classes(path: Path, ids: dict[int, int]) -> None:
    """Give the categories of a COCO file other ids: another order of the classes."""
    content = json.loads(path.read_text())
    for entries, key in ((content["categories"], "id"), (content["annotations"], "category_id")):
        for entry in entries:
            entry[key] = ids[entry[key]]
    path.write_text(json.dumps(content))


def overrides_of(spec: dict[str, Any]) -> list[str]:
    """The command line that builds a network of this description."""

    def leaves(tree: dict[str, Any], prefix: str) -> list[str]:
        return [
            line
            for key, value in tree.items()
            for line in (leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}={value}"])
        ]

    return leaves(spec, "")
