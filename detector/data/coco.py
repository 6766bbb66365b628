"""Where a folder in COCO's format keeps its files: the tools that export it agree on the JSON alone.

FOLDER/annotations/train.json, val.json           images/
FOLDER/annotations/instances_train*.json, ...     train2017/ (COCO), images/, images/train/, images/default/ (CVAT)
FOLDER/train/_annotations.coco.json, valid/...    the images beside it (Roboflow)
FOLDER/result.json                                names as images/a.jpg (Label Studio)
FOLDER/labels.json                                data/ (FiftyOne)
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from detector.data.image_files import name_on_disk
from detector.data.index import AnnotationIndex

# What folders and files of a split are called.
WORDS = {"train": ("train",), "val": ("val", "valid", "validation")}
_SAMPLE = 20  # names that are looked for in each folder


def find_file(root: Path, split: str) -> Path | None:
    """The annotation file of a split, by its name or by that of its folder; None where there is none, or several."""
    for word in WORDS[split]:
        for folder in (root / "annotations", root):
            found = [path for path in _json_in(folder) if path.stem.lower() == word]
            found = found or [path for path in _json_in(folder) if path.stem.lower().startswith(f"instances_{word}")]
            if found:
                return found[0] if len(found) == 1 else None
        if len(alone := _json_in(root / word)) == 1:
            return alone[0]
    return None


def find_only_file(root: Path) -> Path | None:
    """The one annotation file of a folder without a split; None where there is none, or several."""
    found = [*_json_in(root / "annotations"), *_json_in(root)]
    return found[0] if len(found) == 1 else None


def beside_its_images(index: AnnotationIndex, root: Path) -> AnnotationIndex:
    """The index with the folder in which most of its images are, if none of them is in its own."""
    places = np.linspace(0, len(index) - 1, min(_SAMPLE, len(index))).astype(int)
    names = [name for place in places if (name := index.file_names[place])]

    def here(folder: Path) -> int:
        return sum(bool(name_on_disk(folder, name)) for name in names)

    if here(index.image_dir):
        return index
    file = index.annotation_file
    tail = file.stem.removeprefix("instances_")
    folders = [index.image_dir, root / "images" / tail, root / tail, file.parent, root]
    folders += [path for above in (root / "images", root) for path in _folders_in(above)]
    return replace(index, image_dir=max(folders, key=here))  # the first of several


def _json_in(folder: Path) -> list[Path]:
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [folder / name for name in names if name.lower().endswith(".json")]


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
