"""The embedded classification data set: crops of the objects that scenes.py draws, a folder for each class.

For pre-training a backbone where ImageNet is not at hand. The scenes have another seed than the embedded detection data
set, so that nothing of its validation split is seen; train and val never share a scene, see shapes.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field
from pydantic.types import Strict

from detector.data import shapes
from detector.data.preprocess import resize
from detector.data.scenes import CLASS_NAMES, Scene
from detector.options import Count, Natural, Options

# Raise it with every change of what is cut out or written: an older data set on disk is then made anew.
VERSION = 1
STAMP = "crops.json"
NOTHING = "nothing"
CLASSES = (*CLASS_NAMES, NOTHING)
# Side of a window by the longer side of the object in it: a backbone for detection should see where an object ends.
CONTEXT = 1.3
_NOTHING_SIDES = (24, 96)  # pixels; larger windows without an object are rare
_TRIES = 12


class CropsOptions(Options):
    """The embedded data set, cut out at first use; see data/README.md."""

    seed: Natural = 1
    """seed of the scenes; another one than the detection data set's"""
    train: Count = 1200
    """scenes of the training split; each has 5 objects on average"""
    val: Count = 200
    """scenes of the validation split"""
    size: Annotated[int, Strict(), Field(ge=32)] = 64
    """side of a crop in pixels"""


class Window(NamedTuple):
    """A square of a scene: class name, left and top edge and side in whole pixels."""

    name: str
    x: int
    y: int
    side: int


def ensure_crops(root: Path, **given: int) -> Path:
    """Make the data set unless it is there already; see `shapes.make_once`.

    Args:
        root: where it belongs; becomes root/{train,val}/CLASS/*.jpg.
        given: `CropsOptions`.

    Returns:
        root.

    Raises:
        InputError: an option is out of range, root cannot be written, or root holds something else.
    """
    options = CropsOptions.parse(given, "data.generate")
    stamp = {"version": VERSION, "scenes": shapes.VERSION} | options.to_dict()
    return shapes.make_once(root, STAMP, stamp, lambda folder: generate(folder, options), "crops")


def generate(folder: Path, options: CropsOptions) -> None:
    """Write the data set into an existing folder."""
    for split, count in zip(shapes.SPLITS, (options.train, options.val), strict=True):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
        for index, scene in shapes.drawn_scenes("crops", split, count, options.seed):
            # The seed of the window without an object; no scene has it.
            for number, window in enumerate(windows(scene, shapes.scene_seed(options.seed, split, index, 1))):
                crop = scene.image[window.y : window.y + window.side, window.x : window.x + window.side]
                data = shapes.jpeg(resize(np.ascontiguousarray(crop), options.size, options.size), scene.jpeg_quality)
                (folder / split / window.name / f"{index:06d}_{number}.jpg").write_bytes(data)


def windows(scene: Scene, seed: np.random.SeedSequence) -> Iterator[Window]:
    """A window around each object, and one without any object where one is found.

    The windows lie inside the image: an object at the border is off their centre, as it is for a detector.
    """
    height, width = scene.image.shape[:2]
    for (x1, y1, x2, y2), label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
        side = min(round(CONTEXT * max(x2 - x1, y2 - y1)), height, width)
        x = min(max(round((x1 + x2 - side) / 2), 0), width - side)
        y = min(max(round((y1 + y2 - side) / 2), 0), height - side)
        yield Window(CLASS_NAMES[label], x, y, side)
    rng = np.random.default_rng(seed)
    for _ in range(_TRIES):
        side = int(rng.integers(*_NOTHING_SIDES, endpoint=True))
        x, y = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        if (scene.owner[y : y + side, x : x + side] < 0).all():
            yield Window(NOTHING, x, y, side)
            return
