"""Images that look the same, or nearly: found by small copies of all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from detector.data.images import exif_orientation, read_image
from detector.data.index import Splits
from detector.data.preprocess import resize
from detector.data.progress import progress
from detector.errors import InputError

# Two images are alike when at most this many of the 64 bits of their difference hashes differ, and small copies of
# them by at most this many grey levels on average: hashes alone confuse images with little in them. Chosen by
# this project.
ALIKE_BITS = 8
ALIKE_LEVELS = 6.0
_THUMBNAIL = 16


class DecodedImage(NamedTuple):
    """What decoding one file showed.

    Attributes:
        error: why it cannot be decoded; None for a good one, "" for a file that is not there.
        size: height and width as a person sees it, EXIF rotation applied.
        stored: height and width before that.
        digest: of the decoded pixels.
        bits: (64,) bool, the difference hash.
        thumbnail: (16, 16, 3) uint8.
        brightest: its largest value, 0 to 255.
    """

    error: str | None
    size: tuple[int, int] = (0, 0)
    stored: tuple[int, int] = (0, 0)
    digest: bytes = b""
    bits: np.ndarray | None = None
    thumbnail: np.ndarray | None = None
    brightest: int = 255


def look_at(path: Path) -> DecodedImage:
    """Decode an image and measure it."""
    import cv2

    if not path.is_file():
        return DecodedImage("")
    try:
        image = read_image(path)
    except InputError as error:
        return DecodedImage(str(error))
    _, stored = exif_orientation(path)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    # Whether brightness falls from each of 9 x 8 cells to the next one (Krawetz's dHash).
    cells = resize(grey, 8, 9).astype(np.int16)
    return DecodedImage(
        error=None,
        size=(image.shape[0], image.shape[1]),
        stored=stored,
        digest=hashlib.blake2b(image.tobytes() + repr(image.shape).encode(), digest_size=16).digest(),
        bits=(cells[:, 1:] > cells[:, :-1]).ravel(),
        thumbnail=resize(image, _THUMBNAIL, _THUMBNAIL),
        brightest=int(image.max()),
    )


def look_at_all(splits: Splits, workers: int = 1) -> dict[str, list[DecodedImage]]:
    """The images of each split, in the order of its images; each file is decoded once.

    Args:
        splits: the annotation files.
        workers: threads that decode; decoders leave Python's lock to others.
    """
    places = {split: [index.path(i) for i in range(len(index))] for split, index in splits.items()}
    paths = list(dict.fromkeys(path for own in places.values() for path in own))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        decoded = dict(zip(paths, progress(pool.map(look_at, paths), "decode", len(paths)), strict=True))
    return {split: [decoded[path] for path in own] for split, own in places.items()}


def alike(decoded: Sequence[DecodedImage]) -> Iterator[tuple[int, int]]:
    """Pairs i < j of decoded images that look the same: as many as tell which belong together, also by way of others.

    Not all pairs: of a thousand frames of one fixed camera there are half a million. The same pixels come first.
    """
    if len(decoded) < 2:
        return
    groups = np.arange(len(decoded))
    first: dict[bytes, int] = {}
    for j, one in enumerate(decoded):
        if (i := first.setdefault(one.digest, j)) != j:
            groups[j] = i
            yield i, j
    signs = np.stack([one.bits for one in decoded if one.bits is not None]).astype(np.float32) * 2 - 1
    thumbnails = np.stack([one.thumbnail for one in decoded if one.thumbnail is not None])
    for i in range(len(decoded)):
        differ = (64 - signs[i + 1 :] @ signs[i]) / 2
        later = i + 1 + np.flatnonzero((differ <= ALIKE_BITS) & (groups[i + 1 :] != groups[i]))
        levels = np.abs(thumbnails[later].astype(np.int16) - thumbnails[i]).mean(axis=(1, 2, 3))
        for j in later[levels <= ALIKE_LEVELS].tolist():
            groups[groups == groups[j]] = groups[i]
            yield i, j
