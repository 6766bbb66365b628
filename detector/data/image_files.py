"""What the image files of an annotation file say: whether they are there, under which name, and in which frame.

Headers alone are read, by several threads: on a network disk it is the waiting that takes time.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Literal

import numpy as np

from detector.data.boxes import clip_boxes
from detector.data.images import exif_orientation
from detector.data.index import AnnotationIndex
from detector.data.rules import brief, fault

ExifBoxes = Literal["stored", "turned"]
"""Before an EXIF rotation, or after it, as people see the image."""

THREADS = 16  # that open files: on a network disk it is the waiting that takes time
# Boxes that stick out of one frame by more pixels belong to another: annotators' hands are a pixel off.
_HAND = 1.0


def match_files(index: AnnotationIndex, exif_boxes: ExifBoxes | None = None) -> AnnotationIndex:
    """The index with names and sizes as its image files have them; what they contradict is among its faults.

    Names with the folders of another machine (drives, backslashes, absolute paths) are found by what follows them.

    A camera's image may carry an EXIF rotation, and tools disagree on whether boxes, and width and height, refer to the
    image before or after it. A frame that holds boxes which the other cannot is the one. An image whose boxes fit both
    is in the frame that its width and height are those of, where only the rotation gives them; else in the frame of the
    other images, where they agree. Otherwise nobody can tell.

    Args:
        index: what `read_annotations` gave.
        exif_boxes: the frame of all boxes of images with an EXIF rotation; None: the layout's, else as above.
    """
    given = index.file_names
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda name: name_on_disk(index.image_dir, name), given))
        # A file that several names lead to is nobody's, but for the entry that names it.
        names_of = Counter(name for name, own in set(zip(found, given, strict=True)))
        certain = [name if name == own or names_of[name] == 1 else "" for name, own in zip(found, given, strict=True)]
        index = replace(index, file_names=[name or own for name, own in zip(certain, given, strict=True)])
        boxed = [i for i in np.flatnonzero(np.diff(index.offsets)).tolist() if certain[i]]
        headers = dict(zip(boxed, pool.map(lambda i: exif_orientation(index.path(i)), boxed), strict=True))
    index, swapped, unknown = _in_frames(index, headers, exif_boxes or index.frame)
    ids = [f"image id {image_id!r}" for image_id in index.image_ids]
    missing = [i for i, name in enumerate(certain) if not name]
    moved = [i for i, name in enumerate(index.file_names) if name != given[i]]
    faults = [
        *(one for one in index.faults if one.check != "degenerate_boxes"),
        *fault("missing_files", [f"{ids[i]}: {index.path(i)}: no such file" for i in missing]),
        *fault("foreign_names", [f"{ids[i]}: {brief(given[i])} (read as {index.file_names[i]})" for i in moved]),
        *fault("exif_frame", [f"{ids[i]} ({index.file_names[i]})" for i in swapped]),
        *fault("exif_unknown", [f"{ids[i]} ({index.file_names[i]}): its boxes do not tell the frame" for i in unknown]),
        *index.degenerate_boxes(),
    ]
    return replace(index, faults=tuple(faults))


def name_on_disk(folder: Path, name: str) -> str:
    """The name itself where that file exists, or the longest end of a path of another machine that does, or ""."""
    if os.path.isfile(folder / name):
        return name
    path = PureWindowsPath(name)  # which knows both kinds of slashes
    if not path.anchor and "\\" not in name:
        return ""
    parts = path.parts[1:] if path.anchor else path.parts
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if os.path.isfile(folder / end)), "")


def _in_frames(
    index: AnnotationIndex, headers: Mapping[int, tuple[int, tuple[int, int]]], told: ExifBoxes | None
) -> tuple[AnnotationIndex, list[int], list[int]]:
    """The index in the frames of its boxes; images that declare the sides of the other, and those nobody can tell."""
    turned = {i: header for i, header in headers.items() if header[0] != 1}
    fitting = {i: _frames_of_boxes(index, i, *header) for i, header in turned.items()}
    agreed = set().union(*(frames for frames in fitting.values() if len(frames) == 1))
    sizes, upright = index.sizes.copy(), index.upright.copy()
    swapped, unknown = [], []
    for i, (orientation, stored) in turned.items():
        frames = {told} if told else fitting[i] or agreed
        if len(frames) != 1:
            unknown.append(i)
            continue
        upright[i] = frames == {"turned"}
        size = stored[::-1] if upright[i] and orientation >= 5 else stored
        if orientation >= 5 and tuple(sizes[i].tolist()) == size[::-1] != size:
            sizes[i] = size
            swapped.append(i)
    boxes = clip_boxes(index.corners, sizes[index.images])
    return replace(index, sizes=sizes, upright=upright, boxes=boxes), swapped, unknown


def _frames_of_boxes(index: AnnotationIndex, i: int, orientation: int, stored: tuple[int, int]) -> set[ExifBoxes]:
    """The frames that hold boxes of an image which the other cannot; else the one that its sides are declared in."""
    if orientation < 5 or stored[0] == stored[1]:
        return set()  # both frames have the same sides
    ends = index.corners[index.offsets[i] : index.offsets[i + 1], 2:]
    before, after = ((ends <= np.array(size) + _HAND).all(axis=1) for size in (stored[::-1], stored))
    frames: set[ExifBoxes] = set()
    if (before & ~after).any():
        frames.add("stored")
    if (after & ~before).any() or (not frames and tuple(index.sizes[i].tolist()) == stored[::-1]):
        frames.add("turned")
    return frames
