"""What a source expands to: one thing, or any nesting of lists and generators of things, becomes a flow of images.

"street.jpg", Path("street.jpg")      an image file
"frames/*.jpg", "**/*.png"            the images and videos that match, sorted
"folder"                              its images and videos, with subfolders, sorted; hidden files are left out
"https://host/street.jpg"             downloaded: see detector.inference.remote
b"...", io.BytesIO, open(p, "rb")     the bytes of an image file
PIL image, numpy array, torch tensor  see detector.data.images.read_image
"drive.mp4"                           its frames: see detector.inference.video
"rtsp://camera/1", "rtmp://..."       the frames of a stream, until it ends
"webcam:0", 0                         the frames of a camera, without end
[...], (...), a generator             each of its items, in order; a generator is read as it goes
"""

from __future__ import annotations

import fnmatch
import glob
import io
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detector.data.images import IMAGE_SUFFIXES, is_tensor, list_files, read_image
from detector.errors import InputError
from detector.inference.remote import fetch, parts_of, without_credentials
from detector.inference.video import (
    CAMERA,
    STREAM_SCHEMES,
    VIDEO_SUFFIXES,
    Frame,
    count_frames,
    read_camera,
    read_stream,
    read_video,
)
from detector.options import Count, Flag, Options

log = logging.getLogger(__name__)


class ReadingOptions(Options):
    """How sources are read."""

    every: Count = 1
    """Each n-th frame of a video or stream."""
    max_pixels: Count | None = None
    """Refuse image files that declare more; null: Pillow's limit, 179 million."""
    allow_private: Flag = False
    """Addresses may lead to this machine and the local network."""


@dataclass(frozen=True, eq=False)
class SourceImage:
    """One image of a source, or why there is none.

    Attributes:
        image: uint8 RGB (h, w, 3); (0, 0, 3) where there is an error.
        path: the file, address (without user name and password) or camera; None for what was in memory.
        frame, time, rate: of a video: its number from 0, seconds since the first, and how many are given per second.
        live: of a camera or a stream: it should not wait for others.
        error: why it could not be read.
    """

    image: np.ndarray
    path: str | None = None
    frame: int | None = None
    time: float | None = None
    rate: float | None = None
    live: bool = False
    error: InputError | None = None


def read_images(source: Any, reading: ReadingOptions, bgr: bool = False) -> Iterator[SourceImage]:
    """Every image of a source, one in memory at a time, in order; bgr: arrays and tensors have OpenCV's channel order.

    What cannot be read is a SourceImage with an error, and the rest follows; errors of a generator of the user's pass.
    """
    if is_collection(source):
        for part in source:
            yield from read_images(part, reading, bgr)
        return
    try:
        items = expand(source)
    except InputError as error:
        items = []
        yield _broken(source, error)
    for item in items:
        yield from _read_item(item, reading, bgr)


def is_collection(source: Any) -> bool:
    """Whether a source is a list, a generator or the like, of other sources."""
    single = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image, np.ndarray, Mapping)
    return isinstance(source, Iterable) and not (
        isinstance(source, single) or is_tensor(source) or hasattr(source, "read")
    )


def expand(source: Any) -> list[Any]:
    """The files of a folder or a pattern; anything else is one item.

    Raises:
        InputError: the folder, or what the pattern matches, holds nothing to look at.
    """
    root = search_root(source)
    if root is None:
        return [source]
    return _in_folder(root) if os.path.isdir(source) else _matches(source, root)


def search_root(source: Any) -> Path | None:
    """The folder that a folder or a pattern searches; None for anything else."""
    if not isinstance(source, (str, os.PathLike)) or _scheme(source):
        return None
    if os.path.isdir(source):  # unlike pathlib's, no error for a name that no file can have
        return Path(source)
    if not isinstance(source, str) or not glob.has_magic(source) or os.path.exists(source):
        return None
    parts = Path(source).parts
    return Path(*parts[: next(place for place, part in enumerate(parts) if glob.has_magic(part))])


def leave_out(source: Any, folder: Path) -> Any:
    """A source with its folders and patterns replaced by their files, less those in `folder`: results of earlier runs.

    Only where `folder` is inside of what is searched: who searches `folder` itself wants what is there.

    Raises:
        InputError: there is nothing else.
    """
    if isinstance(source, (list, tuple)):
        return [leave_out(part, folder) for part in source]
    root, results = search_root(source), folder.resolve()
    if root is None:
        return source
    try:
        files = expand(source)
    except InputError:
        return source  # it will be told when it is read
    if root.resolve() not in results.parents:
        return files
    left_out = {parent for parent in {file.parent for file in files} if parent.resolve().is_relative_to(results)}
    kept = [file for file in files if file.parent not in left_out]
    if not kept:
        raise InputError(f"{source}: has images in {folder} only, which is where results go; give another folder.")
    return kept


def count_images(source: Any, every: int = 1) -> int | None:
    """How many images a source will give, if that can be told without reading them; videos may say it roughly."""
    try:
        if not is_collection(source):
            counts = [_count_item(item, every) for item in expand(source)]
        elif isinstance(source, (list, tuple)):
            counts = [count_images(part, every) for part in source]
        else:
            return None
    except InputError:
        return None  # it will be told when it is read
    return sum(count for count in counts if count is not None) if None not in counts else None


def is_live(source: Any) -> bool:
    """Whether a source is a camera or a network stream: it ends when somebody ends it."""
    return _is_camera(source) or _scheme(source) in STREAM_SCHEMES


def is_video(source: Any) -> bool:
    """Whether a source is a file or an address that calls itself a video."""
    if not isinstance(source, (str, os.PathLike)):
        return False
    path = parts_of(str(source)).path if _scheme(source) in ("http", "https") else source
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def source_name(source: Any) -> str | None:
    """What messages and results call a source; None for what is in memory. A password in an address is left out."""
    if isinstance(source, (str, os.PathLike)):
        return without_credentials(source) if isinstance(source, str) else str(source)
    return f"{CAMERA}{source}" if _is_camera(source) else None


def _read_item(item: Any, reading: ReadingOptions, bgr: bool) -> Iterator[SourceImage]:
    name = source_name(item)
    try:
        if is_live(item) or is_video(item):
            for frame in _frames(item, name, reading):
                yield SourceImage(frame.image, name, frame.index, frame.time, frame.rate, live=is_live(item))
        else:
            content = _fetched(item, reading)
            image = read_image(content, bgr=bgr, max_pixels=reading.max_pixels, name=name)
            # Whoever gives arrays one by one may fill the same one again before its batch is looked at.
            yield SourceImage(image.copy() if isinstance(item, np.ndarray) else image, name)
    except InputError as error:
        yield _broken(item, error)


def _frames(item: Any, name: str | None, reading: ReadingOptions) -> Iterator[Frame]:
    if _is_camera(item):
        return read_camera(str(item).removeprefix(CAMERA), every=reading.every)
    if is_live(item):
        return read_stream(str(item), every=reading.every)
    content = _fetched(item, reading)
    return read_video(io.BytesIO(content) if _scheme(item) else content, every=reading.every, name=name)


def _fetched(item: Any, reading: ReadingOptions) -> Any:
    """What an address leads to; anything else itself."""
    scheme = _scheme(item)
    if scheme not in ("", "http", "https"):
        known = ", ".join(("http", "https", *STREAM_SCHEMES))
        raise InputError(
            f"{source_name(item)}: addresses of {scheme} are not read; there is {known}. A file is given by its path."
        )
    return fetch(item, allow_private=reading.allow_private) if scheme else item


def _broken(item: Any, error: InputError) -> SourceImage:
    return SourceImage(np.zeros((0, 0, 3), np.uint8), source_name(item), live=is_live(item), error=error)


def _scheme(item: Any) -> str:
    """The scheme of a string that is an address, in small letters; "" for anything else. A Path is always a file."""
    scheme, separator, _ = item.partition("://") if isinstance(item, str) else ("", "", "")
    return scheme.lower() if separator and scheme.isascii() and scheme.replace("+", "").isalnum() else ""


def _is_camera(item: Any) -> bool:
    if isinstance(item, str):
        return item.startswith(CAMERA)
    return isinstance(item, int) and not isinstance(item, bool)


def _in_folder(folder: Path) -> list[Path]:
    """Its images and videos; what else is there is counted, and said."""
    files = list(list_files(folder))
    kept = sorted(path for path in files if _is_listed(path) and not path.name.startswith("."))
    others = Counter(path.suffix.lower() or "no suffix" for path in set(files) - set(kept))
    what = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
    if not kept:
        there = f"; there is {what}: a file given by its name is read" if what else ""
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"{folder}: no image in this folder; expected files that end in {known}{there}.")
    if others:
        log.info("%s: left out by their names, hidden or no images: %s", folder, what)
    return kept


def _is_listed(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and path.is_file()


def _matches(pattern: str, root: Path) -> list[Path]:
    parts = Path(pattern).parts[len(root.parts) :]
    if "**" in parts:  # glob would follow a link to a folder above without end
        found = [path for path in list_files(root) if _fits(path.parts[len(root.parts) :], parts)]
    else:
        found = [Path(name) for name in glob.iglob(pattern)]
    kept = sorted(filter(_is_listed, found))
    if not kept:
        what = f"{len(found)} matches, none an image or a video" if found else "no such file"
        raise InputError(f"{pattern}: {what}; check the pattern.")
    return kept


def _fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern, as in glob: ** is any number of folders, none hidden."""
    if not path or not pattern:
        return not path and all(part == "**" for part in pattern)
    hidden = path[0].startswith(".") and not pattern[0].startswith(".")
    if pattern[0] == "**":
        return _fits(path, pattern[1:]) or (not hidden and _fits(path[1:], pattern))
    return not hidden and fnmatch.fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:])


def _count_item(item: Any, every: int) -> int | None:
    if is_live(item) or (is_video(item) and _scheme(item)):
        return None
    return count_frames(item, every=every) if is_video(item) else 1
