"""Samples to batches: one canvas for training, one canvas per size for evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from detector.data.preprocess import Prepared, Preprocessing, pad, prepare


@dataclass(frozen=True)
class Batch:
    """N images padded to one size, and their objects padded to one count G.

    All boxes are xyxy in pixels of the padded input.

    Attributes:
        images: uint8 RGB, (N, 3, H, W); H and W are multiples of the padding stride.
        image_sizes: (N, 2) int64, height and width of the image inside the padding (top left corner).
        boxes: (N, G, 4) float32.
        labels: (N, G) int64 index into class_names; -1 marks a padded place.
        crowd: (N, G) bool; a crowd region is never matched, and what lies inside it is never background.
        scales: (N, 2) float64, input pixels per original pixel, (x, y).
        original_sizes: (N, 2) int64, height and width of the image as decoded.
        image_ids: the data set's own ids, for results and for messages.
    """

    images: torch.Tensor
    image_sizes: torch.Tensor
    boxes: torch.Tensor
    labels: torch.Tensor
    crowd: torch.Tensor
    scales: torch.Tensor
    original_sizes: torch.Tensor
    image_ids: tuple[Any, ...]

    def _map(self, move: Any) -> Batch:
        return replace(self, **{name: move(part) for name, part in vars(self).items() if name != "image_ids"})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def __len__(self) -> int:
        return len(self.image_ids)


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Pad the images (top left corner) to one canvas, and their objects to one count G >= 1.

    Padded places have label -1, a box of zeros and no crowd flag.
    """
    count, places = len(samples), max(1, *(len(sample["labels"]) for sample in samples))
    boxes, crowd = torch.zeros(count, places, 4), torch.zeros(count, places, dtype=torch.bool)
    labels = torch.full((count, places), -1)
    for i, sample in enumerate(samples):
        for padded, key in ((boxes, "boxes"), (labels, "labels"), (crowd, "crowd")):
            padded[i, : len(sample["labels"])] = torch.from_numpy(sample[key])
    images = [sample["image"] for sample in samples]
    return Batch(
        images=torch.from_numpy(pad(images)),
        image_sizes=torch.tensor([image.shape[:2] for image in images]),
        boxes=boxes,
        labels=labels,
        crowd=crowd,
        scales=torch.from_numpy(np.stack([sample["scale"] for sample in samples])),
        original_sizes=torch.from_numpy(np.stack([sample["original_size"] for sample in samples])),
        image_ids=tuple(sample["image_id"] for sample in samples),
    )


@dataclass(frozen=True)
class EvaluationBatch:
    """The images of one step of evaluation.

    Attributes:
        prepared: one for each canvas size; `places` count within this batch.
        image_ids: the data set's own ids.
    """

    prepared: list[Prepared]
    image_ids: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, *_: Any, **__: Any) -> EvaluationBatch:
        """Itself: the detector moves what it looks at."""
        return self


def collate_eval(samples: list[dict[str, Any]], preprocessing: Preprocessing) -> EvaluationBatch:
    """Samples without a transform, prepared as prediction prepares them: no image sees a batch mate's padding."""
    prepared = prepare([sample["image"] for sample in samples], preprocessing)
    return EvaluationBatch(prepared, tuple(sample["image_id"] for sample in samples))
