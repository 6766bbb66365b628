"""The data doctor's checks of the image files: all are decoded, measured, and compared with each other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from detector.data.finding import ERROR, WARNING, Finding, found
from detector.data.images import exif_orientation, read_image
from detector.data.index import AnnotationIndex, Splits
from detector.data.preprocess import resize
from detector.data.progress import progress
from detector.errors import InputError

# Two images are alike when at most this many of the 64 bits of their difference hashes differ, and small copies of
# them by at most this many grey levels on average: hashes alone confuse images with little in them. Chosen by
# this project.
ALIKE_BITS = 8
ALIKE_LEVELS = 6.0
_THUMBNAIL = 16
# An image whose brightest value (of 255) is below this is nearly black: 12 bits in a 16-bit file reach 16.
DARK = 32


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


def box_frames(index: AnnotationIndex, decoded: Sequence[DecodedImage]) -> np.ndarray:
    """(M, 2) height and width that the boxes refer to: declared, else as decoded, else 0."""
    frames = [one.size if upright else one.stored for one, upright in zip(decoded, index.upright, strict=True)]
    sizes = np.array(frames, np.int64).reshape(-1, 2)
    return np.where((index.sizes > 0).all(axis=1, keepdims=True), index.sizes, sizes)


def check_files(splits: Splits, decoded: Mapping[str, Sequence[DecodedImage]]) -> list[Finding]:
    unreadable, sizes, dark = [], [], []
    for split, index in splits.items():
        for i, one in enumerate(decoded[split]):
            who = f"{split}: image {index.image_ids[i]!r}, {index.file_names[i]}"
            declared = tuple(index.sizes[i].tolist())
            if 0 < one.brightest < DARK:  # a frame without any light, all 0, hides no objects
                dark.append(f"{who}: its brightest value is {one.brightest} of 255")
            if one.error:
                unreadable.append(f"{who}: {one.error}")
            elif one.error is None and 0 not in declared and declared not in (one.size, one.stored):
                sizes.append(f"{who}: declared {_show(declared)}, is {_show(one.size)}")
    return [
        *found(
            "unreadable_files", ERROR, unreadable, "files that cannot be decoded", "fetch them again, or remove them"
        ),
        *found(
            "size_mismatch",
            ERROR,
            sizes,
            "images of another size than the annotation file says, so that boxes are in the wrong place",
            "correct `width`, `height` and boxes, or restore the original images",
        ),
        *found(
            "dark_images",
            WARNING,
            dark,
            f"images that are nearly black, without a value of {DARK} or more of 255",
            "spread their values over the full range: 12-bit data in 16-bit files times 16",
        ),
    ]


def check_repeats(splits: Splits, decoded: Mapping[str, Sequence[DecodedImage]]) -> list[Finding]:
    """The same or nearly the same image in more than one split, or more than once in one."""
    good = [
        (split, f"{split}/{name}", one)
        for split, index in splits.items()
        # A file that is listed twice is another check's.
        for name, one in dict(zip(index.file_names, decoded[split], strict=True)).items()
        if one.error is None
    ]
    culprits: dict[str, list[str]] = {"leak": [], "near_leak": [], "repeats": [], "near_repeats": []}
    for i, j in alike([one for _, _, one in good]):
        (split, file, one), (other_split, other_file, other) = good[i], good[j]
        near = "" if one.digest == other.digest else "near_"
        culprits[near + ("repeats" if split == other_split else "leak")].append(f"{file} and {other_file}")
    leak = "take them out of one split: what is trained on must not be scored on"
    once = "keep one of them; frames of one video belong into one split"
    return [
        *found("leak", ERROR, culprits["leak"], "pairs of the same image in two splits", leak),
        *found("near_leak", WARNING, culprits["near_leak"], "pairs of nearly the same image in two splits", leak),
        *found("repeats", WARNING, culprits["repeats"], "pairs of the same image within a split", once),
        *found("near_repeats", WARNING, culprits["near_repeats"], "pairs of nearly the same image in a split", once),
    ]


def alike(decoded: Sequence[DecodedImage]) -> Iterator[tuple[int, int]]:
    """Pairs i < j of decoded images that look the same."""
    if len(decoded) < 2:
        return
    signs = np.stack([one.bits for one in decoded if one.bits is not None]).astype(np.float32) * 2 - 1
    thumbnails = np.stack([one.thumbnail for one in decoded if one.thumbnail is not None])
    for at in range(0, len(signs), 256):
        differ = (64 - signs[at : at + 256] @ signs[at:].T) / 2
        rows, columns = np.nonzero(np.triu(differ <= ALIKE_BITS, 1))
        for i, j in zip((rows + at).tolist(), (columns + at).tolist(), strict=True):
            levels = np.abs(thumbnails[i].astype(np.int16) - thumbnails[j]).mean()
            if levels <= ALIKE_LEVELS:
                yield i, j


def _show(size: tuple[int, ...]) -> str:
    return "no size" if 0 in size else f"{size[1]} x {size[0]}"
