"""What was found, as files: annotated copies, crops, JSON, a table, COCO. Each file is complete or absent, but for the
lines of a camera or a stream, which are there as soon as they are known.

with Results(Places(out, source, ["jsonl"]), predictor.class_names) as results:
    for item, found in predictor.search(source, PredictOptions()):
        results.add(item, found)
"""

from __future__ import annotations

import csv
import errno
import io
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from detector.errors import InputError
from detector.files import UNENCODABLE, check_writable, replacing, shortened, write_json
from detector.inference.detections import ROW_COLUMNS, Detections
from detector.inference.remote import parts_of
from detector.inference.sources import SourceImage, is_live, search_root
from detector.inference.video import read_comment, write_video

log = logging.getLogger(__name__)
# What copies say about who wrote them: a file that does not is not replaced.
MADE_BY = "light-head-detector"
# How the other files of an earlier run begin, which say it by their form: one that begins otherwise is not replaced.
_RECORD = r'\{\s*"path": (null|"([^"\\]|\\.)*"),\s*"frame": [^,]+,\s*"time": [^,]+,\s*"height": '
_BEGINNINGS = {
    "detections.json": rf"\[\s*(\]|{_RECORD})",
    "detections.jsonl": _RECORD,
    "detections.csv": ",".join(ROW_COLUMNS) + r"\r?\n",
    "coco.json": rf'\{{\s*"info": \{{\s*"description": "{MADE_BY}"',
}
_HEAD_BYTES = 65536  # more than a path in JSON takes

# Bytes of a file's name: what file systems allow less a suffix, and for an image less the words that crops add.
_NAME_BYTES, _IMAGE_NAME_BYTES = 240, 200

# Takes an image, what was found in it, where its files go, without a suffix, and its annotated copy if there is one.
Writer: TypeAlias = Callable[[SourceImage, Detections, Path, Path | None], None]
# Takes the folder of results, and the class names.
Opener: TypeAlias = Callable[[Path, tuple[str, ...]], AbstractContextManager[Writer]]


class Results(ExitStack):
    """All that is saved of one run. What cannot be written costs neither other images nor other kinds of results.

    Args:
        places: where, and which kinds.
        class_names: label -> name.
        live: of a camera or a stream: by LIVE_WRITERS.

    Attributes:
        lost: what could not be written, an image or a kind of results, and why.

    Raises:
        InputError: nothing can be written to the folder.
    """

    def __init__(self, places: Places, class_names: tuple[str, ...], live: bool = False) -> None:
        super().__init__()
        self.places, self.lost = places, dict[str, str]()
        self._without = set[Path]()  # copies that could not be written
        kinds = LIVE_WRITERS if live else WRITERS
        check_writable(places.out)
        try:
            self._writers = {name: self._enter(name, kinds[name](places.out, class_names)) for name in places.save}
        except OSError as error:
            self.__exit__(type(error), error, error.__traceback__)
            what = f"Cannot write '{error.filename or places.out}': {error.strerror or error}"
            raise InputError(f"{what}. Choose another out=.") from error

    def add(self, item: SourceImage, found: Detections) -> None:
        """Write what was found in an image."""
        place = self.places(found)
        copy = annotated(place, found) if "images" in self._writers and found.error is None else None
        copy = None if copy in self._without else copy
        for name, write in self._writers.items():
            try:
                write(item, found, place, copy)
            except OSError as error:
                lost = self._lose(str(found.path), error)
                # It may be the video before, which is complete only now.
                if name == "images" and copy is not None and lost == str(found.path):
                    self._without.add(copy)
                    copy = None

    def _enter(self, name: str, opened: AbstractContextManager[Writer]) -> Writer:
        writer = opened.__enter__()

        def close(*problem: Any) -> bool | None:
            try:
                return opened.__exit__(*problem)
            except OSError as error:  # must not reach the other kinds: they would take it for theirs
                self._lose(f"save={name}", error)
                return None

        self.push(close)
        return writer

    def _lose(self, what: str, error: OSError) -> str:
        [what, *_] = getattr(error, "__notes__", [what])
        self.lost.setdefault(what, error.strerror or str(error))
        return what


class Places:
    """Where the files of each image go: a folder's own layout, no name twice, and none of a file that must stay.

    Raises:
        InputError: annotated copies or crops would lie among the images that are searched: the next run would search
            them too.
    """

    def __init__(self, out: Path, source: Any, save: list[str]) -> None:
        self.out, self.roots = out, [root for part in _parts(source) if (root := search_root(part))]
        if {"images", "crops"} & {*save} and out.resolve() in [root.resolve() for root in self.roots]:
            raise InputError(
                f"out={out}: is the folder that is searched, and the next run would search what this one writes there; "
                f"give another folder, out={out / 'predictions'}."
            )
        self.save = save
        self.taken: set[Path] = set()
        self.last: tuple[str | None, Path] = None, out

    def __call__(self, found: Detections) -> Path:
        """Without a suffix; the frames of one video share theirs."""
        if found.frame and found.path == self.last[0]:
            return self.last[1]
        path = Path(str(found.path))
        root = next((root for root in self.roots if _lies_in(path, root)), path.parent)
        inside = path.relative_to(root) if "://" not in str(found.path) else Path(_name_of(str(found.path)))
        name = shortened(inside.stem.replace(":", "_"), _IMAGE_NAME_BYTES)
        inside = inside.with_name(name) if inside.name else Path("source")
        place = next(place for place in _numbered(self.out / inside) if not self._is_taken(place, found))
        self.taken.add(place)
        self.last = found.path, place
        return place

    def _is_taken(self, place: Path, found: Detections) -> bool:
        return place in self.taken or ("images" in self.save and _must_stay(annotated(place, found), found))


def _lies_in(path: Path, root: Path) -> bool:
    """By its name, which may begin with the folder's and lead out of it again."""
    return path.is_relative_to(root) and ".." not in path.relative_to(root).parts


def _parts(source: Any) -> Iterator[Any]:
    if not isinstance(source, (list, tuple)):
        yield source
        return
    for part in source:
        yield from _parts(part)


def _numbered(place: Path) -> Iterator[Path]:
    """street, street_2, street_3 ..."""
    yield place
    yield from (place.with_name(f"{place.name}_{number}") for number in itertools.count(2))


def _must_stay(path: Path, found: Detections) -> bool:
    """Whether a file must not be replaced: it is searched; a camera's copy, which nobody can make again; or somebody
    else's, an original."""
    if not os.path.exists(path):
        return False
    itself = found.path is not None and os.path.exists(found.path) and path.samefile(found.path)
    return itself or is_live(found.path) or not _is_copy(path)


def _is_copy(path: Path) -> bool:
    """Whether an earlier run wrote a file."""
    try:
        if path.suffix == ".mp4":
            return read_comment(path) == MADE_BY
        with path.open("rb") as file:
            return b"tEXtSoftware\0" + MADE_BY.encode() in file.read(256)
    except (InputError, OSError):
        return False


def _own(out: Path, name: str) -> Path:
    """A file of _BEGINNINGS: the first of coco.json, coco_2.json ... that is free, or an earlier run's."""
    first = out / name
    names = (one.with_name(one.name + first.suffix) for one in _numbered(first.with_suffix("")))
    own = next(one for one in names if not one.is_file() or _begins(one, _BEGINNINGS[name]))
    if own != first:
        log.warning("%s: was not written by an earlier run, and stays; this one writes %s", first, own.name)
    return own


def _begins(path: Path, beginning: str) -> bool:
    """Whether a file begins so, or is empty."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    return not head or re.match(beginning.encode(), head) is not None


def _save_png(image: Image.Image, path: Path) -> None:
    about = PngInfo()
    about.add_text("Software", MADE_BY)  # comes before the pixels
    with replacing(path) as part:
        image.save(part, pnginfo=about)


def _name_of(url: str) -> str:
    """A file name for an address."""
    parts = parts_of(url)
    name = parts.path.rstrip("/").rpartition("/")[2] or parts.hostname or ""
    return re.sub(r"[^\w.-]", "_", name).strip(".") or "image"


def annotated(place: Path, found: Detections) -> Path:
    """The annotated copy of an image, or of its video."""
    return place.with_name(place.name + (".png" if found.frame is None else ".mp4"))


@contextmanager
def write_images(out: Path, class_names: tuple[str, ...]) -> Iterator[Writer]:
    """Annotated copies: a .png for each image, an .mp4 for each video."""
    current: dict[Path, Callable[[Any], None]] = {}
    with ExitStack() as video:

        def add(item: SourceImage, found: Detections, place: Path, copy: Path | None) -> None:
            with ExitStack() as before:
                if copy not in current:  # the video before is complete, whatever becomes of this image
                    before.callback(video.pop_all().close)
                    current.clear()
                if copy is None:
                    return
                drawn = found.draw(item.image)
                if found.frame is None:
                    _save_png(drawn, copy)
                    return
                if not current:
                    current[copy] = video.enter_context(_named(found, write_video(copy, item.rate or 25, MADE_BY)))
                current[copy](np.asarray(drawn))

        yield add


@contextmanager
def _named(found: Detections, video: AbstractContextManager[Any]) -> Iterator[Any]:
    """A video whose end may show that it cannot be written, when the next image has its turn: the error names it."""
    try:
        with video as add:
            yield add
    except OSError as error:
        error.add_note(str(found.path))
        raise


@contextmanager
def write_crops(out: Path, class_names: tuple[str, ...]) -> Iterator[Writer]:
    """crops/: a .png of each object, named after its image, its rank and its class."""
    taken: set[Path] = set()

    def is_free(path: Path, found: Detections) -> bool:
        return path not in taken and not _must_stay(path, found)

    def add(item: SourceImage, found: Detections, place: Path, copy: Path | None) -> None:
        frame = "" if found.frame is None else f"_{found.frame:06d}"
        inside = place.relative_to(out)
        crops = found.crop(item.image) if len(found) else []
        for rank, (crop, name) in enumerate(zip(crops, found.names, strict=True)):
            start = f"{inside.name}{frame}_{rank}_"
            word = shortened(re.sub(r"[^\w-]", "_", name), _NAME_BYTES - len(os.fsencode(start)))
            names = _numbered(out / "crops" / inside.parent / (start + word))
            paths = (one.with_name(f"{one.name}.png") for one in names)
            path = next(path for path in paths if is_free(path, found))
            if not is_live(found.path):  # of a camera, which has no end, no crop is replaced anyway
                taken.add(path)
            _save_png(Image.fromarray(crop), path)

    yield add


def _record(found: Detections, copy: Path | None) -> dict[str, Any]:
    return found.to_dict() | {"annotated": copy and str(copy)}


@contextmanager
def write_all(out: Path, class_names: tuple[str, ...]) -> Iterator[Writer]:
    """detections.json: a list with an entry for each image, those that could not be read too."""
    records: list[dict[str, Any]] = []
    path = _own(out, "detections.json")
    yield lambda item, found, place, copy: records.append(_record(found, copy))
    write_json(path, records)


@contextmanager
def _text_file(path: Path, live: bool) -> Iterator[tuple[Callable[[str], None], bool]]:
    """What appends text to a file, complete or absent, and whether there is some already. Live, for what has no end:
    each line can be read as soon as it is known, and a later run adds its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "ab" if live else "wb"  # anew: a run that was killed may have left lines under the same name
    with nullcontext(path) if live else replacing(path) as part, part.open(mode, buffering=0) as file:

        def add(text: str) -> None:
            size, content = os.fstat(file.fileno()).st_size, text.encode(errors=UNENCODABLE)
            try:
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)  # no half line, lest the next one begins in it
                file.seek(size)
                raise

        yield add, file.tell() > 0


@contextmanager
def write_lines(out: Path, class_names: tuple[str, ...], live: bool = False) -> Iterator[Writer]:
    """detections.jsonl: the same, a line for each image; nothing of it is kept in memory."""
    with _text_file(_own(out, "detections.jsonl"), live) as (append, _):
        yield lambda item, found, place, copy: append(
            json.dumps(_record(found, copy), ensure_ascii=False, allow_nan=False) + "\n"
        )


@contextmanager
def write_table(out: Path, class_names: tuple[str, ...], live: bool = False) -> Iterator[Writer]:
    """detections.csv: a line for each object."""
    with _text_file(_own(out, "detections.csv"), live) as (append, begun):

        def lines(rows: Iterable[Iterable[Any]]) -> None:
            text = io.StringIO(newline="")
            csv.writer(text).writerows(rows)
            append(text.getvalue())

        lines([] if begun else [ROW_COLUMNS])
        yield lambda item, found, place, copy: lines(row.values() for row in found.rows())


@contextmanager
def write_coco(out: Path, class_names: tuple[str, ...]) -> Iterator[Writer]:
    """coco.json: a data set of what was found, for labelling tools; its annotations are COCO results too."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    path = _own(out, "coco.json")

    def add(item: SourceImage, found: Detections, place: Path, copy: Path | None) -> None:
        if found.error is not None:
            return
        height, width = found.image_size
        number = len(images) + 1
        images.append({"id": number, "file_name": found.path, "frame": found.frame, "width": width, "height": height})
        for row in found.to_coco(number):
            area = row["bbox"][2] * row["bbox"][3]
            annotations.append({"id": len(annotations) + 1, **row, "area": area, "iscrowd": 0})

    yield add
    categories = [{"id": number, "name": name} for number, name in enumerate(class_names, 1)]
    about = {"info": {"description": MADE_BY}}  # first, where a later run looks for it
    write_json(path, about | {"images": images, "categories": categories, "annotations": annotations})


WRITERS: dict[str, Opener] = {
    "images": write_images,
    "crops": write_crops,
    "json": write_all,
    "jsonl": write_lines,
    "csv": write_table,
    "coco": write_coco,
}
# For a camera or a stream: what can be followed, and takes no more memory the longer it lasts.
LIVE_WRITERS: dict[str, Opener] = {
    "images": write_images,
    "crops": write_crops,
    "jsonl": partial(write_lines, live=True),
    "csv": partial(write_table, live=True),
}
