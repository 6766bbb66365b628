"""Samples to batches: one canvas for training, one canvas per size for evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from detector.preprocess import group_by_canvas, pad
from detector.structures import Batch


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Pad the pictures (top left corner) to one canvas, and their objects to one count G >= 1.

    Padded places have label -1, a box of zeros and no crowd flag.
    """
    count, places = len(samples), max(1, *(len(sample["labels"]) for sample in samples))
    boxes = np.zeros((count, places, 4), np.float32)
    labels = np.full((count, places), -1, np.int64)
    crowd = np.zeros((count, places), bool)
    for i, sample in enumerate(samples):
        objects = len(sample["labels"])
        boxes[i, :objects] = sample["boxes"]
        labels[i, :objects] = sample["labels"]
        crowd[i, :objects] = sample["crowd"]
    images = [sample["image"] for sample in samples]
    return Batch(
        images=torch.from_numpy(pad(images)),
        image_sizes=torch.tensor([image.shape[:2] for image in images], dtype=torch.int64),
        boxes=torch.from_numpy(boxes),
        labels=torch.from_numpy(labels),
        crowd=torch.from_numpy(crowd),
        scales=torch.from_numpy(np.stack([sample["scale"] for sample in samples]).astype(np.float64)),
        original_sizes=torch.from_numpy(np.stack([sample["original_size"] for sample in samples]).astype(np.int64)),
        image_ids=tuple(sample["image_id"] for sample in samples),
    )


def collate_eval(samples: list[dict[str, Any]]) -> list[Batch]:
    """One batch for each canvas size that the pictures have by themselves.

    Padding changes what a convolution sees at the border: so a picture's result never depends on its batch mates. The
    order of the samples is kept within a batch, not between batches; `image_ids` say which is which.
    """
    groups = group_by_canvas([sample["image"].shape[:2] for sample in samples])
    return [collate([samples[i] for i in group]) for group in groups]
