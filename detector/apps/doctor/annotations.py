"""The data doctor's checks of annotations: the reader's faults, and what it does not judge. No image is opened here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from detector.data.finding import EXAMPLES, WARNING, Finding, Splits, found
from detector.data.preprocess import Preprocessing
from detector.data.rules import RULES

# Pixels of the original image: what sticks out by less is an annotator's hand, not a fault.
TOLERANCE = 1.0
# Pixels of the network input. Nothing is left of such an object at stride 16.
TINY = 2.0


def check_faults(splits: Splits) -> list[Finding]:
    """What the reader of annotation files found, a finding for each of its rules."""
    findings = []
    for name in RULES:
        faults = [(split, fault) for split, index in splits.items() for fault in index.faults if fault.check == name]
        if faults:
            count = sum(fault.count for _, fault in faults)
            files = {split: splits[split].annotation_file.name for split, _ in faults}
            examples = [f"{split}: {files[split]}: {text}" for split, fault in faults for text in fault.examples]
            findings.append(replace(faults[0][1], count=count, examples=tuple(examples[:EXAMPLES])))
    return findings


def check_boxes(splits: Splits, sizes: Mapping[str, np.ndarray], preprocessing: Preprocessing) -> list[Finding]:
    """Boxes outside their image, or too small to learn.

    Args:
        splits: the annotation files.
        sizes: (M, 2) height and width of the images of each split, in the frame of the boxes; 0 where unknown.
        preprocessing: the training input.
    """
    outside: list[str] = []
    tiny: list[str] = []
    for split, index in splits.items():
        size = sizes[split][index.images]
        low, high = index.xywh[:, :2], index.xywh[:, :2] + index.xywh[:, 2:]
        limit = np.where(size > 0, size, np.inf)[:, ::-1]
        inside = np.minimum(high, limit) - np.maximum(low, 0)
        some = (index.xywh[:, 2:] > 0).all(axis=1) & (inside > 0).all(axis=1)
        out = ((low < -TOLERANCE) | (high > limit + TOLERANCE)).any(axis=1)
        small = (inside * input_scales(size, preprocessing) < TINY).any(axis=1) & ~index.crowd
        for culprits, rows in ((outside, out & some), (tiny, small & some)):
            culprits += [
                f"{split}: {index.describe(row)}: {index.xywh[row].tolist()}" for row in np.flatnonzero(rows).tolist()
            ]
    return [
        *found(
            "boxes_outside",
            WARNING,
            outside,
            f"boxes that stick out of their image by more than {TOLERANCE:g} pixel; training clips them",
            "check that boxes are x, y, width, height in pixels of this image, then clip them",
        ),
        *found(
            "tiny_boxes",
            WARNING,
            tiny,
            f"boxes with a side below {TINY:g} pixels at the training input",
            "raise input.short_side and input.long_side, cut the images into tiles, or remove these objects",
        ),
    ]


def input_scales(sizes: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """(B, 1) input pixels per original pixel of images (B, 2), height and width; 1 where the size is unknown."""
    sides = np.where(sizes > 0, sizes, 1)
    scale = np.minimum(preprocessing.short_side / sides.min(axis=1), preprocessing.long_side / sides.max(axis=1))
    return np.where((sizes > 0).all(axis=1), scale, 1.0)[:, None]
