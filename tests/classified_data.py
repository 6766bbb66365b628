"""A small data set of images in class folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cow")


def write_classified_data(
    root: Path, *, train: int = 4, val: int = 3, classes: Sequence[str] = CLASSES, size: tuple[int, int] = (80, 64)
) -> Path:
    """root/{train,val}/CLASS/N.png: coarse noise of width and height `size`, with a tint for each class.

    Each class has `train` images for training. For scoring the first has `val`, and each other one more than the
    class before: so the figures show which class a poor network takes everything for.
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(count + (label if split == "val" else 0)):
                coarse = rng.integers(0, 150, (5, 6, 3), np.uint8)
                coarse[..., label % 3] += 80
                Image.fromarray(coarse).resize(size).save(root / split / name / f"{number}.png")
    return root
