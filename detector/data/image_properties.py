"""What can be measured on an image without knowing what is on it: light, contrast, sharpness, size."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from detector.data.progress import progress
from detector.errors import InputError

if TYPE_CHECKING:
    from detector.data.index import AnnotationIndex

log = logging.getLogger(__name__)


def image_properties(index: AnnotationIndex, limit: int | None = None) -> dict[Any, dict[str, float]]:
    """Read the images once, with a progress bar: 1.4 ms for one of 320 x 240, in proportion to its pixels.

    Args:
        limit: the first images only; None reads all.

    Returns:
        {image id: what `measure` returns}; without images that cannot be read, which the log names.
    """
    found, unreadable = {}, []
    for i in progress(range(len(index) if limit is None else min(limit, len(index))), "light and sharpness"):
        try:
            found[index.image_ids[i]] = measure(index.read(i))
        except InputError as error:
            unreadable.append(error)
    if unreadable:
        log.warning("%d images cannot be read, and are in no slice by light: %s", len(unreadable), unreadable[0])
    return found


def measure(image: np.ndarray) -> dict[str, float]:
    """Four numbers for an image, uint8 RGB (h, w, 3).

    Returns:
        brightness: mean of the grey image, in [0, 1].
        contrast: its standard deviation, in [0, 0.5].
        sharpness: variance of its Laplacian (Pech-Pacheco et al. 2000), on grey levels 0-255; low means blurred or
            plain. Of images of very different sizes it cannot be compared.
        resolution: square root of the number of pixels.
    """
    import cv2

    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return {
        "brightness": float(grey.mean() / 255),
        "contrast": float(grey.std() / 255),
        "sharpness": float(cv2.Laplacian(grey, cv2.CV_64F).var()),
        "resolution": float(np.sqrt(grey.size)),
    }
