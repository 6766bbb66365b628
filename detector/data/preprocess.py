"""The only resize in the project, and its inverse for boxes. Training, evaluation, prediction and exports call it.

No torch here: an exported detector preprocesses without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator
from pydantic.types import Strict

from detector.options import Options

# Canvas sizes are multiples of the largest stride, so that every feature map divides evenly.
STRIDE = 32
# ImageNet mean in 0-255, rounded: padding that is (almost) zero after normalisation.
PADDING = (124, 116, 104)


LARGEST_SIDE = 2**14  # more would take all memory
Side = Annotated[int, Strict(), Field(ge=1), Field(le=LARGEST_SIDE)]


class Preprocessing(Options):
    """How an image becomes network input."""

    short_side: Side = 800
    """Pixels that the shorter side is resized to (Li et al. 2017, section 4.1) ..."""
    long_side: Side = 1200
    """... unless the longer side would exceed this many."""

    @model_validator(mode="after")
    def _ordered(self) -> Preprocessing:
        if self.short_side > self.long_side:
            raise ValueError(
                f"short_side={self.short_side}, long_side={self.long_side}: short_side must be at most long_side."
            )
        return self

    def target_size(self, height: int, width: int, canvas: tuple[int, int] | None = None) -> tuple[int, int]:
        """Height and width after the resize; the aspect ratio is kept up to rounding.

        Args:
            height, width: of the image.
            canvas: height and width that the result must fit into: what would stick out, as a portrait on a landscape
                canvas, is shrunk further. None: no limit beyond long_side.
        """
        scale = min(self.short_side / min(height, width), self.long_side / max(height, width))
        target = max(1, round(height * scale)), max(1, round(width * scale))
        if canvas is None or (target[0] <= canvas[0] and target[1] <= canvas[1]):
            return target
        scale = min(canvas[0] / height, canvas[1] / width)
        return min(max(1, round(height * scale)), canvas[0]), min(max(1, round(width * scale)), canvas[1])


@dataclass(frozen=True)
class Prepared:
    """N images on one canvas, as a network takes them: what `prepare` makes.

    Attributes:
        images: uint8 RGB (N, 3, H, W), each in the top left corner; in memory (N, H, W, 3), see `pad`.
        image_sizes: (N, 2) int64, height and width inside the padding.
        scales: (N, 2) float64, input pixels per original pixel, (x, y).
        original_sizes: (N, 2) int64, height and width of the original images.
        places: (N,) int64, which of the images given to `prepare` each one is.
    """

    images: np.ndarray
    image_sizes: np.ndarray
    scales: np.ndarray
    original_sizes: np.ndarray
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def __reduce__(self) -> tuple[object, ...]:
        # numpy would turn the images' memory round on the way from a loader's worker.
        rows = np.ascontiguousarray(self.images.transpose(0, 2, 3, 1))
        return _prepared_from_rows, (rows, self.image_sizes, self.scales, self.original_sizes, self.places)


def _prepared_from_rows(rows: np.ndarray, *others: np.ndarray) -> Prepared:
    return Prepared(rows.transpose(0, 3, 1, 2), *others)


def prepare(
    images: Sequence[np.ndarray], preprocessing: Preprocessing, canvas: tuple[int, int] | None = None
) -> list[Prepared]:
    """Resize images, group those that fill the same canvas, and pad each group.

    Args:
        images: uint8 RGB (h, w, 3) each, of any sizes.
        preprocessing: the size to resize to.
        canvas: height and width, multiples of STRIDE, that every image is padded to; None: the smallest that holds it.
    """
    resized = [resize(image, *preprocessing.target_size(*_size(image), canvas)) for image in images]
    groups = group_by_canvas([_size(image) for image in resized]) if canvas is None else [list(range(len(images)))]
    prepared = []
    for group in filter(None, groups):
        sizes, originals = (np.array([_size(of[i]) for i in group], np.int64) for of in (resized, images))
        padded, scales = pad([resized[i] for i in group], canvas), (sizes / originals)[:, ::-1]
        prepared.append(Prepared(padded, sizes, scales, originals, np.array(group, np.int64)))
    return prepared


def _size(image: np.ndarray) -> tuple[int, int]:
    return image.shape[0], image.shape[1]


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 (h, w, 3) to (height, width, 3): area average by a whole number, then bilinear.

    Bilinear alone drops pixels where it shrinks to half or less, and small objects with them. An area average drops
    nothing, but by a fraction it takes OpenCV six times as long (640x480 to 427x320: 1.5 ms, a tenth of a prediction);
    and where more than half of a side is left, every pixel counts in both, and AP is the same to 0.1 points. So: the
    largest whole number that divides both sides first; an average by a fraction only where none comes near enough.
    The rule was chosen by this project.
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
    """The smallest canvas, in multiples of STRIDE, that holds images of these (height, width)."""
    height, width = (-(-max(sides) // STRIDE) * STRIDE for sides in zip(*sizes, strict=True))
    return height, width


def pad(images: Sequence[np.ndarray], canvas: tuple[int, int] | None = None) -> np.ndarray:
    """Stack uint8 images (h, w, 3) on one canvas (N, 3, H, W), each in the top left corner.

    In memory it is (N, H, W, 3), as images are: turning it would take longer than the network's first layer.

    Args:
        canvas: height and width; None: the smallest that holds all of them.
    """
    canvas = canvas or canvas_size([_size(image) for image in images])
    padded = np.empty((len(images), *canvas, 3), np.uint8)
    for place, image in zip(padded, images, strict=True):
        height, width = _size(image)
        place[:height, :width] = image
        place[height:] = PADDING
        place[:height, width:] = PADDING
    return padded.transpose(0, 3, 1, 2)


def restore(boxes: np.ndarray, scale: np.ndarray, original_size: Sequence[int] | np.ndarray) -> np.ndarray:
    """Bring boxes (D, 4) from the padded input back to the original image, clipped to it.

    Args:
        boxes: xyxy in pixels of the padded input.
        scale: (2,), input pixels per original pixel, (x, y).
        original_size: height and width of the original image.

    Returns:
        float32 xyxy in pixels of the original image.
    """
    height, width = original_size
    restored = boxes.astype(np.float64) / np.tile(scale, 2)
    return restored.clip(0, [width, height, width, height]).astype(np.float32)


def group_by_canvas(sizes: list[tuple[int, int]]) -> list[list[int]]:
    """Indices of images (height, width) that fill the same canvas, so that no image gets a batch mate's padding.

    What lies around an image changes its features a little (the convolutions see it): with its own canvas, a result
    is the same alone, in any batch, and in any process.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(canvas_size([size]), []).append(index)
    return list(groups.values())
