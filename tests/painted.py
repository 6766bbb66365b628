"""A predictor that finds painted rectangles by their colour, exactly, without torch or training: an oracle for tests.

Red is a cat, green a dog, blue a bird; the brighter, the surer. What is smaller than `smallest` pixels of the network's
input it does not see, as a network would not.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from detector.data.preprocess import Prepared, Preprocessing
from detector.inference.detections import Found
from detector.inference.predictor import Predictor

NAMES = ("cat", "dog", "bird")


class Painted(Predictor):
    def __init__(self, short_side: int = 64, long_side: int = 96, smallest: int = 1) -> None:
        self.class_names, self.preprocessing, self.smallest = (
            NAMES,
            Preprocessing(short_side=short_side, long_side=long_side),
            smallest,
        )
        self.batches: list[int] = []

    def detect(self, prepared: Prepared, max_proposals: int | None = None) -> list[Found]:
        images, image_sizes = prepared.images, prepared.image_sizes
        assert images.dtype == np.uint8
        self.batches.append(len(images))
        return [self._detect_in(image[:, :h, :w]) for image, (h, w) in zip(images, image_sizes, strict=True)]

    def _detect_in(self, image: np.ndarray) -> Found:
        rows = []
        for label, channel in enumerate(image):
            alone = (channel > 100) & (channel > 2 * np.delete(image, label, axis=0).max(axis=0).astype(int))
            _, parts, stats, _ = cv2.connectedComponentsWithStats(alone.astype(np.uint8))
            for number, (x, y, w, h, _) in enumerate(stats[1:], 1):
                if min(w, h) >= self.smallest:
                    rows.append((x, y, x + w, y + h, channel[parts == number].max() / 255, label))
        rows.sort(key=lambda row: -row[4])
        table = np.array(rows, np.float64).reshape(-1, 6)
        return Found(table[:, :4].astype(np.float32), table[:, 4].astype(np.float32), table[:, 5].astype(np.int64))


def paint(size: tuple[int, int], *objects: tuple[int, int, int, int, int, int]) -> np.ndarray:
    """A black image (height, width) with rectangles (x1, y1, x2, y2, label, brightness)."""
    image = np.zeros((*size, 3), np.uint8)
    for x1, y1, x2, y2, label, brightness in objects:
        image[y1:y2, x1:x2, label] = brightness
    return image


def rows(found: Any) -> list[tuple[Any, ...]]:
    """The detections as sorted (x1, y1, x2, y2, name)."""
    return sorted((*box, name) for box, name in zip(found.boxes.tolist(), found.names, strict=True))
