"""Write a data set in another layout, or a split of one that has none.

python tools/prepare_data.py convert to=coco source=DIR out=NEW_DIR     or to=voc, to=yolo; from any of the three
python tools/prepare_data.py split val=0.2 source=DIR                   DIR/train.txt and DIR/val.txt, lists of images

A split is drawn by class, with images that look alike on one side, from a seed: the same one that training makes of a
folder without a split. Nothing that is there already is changed. Convert writes the training and the validation split
(drawn where there is none), and copies their images.
"""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from detector.data.convert import check_names, convert
from detector.data.image_files import ExifBoxes, match_files
from detector.data.partition import lists_of, parts
from detector.data.split_checks import check_categories
from detector.data.splits import DataOptions, Format, read_splits, read_unsplit
from detector.errors import InputError
from detector.files import check_writable, replacing
from detector.options import Natural, Options, Share

log = logging.getLogger(__name__)


class PrepareDataOptions(Options):
    """What to write."""

    what: Literal["convert", "split"] = "convert"
    """the word alone will do"""
    source: str
    """folder of the data set"""
    format: Format | None = None
    """its layout, coco, voc or yolo; null: found by itself"""
    to: Format | None = None
    """convert: the layout that is written"""
    out: str | None = None
    """convert: a new folder, or an empty one"""
    val: Share = 0.2
    """share of the images that validates, where there is no split"""
    seed: Natural = 0
    """of the split that is drawn"""
    exif_boxes: ExifBoxes | None = None
    """convert: frame of the boxes where images have an EXIF rotation, turned or stored; null: the one that they fit"""


def prepare_data(options: PrepareDataOptions) -> None:
    """Convert a data set, or split it.

    Raises:
        InputError: an option is missing, the data set has an error, or something would be overwritten.
    """
    data = DataOptions(root=options.source, format=options.format, val_share=options.val, split_seed=options.seed)
    if not Path(options.source).is_dir():
        raise InputError(f"source={options.source}: no such folder.")
    if options.what == "split":
        if ignored := [f"{key}={value}" for key in ("to", "out", "exif_boxes") if (value := getattr(options, key))]:
            raise InputError(f"split writes train.txt and val.txt into source; {', '.join(ignored)} is for convert.")
        return _split(data)
    if options.to is None or options.out is None:
        raise InputError("convert needs to=coco|voc|yolo and out=NEW_DIR.")
    out = Path(options.out).resolve()  # what a link points to
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out={options.out} is not empty; give a new folder.")
    if os.path.ismount(out):  # it cannot be replaced by the folder that is written beside it
        raise InputError(f"out={options.out} is where a disk or a volume begins; give a folder inside it.")
    splits = {name: match_files(index, options.exif_boxes).check() for name, index in read_splits(data).items()}
    check_categories(splits)
    if options.to == "voc":
        for index in splits.values():
            check_names(index.file_names, "convert to=coco or to=yolo")
    check_writable(out.parent)
    with replacing(out) as partial:
        convert(splits, partial, options.to)
    for name, index in splits.items():
        log.info("%s: %d images", name, len(index))
    log.info("%s: look at it with tools/doctor.py data.root=%s", options.out, options.out)


def _split(data: DataOptions) -> None:
    root = Path(str(data.root))
    whole, lists = read_unsplit(data), lists_of(root)
    if there := [path for path in lists.values() if path.exists()]:
        raise InputError(f"{there[0]} exists already, and is left alone; move it away for another split.")
    if whole is None:
        raise InputError(f"{root} has a split for training and validation already; nothing was written.")
    chosen = parts(whole, root, data.val_share, data.split_seed)
    check_names(whole.file_names, "convert to=coco")
    with ExitStack() as both:  # one list alone would be taken for no split
        for name, path in lists.items():
            images = (Path(os.path.relpath(whole.path(i), root)).as_posix() for i in chosen[name])
            partial = both.enter_context(replacing(path))
            partial.write_text("".join(f"./{image}\n" for image in images), encoding="utf-8")
    for name, path in lists.items():
        log.info("%s: %d images", path, len(chosen[name]))
