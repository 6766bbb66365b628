"""From anything that shows a picture to results in its pixels, whatever runs the network. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detector.errors import InputError
from detector.images import list_images, read_image
from detector.preprocess import Preprocessing, group_by_canvas, pad, restore_boxes
from detector.structures import Detections

Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes (D, 4), scores (D,), labels (D,), best first


class Predictor(ABC):
    """What predicts: a Detector in torch, or an exported one in another runtime.

    Attributes:
        class_names: label -> name.
        preprocessing: how a picture becomes network input.
    """

    class_names: tuple[str, ...]
    preprocessing: Preprocessing

    @abstractmethod
    def find(self, images: np.ndarray, image_sizes: np.ndarray) -> list[Found]:
        """Run the network.

        Args:
            images: uint8 RGB (N, 3, H, W), padded to one canvas.
            image_sizes: (N, 2), height and width inside the padding.

        Returns:
            Per picture: boxes float32 xyxy in pixels of the padded input, scores, labels.
        """

    def predict(
        self, source: Any, *, score_threshold: float = 0.3, batch_size: int = 8, bgr: bool = False
    ) -> list[Detections]:
        """Find objects in pictures. Always a list, one `Detections` per picture, in the order given.

        Args:
            source: a path, a folder (its pictures, sorted, with subfolders), a PIL image, a numpy array (h, w, 3) in
                RGB, a torch tensor (3, h, w), or a list of any of them.
            score_threshold: detections below are left out; 0 gives all that the network's own threshold leaves.
            batch_size: pictures that go through the network at once. It does not change results.
            bgr: numpy arrays are in OpenCV's channel order.

        Raises:
            InputError: a picture is missing or unreadable; the message names it.
        """
        return list(self.stream(source, score_threshold=score_threshold, batch_size=batch_size, bgr=bgr))

    def stream(
        self, source: Any, *, score_threshold: float = 0.3, batch_size: int = 8, bgr: bool = False
    ) -> Iterator[Detections]:
        """As `predict`, batch by batch: for more pictures than fit in memory."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size={batch_size}; expected a whole number, 1 or more.")
        if not isinstance(score_threshold, int | float) or not 0 <= score_threshold <= 1:
            raise InputError(f"score_threshold={score_threshold}; expected a number from 0 to 1.")
        for chunk in _chunks(expand_sources(source), batch_size):
            images = [read_image(item, bgr=bgr) for item in chunk]
            paths = [str(item) if isinstance(item, str | Path) else None for item in chunk]
            for found in self.predict_images(images, paths):
                yield found.above(score_threshold)

    def predict_images(self, images: Sequence[np.ndarray], paths: Sequence[str | None]) -> list[Detections]:
        """All that the network finds in decoded pictures, uint8 RGB (h, w, 3) each, in one batch per canvas size."""
        resized = [self.preprocessing(image) for image in images]
        results: dict[int, Detections] = {}
        for group in group_by_canvas([image.shape[:2] for image in resized]):
            sizes = np.array([resized[i].shape[:2] for i in group], np.int64)
            found = self.find(pad([resized[i] for i in group]), sizes)
            for i, (boxes, scores, labels) in zip(group, found, strict=True):
                original = images[i].shape[:2]
                scale = input_scale(original, resized[i].shape[:2])
                restored = restore_boxes(boxes, scale, original)
                results[i] = Detections(restored, scores, labels, self.class_names, original, paths[i])
        return [results[i] for i in range(len(images))]


def input_scale(original: tuple[int, ...], resized: tuple[int, ...]) -> np.ndarray:
    """Input pixels per original pixel, (x, y), from (height, width) before and after the resize."""
    return np.array([resized[1] / original[1], resized[0] / original[0]])


def expand_sources(source: Any) -> list[Any]:
    """One item per picture: folders become their pictures, a single thing becomes a list of one."""
    if isinstance(source, str | Path):
        return list(list_images(source)) if Path(source).is_dir() else [source]
    if isinstance(source, list | tuple):
        return [item for part in source for item in expand_sources(part)]
    return [source]


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
