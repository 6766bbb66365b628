"""The data doctor's checks of the picture files: all are decoded, measured, and compared with each other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from detector.apps.doctor.split import ERROR, WARNING, Finding, Split, found
from detector.data.images import read_image
from detector.data.preprocess import resize
from detector.data.progress import progress
from detector.errors import InputError

# Two pictures are alike when at most this many of the 64 bits of their difference hashes differ, and small copies of
# them by at most this many grey levels on average: hashes alone confuse pictures with little in them. Source: ours.
ALIKE_BITS = 8
ALIKE_LEVELS = 6.0
_THUMBNAIL = 16
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True, eq=False)
class Picture:
    """What decoding one file showed.

    Attributes:
        error: why it cannot be decoded; None for a good one, "" for a file that is not there.
        size: height and width as a person sees it, EXIF rotation applied.
        stored: height and width before that.
        orientation: of the EXIF block, 1 to 8; 1 for none.
        digest: of the decoded pixels.
        bits: (64,) bool, the difference hash.
        thumbnail: (16, 16, 3) uint8.
    """

    error: str | None
    size: tuple[int, int] = (0, 0)
    stored: tuple[int, int] = (0, 0)
    orientation: int = 1
    digest: bytes = b""
    bits: np.ndarray | None = None
    thumbnail: np.ndarray | None = None


def look_at(path: Path) -> Picture:
    """Decode a picture and measure it."""
    import cv2

    if not path.is_file():
        return Picture("")
    try:
        image = read_image(path)
    except InputError as error:
        return Picture(str(error))
    orientation = _orientation(path)
    height, width = image.shape[:2]
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    # Whether brightness falls from each of 9 x 8 cells to the next one (Krawetz's dHash).
    cells = resize(grey, 8, 9).astype(np.int16)
    return Picture(
        error=None,
        size=(height, width),
        stored=(width, height) if orientation >= 5 else (height, width),
        orientation=orientation,
        digest=hashlib.blake2b(image.tobytes() + repr(image.shape).encode(), digest_size=16).digest(),
        bits=(cells[:, 1:] > cells[:, :-1]).ravel(),
        thumbnail=resize(image, _THUMBNAIL, _THUMBNAIL),
    )


def look_at_all(splits: Sequence[Split], workers: int = 1) -> dict[str, list[Picture]]:
    """The pictures of each split, in the order of its images; each file is decoded once.

    Args:
        splits: the annotation files.
        workers: threads that decode; decoders leave Python's lock to others.
    """
    paths = list(dict.fromkeys(split.path(row) for split in splits for row in range(len(split.images))))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        pictures = dict(zip(paths, progress(pool.map(look_at, paths), "decode", len(paths)), strict=True))
    return {split.name: [pictures[split.path(row)] for row in range(len(split.images))] for split in splits}


def box_frames(split: Split, pictures: Sequence[Picture]) -> np.ndarray:
    """(M, 2) height and width that the boxes refer to: declared, else as decoded, else 0."""
    decoded = np.array([picture.size for picture in pictures], np.int64).reshape(-1, 2)
    return np.where((split.sizes > 0).all(axis=1, keepdims=True), split.sizes, decoded)


def check_files(splits: Sequence[Split], pictures: dict[str, list[Picture]]) -> list[Finding]:
    missing, unreadable, sizes, rotated = [], [], [], []
    for split in splits:
        for row, (image, picture) in enumerate(zip(split.images, pictures[split.name], strict=True)):
            who = f"{split.name}: image {image['id']!r}, {image['file_name']}"
            declared = tuple(split.sizes[row].tolist())
            if picture.error == "":
                missing.append(who)
            elif picture.error is not None:
                unreadable.append(f"{who}: {picture.error}")
            elif 0 not in declared and declared not in (picture.size, picture.stored):
                sizes.append(f"{who}: declared {_show(declared)}, is {_show(picture.size)}")
            elif picture.orientation != 1 and (0 in declared or declared == picture.stored):
                rotated.append(f"{who}: orientation {picture.orientation}, declared {_show(declared)}")
    return [
        *found(
            "missing_files", ERROR, missing, "pictures that are not there",
            "check the folder (data.train.images, data.val.images) and `file_name`, or remove these images",
        ),
        *found(
            "unreadable_files", ERROR, unreadable, "files that cannot be decoded", "fetch them again, or remove them"
        ),
        *found(
            "size_mismatch", ERROR, sizes,
            "pictures of another size than the annotation file says, so that boxes are in the wrong place",
            "correct `width`, `height` and boxes, or restore the original pictures",
        ),
        *found(
            "exif_orientation", WARNING, rotated,
            "pictures with an EXIF rotation whose declared size does not say that it has been applied: boxes may refer "
            "to the picture before the rotation or after it",
            "look at some with their boxes; then store the pixels upright, without the EXIF entry",
        ),
    ]  # fmt: skip


def check_repeats(splits: Sequence[Split], pictures: dict[str, list[Picture]]) -> list[Finding]:
    """The same or nearly the same picture in more than one split, or more than once in one."""
    names, files, good = [], [], []
    for split in splits:
        listed: set[str] = set()
        for image, picture in zip(split.images, pictures[split.name], strict=True):
            if picture.error is None and image["file_name"] not in listed:  # a file listed twice is another check's
                listed.add(image["file_name"])
                names.append(split.name)
                files.append(f"{split.name}/{image['file_name']}")
                good.append(picture)
    culprits: dict[tuple[bool, bool], list[str]] = {(a, b): [] for a in (False, True) for b in (False, True)}
    for i, j in alike(good):
        exact, across = good[i].digest == good[j].digest, names[i] != names[j]
        culprits[exact, across].append(f"{files[i]} and {files[j]}")
    leak = "take them out of one split: what is trained on must not be scored on"
    once = "keep one of them; frames of one video belong into one split"
    return [
        *found("leak", ERROR, culprits[True, True], "pairs of the same picture in two splits", leak),
        *found("near_leak", WARNING, culprits[False, True], "pairs of nearly the same picture in two splits", leak),
        *found("repeats", WARNING, culprits[True, False], "pairs of the same picture within a split", once),
        *found("near_repeats", WARNING, culprits[False, False], "pairs of nearly the same picture in a split", once),
    ]


def alike(pictures: Sequence[Picture]) -> Iterator[tuple[int, int]]:
    """Pairs i < j of decoded pictures that look the same."""
    if len(pictures) < 2:
        return
    signs = np.stack([picture.bits for picture in pictures if picture.bits is not None]).astype(np.float32) * 2 - 1
    thumbnails = np.stack([picture.thumbnail for picture in pictures if picture.thumbnail is not None])
    for at in range(0, len(signs), 256):
        differ = (64 - signs[at : at + 256] @ signs[at:].T) / 2
        rows, columns = np.nonzero(np.triu(differ <= ALIKE_BITS, 1))
        for i, j in zip((rows + at).tolist(), (columns + at).tolist(), strict=True):
            levels = np.abs(thumbnails[i].astype(np.int16) - thumbnails[j]).mean()
            if levels <= ALIKE_LEVELS:
                yield i, j


def _orientation(path: Path) -> int:
    try:
        with Image.open(path) as image:
            value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # A broken EXIF block must not cost the picture, as in detector.data.images.
        return 1
    return value if value in range(1, 9) else 1


def _show(size: tuple[int, ...]) -> str:
    return "no size" if 0 in size else f"{size[1]} x {size[0]}"
