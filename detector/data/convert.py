"""Data sets written in COCO's, Pascal VOC's or YOLO's layout, as their own readers here read them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from detector.data.images import exif_orientation
from detector.data.index import AnnotationIndex, Splits
from detector.data.progress import progress
from detector.files import write_json

_DECIMALS = 6  # of a pixel: far below what annotators see


class _Item(NamedTuple):
    """An image as it is written: its name, height and width, and the rows of its boxes."""

    image_id: Any
    name: str
    size: tuple[int, int]
    rows: np.ndarray


def convert(splits: Splits, out: Path, layout: str) -> None:
    """Write splits into an empty folder.

    Images are copied; those that EXIF rotates are encoded anew in the frame of their boxes. Names are made unique.

    Args:
        splits: without errors, their files found.
        out: the folder.
        layout: "coco" keeps everything that is read; "voc" makes crowd regions difficult objects; "yolo" has neither,
            and boxes inside their image only: crowd regions, and boxes without area, are left out.

    Raises:
        InputError: an image cannot be read.
    """
    folder, write = {
        "coco": ("images", _write_coco),
        "voc": ("JPEGImages", _write_voc),
        "yolo": ("images/{split}", _write_yolo),
    }[layout]
    taken: set[str] = set()
    for split, index in splits.items():
        target = out / folder.format(split=split)
        items = [_item(index, i, target, taken) for i in progress(range(len(index)), f"copy {split}")]
        write(index, items, out, split)
    names = next(iter(splits.values())).class_names
    if layout == "voc":
        _write_lines(out / "classes.txt", names)
    if layout == "yolo":
        numbered = (f"  {number}: {json.dumps(name)}" for number, name in enumerate(names))  # JSON is YAML
        _write_lines(out / "data.yaml", [*(f"{split}: images/{split}" for split in splits), "names:", *numbered])


def _item(index: AnnotationIndex, i: int, folder: Path, taken: set[str]) -> _Item:
    """Write an image."""
    stem, suffix = os.path.splitext(index.path(i).name)
    # Labels and XML files are named after the stem alone.
    stem = next(one for n in count(1) if (one := stem if n == 1 else f"{stem}_{n}").lower() not in taken)
    taken.add(stem.lower())
    target = folder / f"{stem}{suffix}"
    target.parent.mkdir(parents=True, exist_ok=True)
    orientation, size = exif_orientation(index.path(i))
    if orientation == 1:
        shutil.copyfile(index.path(i), target)
    else:
        image = index.read(i)
        Image.fromarray(image).save(target, quality=95)
        size = (image.shape[0], image.shape[1])
    declared = tuple(index.sizes[i].tolist())
    rows = np.arange(*index.offsets[i : i + 2])
    return _Item(index.image_ids[i], target.name, size if 0 in declared else declared, rows)


def _write_coco(index: AnnotationIndex, items: Sequence[_Item], out: Path, split: str) -> None:
    ids, categories = _integers([item.image_id for item in items]), _integers(index.category_ids)
    content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    content["categories"] = [{"id": i, "name": name} for i, name in zip(categories, index.class_names, strict=True)]
    for number, item in zip(ids, items, strict=True):
        height, width = item.size
        content["images"].append({"id": number, "file_name": item.name, "width": width, "height": height})
        for row in item.rows.tolist():
            one = {"id": row + 1, "image_id": number, "category_id": categories[index.labels[row]]}
            one |= {"bbox": _rounded(index.xywh[row]), "area": _rounded(index.areas[row])}
            marks = {"iscrowd": int(index.crowd[row]), "difficult": int(index.difficult[row] & ~index.crowd[row])}
            content["annotations"].append(one | marks)
    write_json(out / "annotations" / f"{split}.json", content)


def _write_voc(index: AnnotationIndex, items: Sequence[_Item], out: Path, split: str) -> None:
    for item in items:
        size = {"width": item.size[1], "height": item.size[0], "depth": 3}
        lines = ["<annotation>", f"  {_xml({'filename': item.name, 'size': size})}"]
        for row in item.rows:
            x1, y1, x2, y2 = _rounded(index.corners[row] + (1, 1, 0, 0))  # the first pixel is 1
            sides = {"xmin": x1, "ymin": y1, "xmax": x2, "ymax": y2}
            name, difficult = index.class_names[index.labels[row]], int(index.difficult[row])
            lines.append(f"  {_xml({'object': {'name': name, 'difficult': difficult, 'bndbox': sides}})}")
        _write_lines(out / "Annotations" / f"{Path(item.name).stem}.xml", [*lines, "</annotation>"])
    _write_lines(out / "ImageSets" / "Main" / f"{split}.txt", [Path(item.name).stem for item in items])


def _write_yolo(index: AnnotationIndex, items: Sequence[_Item], out: Path, split: str) -> None:
    for item in items:
        sides = np.array([*item.size[::-1]] * 2)
        low, high = np.hsplit(index.corners[item.rows].clip(0, sides) / sides, 2)
        rows = np.column_stack((index.labels[item.rows], (low + high) / 2, high - low))
        rows = rows[(high > low).all(axis=1) & ~index.crowd[item.rows]]
        lines = [f"{label:.0f} {' '.join(f'{share:.8f}' for share in shares)}" for label, *shares in rows.tolist()]
        _write_lines(out / "labels" / split / f"{Path(item.name).stem}.txt", lines)


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
