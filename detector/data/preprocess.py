"""The only resize in the project, and its inverse for boxes. Training, evaluation, prediction and exports call it.

No torch here: an exported detector preprocesses without it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from detector.errors import InputError

# Canvas sizes are multiples of the largest stride, so that every feature map divides evenly.
STRIDE = 32
# ImageNet mean in 0-255, rounded: padding that is (almost) zero after normalisation.
PADDING = (124, 116, 104)


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes network input.

    Attributes:
        short_side: pixels that the shorter side is resized to ...
        long_side: ... unless the longer side would exceed this many.
    """

    short_side: int
    long_side: int

    def __post_init__(self) -> None:
        if not 1 <= self.short_side <= self.long_side:
            raise InputError(
                f"preprocessing: short_side={self.short_side}, long_side={self.long_side}; "
                "both must be positive and short_side at most long_side."
            )

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize; the aspect ratio is kept up to rounding."""
        scale = min(self.short_side / min(height, width), self.long_side / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Resize one uint8 RGB picture (h, w, 3) to this size."""
        return resize(image, *self.target_size(*image.shape[:2]))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 (h, w, 3) to (height, width, 3): area average by a whole number, then bilinear.

    Bilinear alone drops pixels where it shrinks to half or less, and small objects with them. An area average drops
    nothing, but by a fraction it takes OpenCV six times as long (640x480 to 427x320: 1.5 ms, a tenth of a prediction);
    and where more than half of a side is left, every pixel counts in both, and AP is the same to 0.1 points. So: the
    largest whole number that divides both sides first; an average by a fraction only where none comes near enough.
    Source: ours.
    """
    import cv2

    shrinks = image.shape[0] / height, image.shape[1] / width
    whole = next((k for k in range(int(min(shrinks)), 1, -1) if image.shape[0] % k == image.shape[1] % k == 0), 1)
    if whole > 1:
        image = cv2.resize(image, (image.shape[1] // whole, image.shape[0] // whole), interpolation=cv2.INTER_AREA)
    if image.shape[:2] == (height, width):
        return image
    how = cv2.INTER_AREA if max(shrinks) / whole >= 2 else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=how)


def canvas_size(sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The smallest canvas, in multiples of STRIDE, that holds pictures of these (height, width)."""
    height = max(h for h, _ in sizes)
    width = max(w for _, w in sizes)
    return -(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE


def pad(images: list[np.ndarray]) -> np.ndarray:
    """Stack uint8 pictures (h, w, 3) into one canvas (N, 3, H, W), each in the top left corner.

    In memory it is (N, H, W, 3), as pictures are: turning it would take longer than the network's first layer.
    """
    canvas = np.empty((len(images), *canvas_size([image.shape[:2] for image in images]), 3), np.uint8)
    for place, image in zip(canvas, images, strict=True):
        height, width = image.shape[:2]
        place[:height, :width] = image
        place[height:] = PADDING
        place[:height, width:] = PADDING
    return canvas.transpose(0, 3, 1, 2)


def restore_boxes(boxes: np.ndarray, scale: np.ndarray, original_size: tuple[int, int]) -> np.ndarray:
    """Bring boxes (D, 4) from the padded input back to the original picture, clipped to it.

    Args:
        boxes: xyxy in pixels of the padded input.
        scale: input pixels per original pixel, (x, y).
        original_size: height and width of the original picture.

    Returns:
        float32 xyxy in pixels of the original picture.
    """
    height, width = original_size
    restored = boxes.astype(np.float64) / np.tile(scale, 2)
    restored[:, 0::2] = restored[:, 0::2].clip(0, width)
    restored[:, 1::2] = restored[:, 1::2].clip(0, height)
    return restored.astype(np.float32)


def group_by_canvas(sizes: list[tuple[int, int]]) -> list[list[int]]:
    """Indices of pictures (height, width) that fill the same canvas, so that no picture gets a batch mate's padding.

    What lies around a picture changes its features a little (the convolutions see it): with its own canvas, a result
    is the same alone, in any batch, and in any process.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(canvas_size([size]), []).append(index)
    return list(groups.values())
