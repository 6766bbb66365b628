"""Annotation index + transform = samples, and the seeding of the workers that draw them."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from detector.data.index import AnnotationIndex
from detector.data.preprocess import resize
from detector.data.progress import progress
from detector.data.transforms import TrainTransform, View

logger = logging.getLogger(__name__)

# Per process; loader workers that are forked share it. About 2,300 images of COCO's size, 30,000 of 152 x 152.
CACHE_BYTES = 2 * 1024**3
# An image is shrunk before it is augmented where that leaves so many times fewer pixels: less is not worth that two
# resizes blur more than one. Chosen by this project.
_WORTH_SHRINKING = 2


class DetectionDataset(Dataset[dict[str, Any]]):
    """The images of an index with their objects, transformed: `collate` makes batches of them.

    A sample is a dict: image uint8 RGB (h, w, 3); boxes (G, 4) float32, xyxy in pixels of the image; labels (G,) int64;
    crowd (G,) bool; scale (2,) float64, input pixels per original pixel (x, y); original_size (2,) int64, height and
    width of the image as it is stored; image_id as in the annotation file. It is asked for by its number, or by that,
    the size factor of its batch and the epoch: then what is drawn for it depends on seed, rank, epoch and number
    alone, not on what was drawn before, or in which loader process.

    An image that is much larger than any view that the transform can draw is shrunk to that size first, and kept so in
    the cache: changing colours of a photograph of 12 megapixels takes longer than a step of the network.
    """

    def __init__(self, index: AnnotationIndex, transform: TrainTransform | None, cache: bool = False) -> None:
        """
        Args:
            index: the images and their objects.
            transform: applied to each image each time; None, for evaluation: a sample is image and image_id alone.
            cache: decode and shrink the images once, here, and keep them in memory: workers forked later share them.
                Up to CACHE_BYTES: what does not fit is decoded each time, as without a cache.

        Raises:
            InputError: with a cache, an image cannot be read; otherwise that comes when the sample is asked for.
        """
        self.index = index
        self.transform = transform
        self._kept: list[tuple[np.ndarray, tuple[int, int]]] = self._decode() if cache else []

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int | tuple[int, float, int]) -> dict[str, Any]:
        i, factor, epoch = key if isinstance(key, tuple) else (key, 1.0, None)
        if self.transform is None:
            return {"image": self._image(i)[0], "image_id": self.index.image_ids[i]}
        if epoch is not None:
            self.transform.reseed(epoch, i)
        view, size = self._view(i)
        partners = [self._view(j)[0] for j in self.transform.partners(len(self))]
        sample = self.transform(*view, factor, partners)._asdict()
        sample["scale"] = sample["scale"] * _scale(view[0], size)
        return sample | {"original_size": np.array(size), "image_id": self.index.image_ids[i]}

    def _image(self, i: int) -> tuple[np.ndarray, tuple[int, int]]:
        return self._kept[i] if i < len(self._kept) else self._read(i)

    def _view(self, i: int) -> tuple[View, tuple[int, int]]:
        """An image as it is kept with its objects in its pixels; and its own height and width."""
        image, size = self._image(i)
        boxes, labels, crowd = self.index.objects(i)
        return (image, (boxes * np.tile(_scale(image, size), 2)).astype(np.float32), labels, crowd), size

    def _read(self, i: int) -> tuple[np.ndarray, tuple[int, int]]:
        """An image, shrunk where that is worth it; and its own height and width."""
        height, width = self.index.sizes[i].tolist()
        if self.transform is None or not height * width:  # not known before it is decoded
            image = self.index.read(i)
            height, width = image.shape[:2]
            if self.transform is None:
                return image, (height, width)
            target = self.transform.largest_size(height, width)
        else:
            target = self.transform.largest_size(height, width)
            most = min(height // target[0], width // target[1])
            # Whole blocks of pixels only: where the last of a row were parts, boxes would not fit by as much.
            image = self.index.read(i, next((n for n in (8, 4, 2) if n <= most and height % n == width % n == 0), 1))
        if image.shape[0] * image.shape[1] >= _WORTH_SHRINKING * target[0] * target[1]:
            image = resize(image, *target)
        return image, (height, width)

    def _decode(self) -> list[tuple[np.ndarray, tuple[int, int]]]:
        """The first images, as many as CACHE_BYTES hold; not writable, because they are used again."""
        kept: list[tuple[np.ndarray, tuple[int, int]]] = []
        used = 0
        for i in progress(range(len(self)), "decode"):
            image, size = self._read(i)
            if used + image.nbytes > CACHE_BYTES:
                full = f"{len(kept)} of {len(self)} images fill {CACHE_BYTES / 1024**3:.1f} GiB"
                logger.warning("cache: %s; the others are decoded each time", full)
                break
            image.setflags(write=False)
            kept.append((image, size))
            used += image.nbytes
        logger.info("cache: %d of %d images, %.0f MiB", len(kept), len(self), used / 1024**2)
        return kept


def _scale(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels of an image per pixel of its own height and width, (x, y)."""
    return (np.array(image.shape[:2]) / size)[::-1]


def seed_worker(worker_id: int) -> None:
    """`worker_init_fn` of a DataLoader: gives this worker its own draws.

    Without it all workers draw the same, and without persistent workers every epoch as well. torch.initial_seed() is
    another number in each worker, and in each epoch where workers are started anew; the rank is added by `reseed`.
    """
    import cv2

    # One process per core already; and OpenCV's threads do not survive a fork.
    cv2.setNumThreads(0)
    info = torch.utils.data.get_worker_info()
    assert info is not None, "seed_worker runs in a DataLoader's worker"
    dataset: Any = info.dataset
    while not hasattr(dataset, "transform"):  # torch.utils.data.Subset and the like
        dataset = dataset.dataset
    if dataset.transform is not None:
        dataset.transform.reseed(torch.initial_seed())
