"""Annotation files in COCO's format: one lenient reader, which gives flat arrays and a list of faults.

What `voc.py` and `yolo.py` find is put into the same terms, and read by the same rules (`index_of`).

Training, evaluation and the data doctor all start here. What is plain is repaired and counted, what is not is left out
and named (`rules.py`); `AnnotationIndex.check` refuses an index that has such faults. With `results.py` the place
where COCO's own ids are read: elsewhere a label is an index into `class_names`.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from detector.data.boxes import clip_boxes, corners
from detector.data.finding import KEPT, Finding
from detector.data.image_files import ExifBoxes, match_files
from detector.data.index import AnnotationIndex, id_order, look_up
from detector.data.json_file import read_json
from detector.data.rules import KEYS, Key, brief, fault, show
from detector.errors import InputError

logger = logging.getLogger(__name__)

_SECTIONS = ("images", "annotations", "categories")
_LVIS_KEYS = ("neg_category_ids", "not_exhaustive_category_ids")
_Row = dict[str, Any]


def load_annotations(
    annotation_file: str | os.PathLike[str],
    image_dir: str | os.PathLike[str],
    *,
    keep_empty: bool = True,
    class_names: Sequence[str] | None = None,
    limit: int | None = None,
    exif_boxes: ExifBoxes | None = None,
) -> AnnotationIndex:
    """Read an annotation file to train or to evaluate on: as `read_annotations`, without errors.

    Args:
        annotation_file: JSON with `images`, `annotations` and `categories`.
        image_dir: the folder that each `file_name` is relative to.
        keep_empty: keep images without a box: what a detector must stay silent on is worth training on.
        class_names: the classes that the file must declare, in any order (those of a checkpoint): labels count them in
            this one; None takes any.
        limit: keep only this many images, the first ones.
        exif_boxes: which frame the boxes of images with an EXIF rotation are in; see `match_files`.

    Raises:
        InputError: a file or folder is missing; the file has an error; nothing is left; the classes are not
            `class_names`.
    """
    path, folder = Path(annotation_file), Path(image_dir)
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}: at least 1 image; leave it out (null) to take all.")
    return usable(read_annotations(path, folder), keep_empty, class_names, limit, exif_boxes)


def usable(
    everything: AnnotationIndex,
    keep_empty: bool,
    class_names: Sequence[str] | None,
    limit: int | None,
    exif_boxes: ExifBoxes | None,
) -> AnnotationIndex:
    """What was read, to train or to evaluate on; arguments and errors as of `load_annotations`."""
    path, folder, index = everything.annotation_file, everything.image_dir, everything
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder that holds the images of {path.name}.")
    if keep_empty and limit is not None:
        index = index.select(np.arange(len(index))[:limit])
    index = match_files(index, exif_boxes).check()
    if class_names is not None:
        _check_class_names(path, index.class_names, class_names)
        index = index.in_order(class_names)
    logger.info(index.summary())
    if not keep_empty:
        index = index.select(np.flatnonzero(~index.empty)[:limit])
        if not len(index):
            raise InputError(f"{path}: no image has a box; annotate some, or keep images without boxes (keep_empty).")
    if len(index) < len(everything):
        logger.info("%s: %d of %d images are used", path.name, len(index), len(everything))
    return index


def read_annotations(
    source: str | os.PathLike[str] | Mapping[str, Any], image_dir: str | os.PathLike[str] | None = None
) -> AnnotationIndex:
    """Read whatever can be read of an annotation file; what cannot is in `faults`, and raises nothing.

    `area`, `iscrowd`, `difficult`, `ignore`, `width` and `height` may be absent or null. Segmentations are ignored. The
    order of annotations, gaps between ids and annotation ids do not matter. Of entries with one id, the first counts.

    Args:
        source: a JSON file, or its content.
        image_dir: the folder of the images; None where none will be read, and then names of files may be absent.
    """
    path = Path("annotations in memory") if isinstance(source, Mapping) else Path(source)
    reader = _Reader(path, image_dir)
    content = source
    try:
        if not isinstance(source, Mapping):
            content = read_json(path, "annotation file", _without_segmentation)
    except InputError as error:
        reader.report("file", [str(error).removeprefix(f"{path}: ").removesuffix(".")])
    return reader.read(content)


def index_of(file: Path, folder: Path, content: Mapping[str, Any], faults: Sequence[Finding]) -> AnnotationIndex:
    """As `read_annotations`, of a split of another format.

    Args:
        file: where it came from, for messages.
        folder: of the images.
        content: in COCO's terms; the id of an annotation says where it is written.
        faults: what could not be put into these terms.
    """
    reader = _Reader(file, folder)
    reader.faults += faults
    return reader.read(content)


def _check_class_names(path: Path, names: Sequence[str], expected: Sequence[str]) -> None:
    if sorted(names) != sorted(expected):
        sides = {"data set": set(names) - set(expected), "detector": set(expected) - set(names)}
        more = " and ".join(f"only the {side} has {show(sorted(own))}" for side, own in sides.items() if own)
        raise InputError(
            f"{path} declares {len(names)} classes ({show(names)}), but the detector knows {len(expected)} "
            f"({show(tuple(expected))}); {more}. Give `categories` these names, in any order, or train a detector on "
            "this data set."
        )


def _without_segmentation(item: _Row) -> _Row:
    # Most of a COCO file, and never used: dropped while parsing, or it takes gigabytes.
    item.pop("segmentation", None)
    return item


class _Reader:
    """Reads one file, and collects its faults."""

    def __init__(self, path: Path, image_dir: str | os.PathLike[str] | None) -> None:
        self.path, self.has_images = path, image_dir is not None
        self.folder = Path(image_dir) if image_dir is not None else Path()
        self.faults: list[Finding] = []

    def report(self, rule: str, texts: Sequence[str], count: int | None = None) -> None:
        self.faults += fault(rule, texts, count)

    def read(self, content: Any) -> AnnotationIndex:
        sections = self._sections(content)
        images, annotations, categories = (self._columns(name, sections[name]) for name in _SECTIONS)
        if not self.faults and not categories["id"]:
            self.report("no_categories", ["`categories` is empty"])
        self._repeats("category_ids", "category id", categories["id"])
        self._repeats("category_names", "category name", categories["name"])
        self._repeats("image_ids", "image id", images["id"])
        self._repeats("file_names", "file", images["file_name"] if self.has_images else [])
        self._repeats("annotation_ids", "annotation id", [a["id"] for a in sections["annotations"] if "id" in a])
        classes = _first_of_each(categories["id"])
        category_ids = sorted(classes, key=id_order)
        frequencies = [categories["entry"][classes[number]].get("frequency") for number in category_ids]
        places = self._look_up("image_id", annotations, _first_of_each(images["id"]), "images")
        numbers = {number: label for label, number in enumerate(category_ids)}
        labels = self._look_up("category_id", annotations, numbers, "categories")
        order = np.argsort(places, kind="stable")
        order = order[(places[order] >= 0) & (labels[order] >= 0)]
        xywh = np.array(annotations["bbox"], np.float64).reshape(-1, 4)[order]
        areas = np.array(annotations["area"], np.float64)[order]  # None becomes NaN
        box_areas = xywh[:, 2] * xywh[:, 3]
        # Masks that are drawn on pixels may be a little larger than the box around their outline.
        odd = np.flatnonzero((box_areas > 0) & ((areas <= 0) | (areas > 1.1 * box_areas + 2)))
        what = (f"{annotations['entry'][order[i]].get('id')}: {areas[i]:g} in a box of {box_areas[i]:g}" for i in odd)
        self.report("areas", [f"annotation id {text}" for text in what])
        crowd, difficult, ignored = (
            np.array([bool(flag) for flag in annotations[name]], bool)[order]
            for name in ("iscrowd", "difficult", "ignore")
        )
        sizes = np.array([[h or 0, w or 0] for h, w in zip(images["height"], images["width"], strict=True)], np.int64)
        sizes = sizes.reshape(-1, 2)
        sizes[(sizes == 0).any(axis=1)] = 0  # one without the other is no size
        lvis = [{key: entry.get(key) for key in _LVIS_KEYS} for entry in images["entry"]]
        index = AnnotationIndex(
            annotation_file=self.path,
            image_dir=self.folder,
            image_ids=images["id"],
            file_names=[name or "" for name in images["file_name"]],
            sizes=sizes,
            offsets=np.searchsorted(places[order], np.arange(len(sizes) + 1)),
            xywh=xywh,
            upright=np.ones(len(sizes), bool),
            boxes=clip_boxes(corners(xywh), sizes[places[order]]),
            labels=labels[order],
            crowd=crowd,
            difficult=crowd | difficult | ignored,
            areas=np.where(np.isnan(areas), box_areas, areas),
            class_names=tuple(categories["name"][classes[number]] for number in category_ids),
            category_ids=tuple(category_ids),
            annotation_ids=_ids([annotations["entry"][i].get("id") for i in order]),
            lvis=lvis if any(value is not None for entry in lvis for value in entry.values()) else None,
            frequencies=tuple(word if word in ("r", "c", "f") else None for word in frequencies),
        )
        return replace(index, faults=(*self.faults, *index.degenerate_boxes()))

    def _sections(self, content: Any) -> dict[str, list[_Row]]:
        """The entries of each section; none where the file cannot be used at all."""
        if any(one.check == "file" for one in self.faults):
            return {name: [] for name in _SECTIONS}
        if not isinstance(content, Mapping):
            why = (
                f"holds a JSON {type(content).__name__}, not an object with `images`, `annotations` and `categories`; "
                f"a results file is not an annotation file"
            )
        elif lacking := [name for name in _SECTIONS if not isinstance(content.get(name), list)]:
            why = (
                f"no list under the key `{'`, `'.join(lacking)}`; a COCO annotation file has `images`, `annotations` "
                f"and `categories` (add an empty `annotations` list if nothing is annotated)"
            )
        elif not content["images"]:
            why = "`images` is empty; list at least one image"
        else:
            return {name: self._objects(name, content[name]) for name in _SECTIONS}
        self.report("file", [why])
        return {name: [] for name in _SECTIONS}

    def _objects(self, section: str, items: list[Any]) -> list[_Row]:
        others = [(i, item) for i, item in enumerate(items) if not isinstance(item, dict)]
        self.report("entries", [f"entry {i} of `{section}` is not an object: {brief(item)}" for i, item in others])
        return [item for item in items if isinstance(item, dict)] if others else items

    def _columns(self, section: str, items: list[_Row]) -> dict[str, list[Any]]:
        """The values of each key of the entries that lack nothing, and these entries themselves as "entry"."""
        sound = np.ones(len(items), bool)
        columns = {key.name: self._column(key, items, sound) for key in KEYS if key.section == section}
        columns["entry"] = items
        if sound.all():
            return columns
        kept = np.flatnonzero(sound).tolist()
        return {name: [values[i] for i in kept] for name, values in columns.items()}

    def _column(self, key: Key, items: list[_Row], sound: np.ndarray) -> list[Any]:
        """The values of one key; None where it is absent or wrong. Entries of no use without it lose `sound`."""
        values = [item.get(key.name) for item in items]
        places = [i for i, item in enumerate(items) if key.name in item] if None in values else range(len(items))
        required = key.required and (key.name != "file_name" or self.has_images)
        wrong: list[str] = []
        repaired: list[str] = []
        if required:
            absent = sorted(set(range(len(items))).difference(places))
            sound[absent] = False
            wrong += [f"{_entry(key.section, items[i], i)} has no `{key.name}`" for i in absent]
        if not key.all_plain(values if len(places) == len(items) else [values[i] for i in places]):
            for i in places:
                what = f"`{key.name}` of {_entry(key.section, items[i], i)} is"
                if values[i] is None and not required:
                    repaired.append(f"{what} null (read as absent)")
                    continue
                try:
                    new, plain = key.read(values[i])
                except ValidationError:
                    wrong.append(f"{what} {brief(values[i])}, expected {key.expected}")
                    new, plain = None, True
                    sound[i] &= not required
                if not plain:
                    repaired.append(f"{what} {brief(values[i])} (read as {brief(new)})")
                values[i] = new
        self.report("entries", wrong)
        self.report("repaired_values", repaired)
        return values

    def _repeats(self, rule: str, what: str, values: list[Any]) -> None:
        try:
            counts = Counter(values)
        except TypeError:  # a list as an annotation id, which nobody uses
            counts = Counter(map(brief, values))
        repeated = [(value, count) for value, count in counts.items() if count > 1]
        self.report(rule, [f"{what} {brief(value)} appears more than once, {n} times" for value, n in repeated])

    def _look_up(
        self, key: str, annotations: dict[str, list[Any]], known: Mapping[Any, int], section: str
    ) -> np.ndarray:
        """Image or label of each annotation, -1 where unknown."""
        places, other_type = look_up(annotations[key], known)
        for rule, mask, words in (
            (f"unknown_{section}", places < 0, f"is not in `{section}`"),
            ("repaired_values", other_type, f"is of another type in `{section}`"),
        ):
            at = np.flatnonzero(mask).tolist()
            names = {i: _entry("annotations", annotations["entry"][i], i) for i in at[:KEPT]}
            texts = [f"{key} {brief(annotations[key][i])} of {name} {words}" for i, name in names.items()]
            self.report(rule, texts, len(at))
        return places


def _first_of_each(ids: list[Any]) -> dict[Any, int]:
    """Where each id comes first."""
    return {number: place for place, number in reversed(list(enumerate(ids)))}


def _entry(section: str, item: _Row, position: int) -> str:
    noun = {"images": "image", "annotations": "annotation", "categories": "category"}[section]
    return f"{noun} id {brief(item['id'])}" if "id" in item else f"{noun} number {position} (it has no id)"


def _ids(values: list[Any]) -> np.ndarray:
    if set(map(type, values)) <= {int}:
        with suppress(OverflowError):
            return np.array(values, np.int64)
    array = np.empty(len(values), object)
    array[:] = values
    return array
