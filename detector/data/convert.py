"""Data sets written in COCO's, Pascal VOC's or YOLO's layout, as their own readers here read them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from detector.data.images import IMAGE_SUFFIXES, exif_orientation
from detector.data.index import AnnotationIndex, Splits
from detector.data.progress import progress
from detector.errors import InputError
from detector.files import write_json

_DECIMALS = 6  # of a pixel: far below what annotators see
# By Pillow's name of the format; an MPO is a JPEG with more images behind it.
_SUFFIXES = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "PNG": ".png",
    "BMP": ".bmp",
    "GIF": ".gif",
    "TIFF": ".tif",
    "WEBP": ".webp",
}


def check_names(names: Iterable[str], instead: str) -> None:
    """Raises InputError for a file name that a list, which is UTF-8, cannot hold; says what can be done instead."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{name!a}: no UTF-8, as lists are; rename the file, or {instead}.") from error


def convert(splits: Splits, out: Path, layout: str) -> None:
    """Write splits into an empty folder.

    Images are copied; those that EXIF rotates are encoded anew in the frame of their boxes. Names are made unique.

    Args:
        splits: without errors, their files found.
        out: the folder.
        layout: "coco" keeps everything that is read; "voc" makes crowd regions difficult objects; "yolo" has neither,
            and boxes inside their image only: crowd regions, and boxes without area, are left out.

    Raises:
        InputError: an image cannot be read, or has another size than declared.
    """
    folder, write = {
        "coco": ("images", _write_coco),
        "voc": ("JPEGImages", _write_voc),
        "yolo": ("images/{split}", _write_yolo),
    }[layout]
    taken: set[str] = set()
    for split, index in splits.items():
        target = out / folder.format(split=split)
        target.mkdir(parents=True, exist_ok=True)
        copies = [_copy(index, i, target, taken) for i in progress(range(len(index)), f"copy {split}")]
        sizes = np.array([size for _, size in copies])
        write(replace(index, file_names=[name for name, _ in copies], sizes=sizes), out, split)
    names = next(iter(splits.values())).class_names
    if layout == "voc":
        _write_lines(out / "classes.txt", names)
    if layout == "yolo":
        numbered = (f"  {number}: {_quoted(name)}" for number, name in enumerate(names))
        _write_lines(out / "data.yaml", [*(f"{split}: images/{split}" for split in splits), "names:", *numbered])


def _copy(index: AnnotationIndex, i: int, folder: Path, taken: set[str]) -> tuple[str, tuple[int, ...]]:
    """Write an image. Returns its name there, and its height and width."""
    path, (orientation, size) = index.path(i), exif_orientation(index.path(i))
    stem, suffix = path.stem.strip(" .") or "image", path.suffix  # spaces are lost in lists, dots hide a file
    if suffix.lower() not in IMAGE_SUFFIXES:  # a folder's readers would not see it
        suffix = _suffix_of(path)
    # Labels and XML files are named after the stem alone.
    stem = next(one for n in count(1) if (one := stem if n == 1 else f"{stem}_{n}").lower() not in taken)
    taken.add(stem.lower())
    name = f"{stem}{suffix or '.png'}"
    if orientation == 1 and suffix and all(size):
        if index.sizes[i].all() and tuple(index.sizes[i].tolist()) != size:
            (h, w), (height, width) = index.sizes[i].tolist(), size
            raise InputError(
                f"{path}: declared {w} x {h}, is {width} x {height}, so that its boxes are in the wrong place; correct "
                "`width`, `height` and boxes, or restore the original image."
            )
        shutil.copyfile(path, folder / name)
        return name, size
    image = index.read(i)
    Image.fromarray(image).save(folder / name, quality=95)
    return name, image.shape[:2]


def _suffix_of(path: Path) -> str:
    """What an image of this format is called, "" for a format that needs a suffix of its own."""
    try:
        with Image.open(path) as image:
            return _SUFFIXES.get(str(image.format), "")
    except OSError:  # whoever reads the pixels says what is wrong
        return ""


def _quoted(name: str) -> str:
    """A text in YAML."""
    plain = (one if one.isprintable() and one not in '"\\' else f"\\U{ord(one):08x}" for one in name)
    return f'"{"".join(plain)}"'


def _write_coco(index: AnnotationIndex, out: Path, split: str) -> None:
    ids, categories = _integers(index.image_ids), _integers(index.category_ids)
    images = [
        {"id": number, "file_name": name, "width": width, "height": height}
        for number, name, (height, width) in zip(ids, index.file_names, index.sizes.tolist(), strict=True)
    ]
    if index.lvis is not None:  # which classes were looked for, by the numbers that they have in this file
        number_of = dict(zip(index.category_ids, categories, strict=True))
        for image, lists in zip(images, index.lvis, strict=True):
            image |= {
                key: [number_of[one] for one in given if one in number_of]
                for key, given in lists.items()
                if given is not None
            }
    annotations = [
        {
            "id": row + 1,
            "image_id": ids[i],
            "category_id": categories[index.labels[row]],
            "bbox": _rounded(index.xywh[row]),
            "area": _rounded(index.areas[row]),
            "iscrowd": int(index.crowd[row]),
            "difficult": int(index.difficult[row] & ~index.crowd[row]),
        }
        for row, i in enumerate(index.images.tolist())
    ]
    classes: list[dict[str, Any]] = [
        {"id": number, "name": name} for number, name in zip(categories, index.class_names, strict=True)
    ]
    for one, frequency in zip(classes, index.frequencies, strict=False):
        one |= {"frequency": frequency} if frequency else {}
    content = {"images": images, "annotations": annotations, "categories": classes}
    write_json(out / "annotations" / f"{split}.json", content)


def _write_voc(index: AnnotationIndex, out: Path, split: str) -> None:
    for i, name in enumerate(index.file_names):
        height, width = index.sizes[i].tolist()
        lines = ["<annotation>", _xml({"filename": name, "size": {"width": width, "height": height, "depth": 3}})]
        for row in range(*index.offsets[i : i + 2]):
            x1, y1, x2, y2 = _rounded(index.corners[row] + (1, 1, 0, 0))  # the first pixel is 1
            one = {"name": index.class_names[index.labels[row]], "difficult": int(index.difficult[row])}
            lines.append(_xml({"object": one | {"bndbox": {"xmin": x1, "ymin": y1, "xmax": x2, "ymax": y2}}}))
        _write_lines(out / "Annotations" / f"{Path(name).stem}.xml", [*lines, "</annotation>"])
    _write_lines(out / "ImageSets" / "Main" / f"{split}.txt", [Path(name).stem for name in index.file_names])


def _write_yolo(index: AnnotationIndex, out: Path, split: str) -> None:
    sides = index.sizes[index.images][:, [1, 0, 1, 0]]
    low, high = np.hsplit(index.corners.clip(0, sides) / sides, 2)
    boxes = np.column_stack((index.labels, (low + high) / 2, high - low))
    good = (high > low).all(axis=1) & ~index.crowd
    for i, name in enumerate(index.file_names):
        rows = slice(*index.offsets[i : i + 2])
        lines = [
            f"{label:.0f} " + " ".join(f"{x:.8f}" for x in box) for label, *box in boxes[rows][good[rows]].tolist()
        ]
        _write_lines(out / "labels" / split / f"{Path(name).stem}.txt", lines)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _xml(content: Any) -> str:
    """Elements of a mapping, or the text of another value."""
    if not isinstance(content, Mapping):
        return escape(str(content))
    return "".join(f"<{tag}>{_xml(value)}</{tag}>" for tag, value in content.items())


def _rounded(values: np.ndarray) -> Any:
    return np.round(values, _DECIMALS).tolist()


def _integers(ids: Sequence[Any]) -> list[int]:
    """The ids, or their places where one is a text."""
    return list(ids) if all(isinstance(one, int) for one in ids) else list(range(1, len(ids) + 1))
