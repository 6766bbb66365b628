"""Where the splits of a data set lie, and how one of them is loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from detector.data.annotations import read_annotations, usable
from detector.data.coco import beside_its_images, find_file, find_only_file
from detector.data.image_files import ExifBoxes
from detector.data.index import AnnotationIndex
from detector.data.partition import parts
from detector.data.shapes import ShapesOptions, ensure_shapes
from detector.data.voc import has_xml, listed_classes, read_voc
from detector.data.yolo import read_yolo, yaml_of
from detector.errors import InputError
from detector.options import Count, Flag, Natural, Options, Share

log = logging.getLogger(__name__)

Format = Literal["coco", "voc", "yolo"]
_IMAGES = "images"
_JSON = {name: f"annotations/{name}.json" for name in ("train", "val")}


class SplitOptions(Options):
    """Where one split lies."""

    annotations: str
    """COCO's JSON; or VOC's or YOLO's list of images, or a folder of them; relative to data.root"""
    images: str = _IMAGES
    """COCO: folder of the images, relative to data.root; the one called images is looked for elsewhere, too"""
    limit: Count | None = None
    """only the first N images; null: all"""


class DataOptions(Options):
    """A data set of two splits."""

    root: str | None = None
    """folder of the data set"""
    format: Format | None = None
    """its layout; null: found by itself"""
    generate: ShapesOptions | None = None
    """draw the embedded data set there"""
    train: SplitOptions = SplitOptions(annotations=_JSON["train"])
    val: SplitOptions = SplitOptions(annotations=_JSON["val"])
    val_share: Share = 0.2
    """where a folder has no split: the share of its images that validates"""
    split_seed: Natural = 0
    """seed of that draw"""
    difficult: Literal["ignored", "trained"] = "ignored"
    """objects marked `difficult` or `ignore`: neither object nor background for the losses (VOC's rule), or ordinary"""
    exif_boxes: ExifBoxes | None = None
    """frame of the boxes where images have an EXIF rotation: before it, or after it; null: the one that they fit"""
    keep_empty: Flag = True
    """images without objects are training data too; validation always has them"""
    cache: Flag = True
    """keep decoded training images in memory, up to 2 GiB; of several devices each loader process does"""
    missing: str | None = None
    """what to say where the annotations are not there"""

    def prepared(self) -> Path:
        """The root, with the embedded data set in it where that is asked for.

        Raises:
            InputError: it is not set.
        """
        if not self.root:
            raise InputError(
                "data.root is not set: give the folder of your data set, data.root=DIR, in the layout of "
                "COCO (images/, annotations/train.json and val.json), Pascal VOC or YOLO, or use recipe=demo."
            )
        root = Path(self.root)
        if self.generate:
            ensure_shapes(root, **self.generate.to_dict())
        return root

    def split(self, name: str) -> SplitOptions:
        """ "train" or "val"."""
        return self.train if name == "train" else self.val

    def files(self, split: str) -> tuple[Path, Path]:
        """Annotation file and image folder of one split."""
        root = self.prepared()
        return root / self.split(split).annotations, root / self.split(split).images


def load_split(
    data: DataOptions | Mapping[str, Any], split: str, class_names: tuple[str, ...] | None = None
) -> AnnotationIndex:
    """The index of one split, see `load_splits`."""
    return load_splits(data, (split,), class_names)[split]


def load_splits(
    data: DataOptions | Mapping[str, Any],
    names: Sequence[str] = ("train", "val"),
    class_names: tuple[str, ...] | None = None,
) -> dict[str, AnnotationIndex]:
    """Splits to train or to evaluate on; makes the embedded data set where it is asked for and missing.

    Args:
        data: what data set; plain values are parsed.
        names: "train" or "val". `keep_empty` leaves images out of the training split only: metrics need all. Of that
            alone, too, difficult objects become crowd regions, which the losses ignore.
        class_names: of a checkpoint; the data set's must be the same, in any order: labels count in this one.

    Raises:
        InputError: data.root is not set, or as detector.data.annotations.load_annotations.
    """
    options = data if isinstance(data, DataOptions) else DataOptions.parse(data, "data")
    splits = {}
    for name, index in read_splits(options, names, class_names).items():
        keep_empty, limit = options.keep_empty or name == "val", options.split(name).limit
        index = usable(index, keep_empty, class_names, limit, options.exif_boxes)
        if name == "train" and options.difficult == "ignored":
            index = replace(index, crowd=index.crowd | index.difficult)
        splits[name] = index
    return splits


def read_splits(
    options: DataOptions, names: Sequence[str] = ("train", "val"), class_names: Sequence[str] | None = None
) -> dict[str, AnnotationIndex]:
    """Splits with their faults, as `read_annotations` gives them. Of a folder without a split, one is drawn.

    Raises:
        InputError: there is no data set, or what describes it cannot be read.
    """
    splits, layout = _read(options, names, class_names)
    if (whole := splits.get("")) is not None:
        chosen = parts(whole, options.prepared(), options.val_share, options.split_seed)
        splits = {name: whole.select(chosen[name]) for name in names}
        for name in names[1:]:  # the faults of its one file are told once
            splits[name] = replace(splits[name], faults=())
    images = ", ".join(f"{len(index):,} {name}" for name, index in splits.items())
    log.info("%s: %s images, %d classes", layout.upper(), images, len(splits[names[0]].class_names))
    return splits


def read_unsplit(options: DataOptions) -> AnnotationIndex | None:
    """All images of a folder that has no split; None where it has one."""
    return _read(options, tuple(_JSON), None)[0].get("")


def _read(
    options: DataOptions, names: Sequence[str], class_names: Sequence[str] | None
) -> tuple[dict[str, AnnotationIndex], Format]:
    """The splits that are asked for, or, where there are none, all images as ""; and the layout."""
    layout = options.format or find_format(options)
    splits = _read_layout(options, layout, names, class_names)
    if (whole := splits.get("")) is None or not (given := _given(options)):
        return splits, layout
    # One split is given, and the folder has no other: that is what it leaves.
    ((name, own),) = _read_layout(options, layout, tuple(given), class_names).items()
    taken = {own.path(i) for i in range(len(own))}
    rest = whole.select([i for i in range(len(whole)) if whole.path(i) not in taken])
    log.info(
        "%s has no split: %s is what data.%s.annotations leaves",
        options.root,
        "train" if name == "val" else "val",
        name,
    )
    return {one: own if one == name else rest for one in names}, layout


def _read_layout(
    options: DataOptions, layout: Format, names: Sequence[str], class_names: Sequence[str] | None
) -> dict[str, AnnotationIndex]:
    root, given = options.prepared(), _given(options)
    if layout == "voc":
        return read_voc(root, given, names, class_names)
    return read_yolo(root, given, names, options.exif_boxes or "turned") if layout == "yolo" else _coco(options, names)


def find_format(options: DataOptions) -> Format:
    """The layout of a folder, by what lies in it."""
    root = options.prepared()
    for one in (options.train, options.val):
        file = root / one.annotations
        if file.suffix == ".json" and file.is_file() and (root / one.images).is_dir():
            return "coco"
    if any(map(has_xml, (root / "Annotations", root, root / "train"))):
        return "voc"
    own = yaml_of(root)
    if (own and own.stem == "data") or (root / "labels").is_dir():
        return "yolo"
    # A YAML file of another name may be anything's. Labels beside the images and a file of classes are LabelImg's.
    return "yolo" if (own or listed_classes(root)) and not any(find_file(root, name) for name in _JSON) else "coco"


def _coco(options: DataOptions, names: Sequence[str]) -> dict[str, AnnotationIndex]:
    root, files = options.prepared(), _coco_files(options, names)
    absent = [name for name, file in files.items() if not file.is_file()]
    if absent and options.missing:
        where = f"(looked in '{root.resolve()}'{'' if root.is_dir() else ', which is no folder'})"
        raise InputError(f"No {files[absent[0]]} here {where}. {options.missing}")
    return {name: _read_coco(options, name or "train", file) for name, file in files.items()}


def _coco_files(options: DataOptions, names: Sequence[str]) -> dict[str, Path]:
    """The annotation file of each split; of a folder without a split its only one, or that of its train, as ""."""
    root, given = options.prepared(), _given(options)
    # Of both, whichever is asked for: of a folder without a split each has its part.
    files = {name: options.files(name)[0] for name in (names if given else _JSON)}
    absent = [name for name, file in files.items() if name not in given and not file.is_file()]
    found = {name: path for name in _JSON if (path := find_file(root, name))} if absent else {}
    if not found.keys() >= set(absent):
        whole = found.get("train") or (None if found else find_only_file(root))
        if whole and not given:
            return {"": whole}
    return {name: found.get(name, files[name]) if name in absent else files[name] for name in names}


def _read_coco(options: DataOptions, split: str, file: Path) -> AnnotationIndex:
    """A file of annotations, with the folder of its images: the one that was asked for, or else where they are."""
    root, (usual, images) = options.prepared(), options.files(split)
    index = read_annotations(file, images)
    if options.split(split).images == _IMAGES:
        index = beside_its_images(index, root)
    if (file, index.image_dir) != (usual, images):
        shown = [os.path.relpath(path, root) for path in (file, index.image_dir)]
        log.info("%s: the images of %s are in %s", root, *shown)
    return index


def _given(options: DataOptions) -> dict[str, Path]:
    """Lists and folders on the command line instead of those of the layout."""
    names = [name for name, usual in _JSON.items() if options.split(name).annotations != usual]
    return {name: options.files(name)[0] for name in names}
