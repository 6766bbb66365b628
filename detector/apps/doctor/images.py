"""The data doctor's checks of the image files: all are decoded, measured, and compared with each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from detector.data.alike import DecodedImage, alike
from detector.data.finding import ERROR, WARNING, Finding, found
from detector.data.index import AnnotationIndex, Splits

# An image whose brightest value (of 255) is below this is nearly black: 12 bits in a 16-bit file reach 16.
DARK = 32


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


def _show(size: tuple[int, ...]) -> str:
    return "no size" if 0 in size else f"{size[1]} x {size[0]}"
