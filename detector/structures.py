"""The types that cross module borders: Batch (tensors, network's frame) and Detections (numpy, user's frame)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


@dataclass(frozen=True)
class Batch:
    """N images padded to one size, and their objects padded to one count G.

    All boxes are xyxy in pixels of the padded input.

    Attributes:
        images: uint8 RGB, (N, 3, H, W); H and W are multiples of the padding stride.
        image_sizes: (N, 2) int64, height and width of the picture inside the padding (top left corner).
        boxes: (N, G, 4) float32.
        labels: (N, G) int64 index into class_names; -1 marks a padded place.
        crowd: (N, G) bool; a crowd region is never matched, and what lies inside it is never background.
        scales: (N, 2) float64, input pixels per original pixel, (x, y).
        original_sizes: (N, 2) int64, height and width of the picture as decoded.
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
        names = ("images", "image_sizes", "boxes", "labels", "crowd", "scales", "original_sizes")
        return Batch(**{name: move(getattr(self, name)) for name in names}, image_ids=self.image_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def __len__(self) -> int:
        return len(self.image_ids)


@dataclass(frozen=True)
class Detections:
    """What was found in one picture, best first.

    Attributes:
        boxes: (D, 4) float32, xyxy in pixels of the original picture, inside it.
        scores: (D,) float32 in [0, 1], descending.
        labels: (D,) int64, index into class_names.
        class_names: the names that labels index.
        image_size: height and width of the original picture.
        path: where the picture came from, or None.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    path: str | None = field(default=None)

    def __post_init__(self) -> None:
        count = len(self.scores)
        if self.boxes.shape != (count, 4) or self.labels.shape != (count,):
            raise ValueError(
                f"Detections: boxes {self.boxes.shape}, scores {self.scores.shape}, labels {self.labels.shape}; "
                f"expected (D, 4), (D,), (D,)"
            )

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        return [self.class_names[label] for label in self.labels]

    def above(self, threshold: float) -> Detections:
        """The detections with score >= threshold."""
        keep = self.scores >= threshold
        return Detections(
            self.boxes[keep], self.scores[keep], self.labels[keep], self.class_names, self.image_size, self.path
        )

    def to_coco(self, image_id: Any, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """COCO's results format: xywh boxes in original pixels.

        Args:
            image_id: the id that the annotation file uses for this picture.
            category_ids: the data set's id of each class; None counts 1, 2, 3 ... in the order of class_names.
        """
        ids = list(category_ids) if category_ids is not None else list(range(1, len(self.class_names) + 1))
        x1, y1, x2, y2 = self.boxes.astype(np.float64).T
        rows = np.stack((x1, y1, x2 - x1, y2 - y1), axis=1)
        return [
            {"image_id": image_id, "category_id": int(ids[label]), "bbox": row.tolist(), "score": float(score)}
            for row, label, score in zip(rows, self.labels, self.scores, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        return {
            "path": self.path,
            "height": self.image_size[0],
            "width": self.image_size[1],
            "boxes": self.boxes.tolist(),
            "scores": self.scores.tolist(),
            "labels": self.labels.tolist(),
            "names": self.names,
        }

    def draw(self, image: Any = None, threshold: float = 0.5) -> Image:
        """A copy of the picture with boxes, names and scores drawn on it.

        Args:
            image: anything that `predict` takes; None reads `path` again.
            threshold: detections below this score are not drawn.

        Raises:
            InputError: no image was given and the detections do not come from a file.
        """
        from detector import visualize

        return visualize.draw_detections(self, image, threshold)
