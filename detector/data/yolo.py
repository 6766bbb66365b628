"""Data sets as YOLO lays them out, turned into the entries of an annotation file in COCO's format.

    FOLDER/data.yaml                names: a list, or {number: name}; path, train, val: folders, lists of images, or
                                    several of them, as Ultralytics reads them
    FOLDER/images/train/a.jpg       or another folder
    FOLDER/labels/train/a.txt       the last `images` of the path is `labels`; without one, beside the image

A line of a label file is a box, "class x y width height" with the centre, or a polygon, "class x1 y1 x2 y2 x3 y3 ...",
in shares of the image's sides, as people see it (data.exif_boxes=stored: before an EXIF rotation). An image without a
file of labels has no objects.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from detector.data.annotations import index_of
from detector.data.coco import WORDS
from detector.data.image_files import THREADS, ExifBoxes, name_on_disk
from detector.data.images import exif_orientation, list_images
from detector.data.index import AnnotationIndex
from detector.data.rules import brief, fault
from detector.data.voc import as_number, listed_classes, read_list
from detector.errors import InputError, require

# Shares may lie outside [0, 1] by rounding; Ultralytics allows as much. What lies further out are pixels.
_ROUNDING = 0.01


def yaml_of(root: Path) -> Path | None:
    """The file that describes a folder: data.yaml, or its only YAML file."""
    known = [path for name in ("data.yaml", "data.yml") if (path := root / name).is_file()]
    others = sorted((*root.glob("*.yaml"), *root.glob("*.yml")))
    return known[0] if known else others[0] if len(others) == 1 else None


def read_yolo(
    root: Path, given: Mapping[str, Path], names: Sequence[str], frame: ExifBoxes = "turned"
) -> dict[str, AnnotationIndex]:
    """Splits of a folder.

    Args:
        root: the folder.
        given: a list or folder of the images of a split, instead of its own.
        names: of the splits that are wanted; where the folder has not all of them, all its images come as "".
        frame: of an image with an EXIF rotation, whose sides boxes are shares of.

    Raises:
        InputError: no file declares the classes, or it cannot be read; a list or a folder of images cannot be read, or
            holds none.
    """
    file = yaml_of(root) or root / "data.yaml"
    described = _read_yaml(file) if file.exists() else {}
    classes = described.get("names", listed_classes(root))
    classes = dict(enumerate(classes)) if isinstance(classes, list) else classes
    if not isinstance(classes, dict) or not classes:
        raise InputError(
            f"{file}: no classes; write a line `names: [cat, dog]` there, the class that labels call 0 first."
        )
    # A `path` of another machine is left alone: the file lies in its folder.
    base = path if (path := root / str(described.get("path") or "")).is_dir() else root
    sources: dict[str, list[Path]] = {}
    for split, words in WORDS.items():
        if key := next((key for key in words if described.get(key)), None):
            sources[split] = _places(base, described[key], f"{file}: `{key}`")
        elif found := [path for key in words if (path := root / "images" / key).is_dir()]:
            sources[split] = found
    if len(sources) < 2:
        sources = {"": sources.get("train") or [root / "images" if (root / "images").is_dir() else root]}
    sources |= {name: [path] for name, path in given.items()}
    wanted = names if sources.keys() >= set(names) else ("",)
    categories = [{"id": number, "name": name} for number, name in classes.items()]
    return {name: _index(root, file, categories, sources[name], frame, "kpt_shape" in described) for name in wanted}


def _index(
    root: Path,
    file: Path,
    categories: list[dict[str, Any]],
    places: Sequence[Path],
    frame: ExifBoxes,
    keypoints: bool,
) -> AnnotationIndex:
    paths = [path for place in places for path in _images(place)]
    if not paths:
        raise InputError(f"{places[0]}: this list of images is empty.")
    base = Path(os.path.commonpath([path.parent for path in paths]))
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = list(pool.map(lambda path: _size(path, frame), paths))
    content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": categories}
    broken: list[str] = []
    wrong: list[str] = []
    for path, (height, width) in zip(paths, sizes, strict=True):
        name, labels = path.relative_to(base).as_posix(), _label_file(path)
        content["images"].append({"id": name, "file_name": name, "width": width or None, "height": height or None})
        shown = os.path.relpath(labels, root)
        try:
            lines = labels.read_text(encoding="utf-8-sig").split("\n") if labels.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            broken.append(f"{shown}: labels cannot be read ({getattr(error, 'strerror', None) or 'no UTF-8'})")
            continue
        if any(lines) and not height and path.is_file():
            broken.append(f"{name}: this image cannot be read, so {shown} has no pixels to be shares of")
            continue
        for number, words in enumerate(map(str.split, lines), 1):
            # Behind a box with keypoints come they.
            read = _read_line(words[:5] if keypoints else words) if words else ""
            if isinstance(read, str):
                wrong += [f"{shown}:{number}: {read}"] if read else []
                continue
            label, (x1, y1, x2, y2) = read[0], (read[1] * (width, height, width, height)).tolist()
            row = {"id": f"{shown}:{number}", "image_id": name, "category_id": label}
            content["annotations"].append(row | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
    index = index_of(file, base, content, [*fault("broken_files", broken), *fault("entries", wrong)])
    return replace(index, frame=frame)


def _read_yaml(path: Path) -> dict[str, Any]:
    yaml = require("yaml", package="[train]", what=str(path))
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not plain YAML ({' '.join(str(error).split())[:300]}); correct it.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: no mapping with a key `names`, but {brief(content)}; see docs/own_data.md.")
    return content


def _places(base: Path, value: Any, what: str) -> list[Path]:
    """Folders and lists of images, relative to `base`."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in values):
        raise InputError(f"{what} is {brief(value)}; give a folder, a list of images (.txt), or several of them.")
    # Roboflow writes ../train/images into FOLDER/data.yaml for FOLDER/train/images.
    places = [path if (path := base / one).exists() else base / one.removeprefix("../") for one in values]
    if absent := [path for path in places if not path.exists()]:
        raise InputError(f"{what} is {brief(value)}, but there is no {absent[0]}; correct the path, or `path`.")
    return places


def _images(place: Path) -> list[Path]:
    if place.is_dir():
        return [Path(os.path.abspath(path)) for path in list_images(place)]
    # Found now, names of another machine too: the labels are found by the image.
    names = (name_on_disk(place.parent, line) or line for _, line in read_list(place))
    return [Path(os.path.abspath(place.parent / name)) for name in names]


def _size(path: Path, frame: ExifBoxes) -> tuple[int, int]:
    """Height and width in a frame; 0 where the image cannot be read."""
    orientation, (height, width) = exif_orientation(path)
    return (width, height) if orientation >= 5 and frame == "turned" else (height, width)


def _label_file(image: Path) -> Path:
    head, images, tail = str(image).rpartition(f"{os.sep}images{os.sep}")
    beside = [image, Path(f"{head}{os.sep}labels{os.sep}{tail}")] if images else [image]
    places = [one.with_suffix(suffix) for one in reversed(beside) for suffix in (".txt", ".TXT")]
    return next((path for path in places if path.exists()), places[0])


def _read_line(words: Sequence[str]) -> tuple[int, np.ndarray] | str:
    """Class and corners, in shares of the image's sides, inside it; a text about what is wrong."""
    count = len(words) - 1
    if count != 4 and (count < 6 or count % 2):
        return f"{1 + count} numbers; a box is `class x y width height`, a polygon `class x1 y1 x2 y2 x3 y3 ...`"
    label, *shares = (as_number(word) for word in words)
    if label is None or not label.is_integer():
        return f"{brief(words[0])} is no class, a whole number"
    for word, share in zip(words[1:], shares, strict=True):
        if share is None or not -_ROUNDING <= share <= 1 + _ROUNDING:
            return f"{brief(word)} is no share of the image's side, a number from 0 to 1"
    points = np.array(shares, np.float64).reshape(-1, 2)
    if count == 4:
        points = points[0] + np.outer((-0.5, 0.5), points[1])
    return int(label), np.concatenate((points.min(axis=0), points.max(axis=0))).clip(0, 1)
