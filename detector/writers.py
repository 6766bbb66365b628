"""What was found, as files: annotated copies, crops, JSON, a table, COCO. Each file is complete or absent.

with WRITERS["jsonl"](out, ["jsonl"], predictor.class_names) as add:
    for picture, found in predictor.search(source, Options()):
        add(picture, found, places(found))
"""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from detector.files import replacing, write_json
from detector.sources import Picture
from detector.structures import ROW_COLUMNS, Detections
from detector.video import write_video

# Takes a picture, what was found in it, and where its files go, without a suffix.
Writer: TypeAlias = Callable[[Picture, Detections, Path], None]


class Places:
    """Where the files of each picture go: a folder's own layout, and no name twice."""

    def __init__(self, out: Path, source: Any) -> None:
        parts = source if isinstance(source, list) else [source]
        self.out, self.roots = out, [root for part in parts if (root := _root(part))]
        self.taken: set[Path] = set()
        self.last: tuple[str | None, Path] = None, out

    def __call__(self, found: Detections) -> Path:
        """Without a suffix; the frames of one video share theirs."""
        if found.frame and found.path == self.last[0]:
            return self.last[1]
        path = Path(str(found.path))
        root = next((root for root in self.roots if path.is_relative_to(root)), path.parent)
        inside = path.relative_to(root) if "://" not in str(found.path) else Path(_name_of(str(found.path)))
        inside = inside.with_name(inside.stem.replace(":", "_")) if inside.name else Path("source")
        place, count = inside, 1
        while place in self.taken:
            count += 1
            place = inside.with_name(f"{inside.name}_{count}")
        self.taken.add(place)
        self.last = found.path, self.out / place
        return self.out / place


def _root(source: str) -> Path | None:
    """The part of a source that its pictures have in common; None for a single file."""
    if Path(source).is_dir():
        return Path(source)
    if "://" in source or not glob.has_magic(source) or Path(source).exists():
        return None
    plain_parts = Path(source).parts
    first = next(i for i, part in enumerate(plain_parts) if glob.has_magic(part))
    return Path(*plain_parts[:first])


def _name_of(url: str) -> str:
    """A file name for an address."""
    parts = urlsplit(url)
    name = parts.path.rstrip("/").rpartition("/")[2] or parts.hostname or ""
    return re.sub(r"[^\w.-]", "_", name).strip(".") or "picture"


def annotated(place: Path, found: Detections) -> Path:
    """The annotated copy of a picture, or of its video."""
    return place.with_name(place.name + (".png" if found.frame is None else ".mp4"))


@contextmanager
def write_images(out: Path, save: list[str], class_names: tuple[str, ...]) -> Iterator[Writer]:
    """Annotated copies: a .png for each picture, an .mp4 for each video."""
    with ExitStack() as stack:
        current: dict[Path, Callable[[Any], None]] = {}

        def add(picture: Picture, found: Detections, place: Path) -> None:
            path = annotated(place, found)
            if found.frame is None or path not in current:
                stack.close()  # the video before is complete
                current.clear()
            if found.error is not None:
                return
            drawn = found.draw(picture.image, threshold=0)
            if found.frame is None:
                with replacing(path) as partial:
                    drawn.save(partial)
                return
            if not current:
                current[path] = stack.enter_context(write_video(path, picture.rate or 25))
            current[path](np.asarray(drawn))

        yield add


@contextmanager
def write_crops(out: Path, save: list[str], class_names: tuple[str, ...]) -> Iterator[Writer]:
    """crops/: a .png of each object, named after its picture, its rank and its class."""

    def add(picture: Picture, found: Detections, place: Path) -> None:
        if not len(found):
            return
        frame = "" if found.frame is None else f"_{found.frame:06d}"
        for rank, (crop, name) in enumerate(zip(found.crop(picture.image), found.names, strict=True)):
            inside = place.relative_to(out)
            word = re.sub(r"[^\w-]", "_", name)
            with replacing(out / "crops" / inside.parent / f"{inside.name}{frame}_{rank}_{word}.png") as partial:
                Image.fromarray(crop).save(partial)

    yield add


def record(found: Detections, place: Path, save: list[str]) -> dict[str, Any]:
    copy = str(annotated(place, found)) if "images" in save and found.error is None else None
    return found.to_dict() | {"annotated": copy}


@contextmanager
def write_all(out: Path, save: list[str], class_names: tuple[str, ...]) -> Iterator[Writer]:
    """detections.json: a list with an entry for each picture, those that could not be read too."""
    records: list[dict[str, Any]] = []
    yield lambda picture, found, place: records.append(record(found, place, save))
    write_json(out / "detections.json", records)


@contextmanager
def write_lines(out: Path, save: list[str], class_names: tuple[str, ...]) -> Iterator[Writer]:
    """detections.jsonl: the same, a line for each picture; nothing of it is kept in memory."""
    with replacing(out / "detections.jsonl") as partial, partial.open("w", encoding="utf-8") as file:

        def add(picture: Picture, found: Detections, place: Path) -> None:
            file.write(json.dumps(record(found, place, save), ensure_ascii=False, allow_nan=False) + "\n")

        yield add


@contextmanager
def write_table(out: Path, save: list[str], class_names: tuple[str, ...]) -> Iterator[Writer]:
    """detections.csv: a line for each object."""
    with replacing(out / "detections.csv") as partial, partial.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ROW_COLUMNS)
        table.writeheader()
        yield lambda picture, found, place: table.writerows(found.rows())


@contextmanager
def write_coco(out: Path, save: list[str], class_names: tuple[str, ...]) -> Iterator[Writer]:
    """coco.json: a data set of what was found, for labelling tools; its annotations are COCO results too."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []

    def add(picture: Picture, found: Detections, place: Path) -> None:
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
    write_json(out / "coco.json", {"images": images, "categories": categories, "annotations": annotations})


WRITERS = {
    "images": write_images,
    "crops": write_crops,
    "json": write_all,
    "jsonl": write_lines,
    "csv": write_table,
    "coco": write_coco,
}
