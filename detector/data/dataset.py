"""Annotation index + transform = samples, and the seeding of the workers that draw them."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from detector.data.index import AnnotationIndex
from detector.data.progress import progress
from detector.data.transforms import TrainTransform

logger = logging.getLogger(__name__)

# Per process; loader workers that are forked share it. About 2,300 images of COCO's size, 30,000 of 152 x 152.
CACHE_BYTES = 2 * 1024**3


class DetectionDataset(Dataset[dict[str, Any]]):
    """The images of an index with their objects, transformed: `collate` makes batches of them.

    A sample is a dict: image uint8 RGB (h, w, 3); boxes (G, 4) float32, xyxy in pixels of the image; labels (G,) int64;
    crowd (G,) bool; scale (2,) float64, input pixels per original pixel (x, y); original_size (2,) int64, height and
    width as decoded; image_id as in the annotation file.
    """

    def __init__(self, index: AnnotationIndex, transform: TrainTransform | None, cache: bool = False) -> None:
        """
        Args:
            index: the images and their objects.
            transform: applied to each image each time; None, for evaluation: a sample is image and image_id alone.
            cache: decode the images once, here, and keep them in memory, so that workers forked later share them.
                Up to CACHE_BYTES: what does not fit is decoded each time, as without a cache.

        Raises:
            InputError: with a cache, an image cannot be read; otherwise that comes when the sample is asked for.
        """
        self.index = index
        self.transform = transform
        self._images: list[np.ndarray] = _decode(index) if cache else []

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = self._images[i] if i < len(self._images) else self.index.read(i)
        if self.transform is None:
            return {"image": image, "image_id": self.index.image_ids[i]}
        sample = self.transform(image, *self.index.objects(i))._asdict()
        return sample | {"original_size": np.array(image.shape[:2]), "image_id": self.index.image_ids[i]}


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


def _decode(index: AnnotationIndex) -> list[np.ndarray]:
    """The first images of an index, as many as CACHE_BYTES hold; not writable, because they are used again."""
    images: list[np.ndarray] = []
    used = 0
    for i in progress(range(len(index)), "decode"):
        image = index.read(i)
        if used + image.nbytes > CACHE_BYTES:
            full = f"{len(images)} of {len(index)} images fill {CACHE_BYTES / 1024**3:.1f} GiB"
            logger.warning("cache: %s; the others are decoded each time", full)
            break
        image.setflags(write=False)
        images.append(image)
        used += image.nbytes
    logger.info("cache: %d of %d images, %.0f MiB", len(images), len(index), used / 1024**2)
    return images
