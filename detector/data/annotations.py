"""Annotation files in COCO's format: one lenient reader, which gives flat arrays and a list of faults.

Training, evaluation and the data doctor all start here. What is plain is repaired and counted, what is not is left out
and named (`rules.py`); `AnnotationIndex.check` refuses an index that has such faults. The only place, with the results
file, where COCO's own ids appear: a label is an index into `class_names`.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from detector.data.boxes import clip_boxes
from detector.data.finding import ERROR, EXAMPLES, Finding
from detector.data.image_files import ExifBoxes, match_files
from detector.data.images import read_image
from detector.data.json_file import read_json
from detector.data.rules import KEYS, RULES, Key, brief, fault
from detector.errors import InputError

logger = logging.getLogger(__name__)

# Boxes that stick out by less are rounding, not a mistake worth counting: COCO writes two decimals.
_ROUNDING = 0.01
_SECTIONS = ("images", "annotations", "categories")
_LVIS_KEYS = ("neg_category_ids", "not_exhaustive_category_ids")
_Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class AnnotationIndex:
    """M images and their B annotated boxes, without a Python object per box, so that forked workers share the memory.

    Attributes:
        annotation_file: where it came from.
        image_dir: the folder that `file_names` are relative to.
        image_ids: M ids as in the file, integers or texts.
        file_names: M names as in the file, "" where it has none.
        sizes: (M, 2) int64, height and width in the frame of the boxes, 0 where the file declares none.
        upright: (M,) bool; the boxes are in the frame after an EXIF rotation, if there is one.
        offsets: (M + 1,) int64; the boxes of image i are offsets[i]:offsets[i + 1], in the file's order.
        xywh: (B, 4) float64, as in the file, in pixels of the original image: what metrics count.
        boxes: (B, 4) float32, xyxy, inside the image where its size is declared: what training sees.
        labels: (B,) int64 index into class_names.
        crowd: (B,) bool; a region of many objects, not one.
        difficult: (B,) bool; `difficult` or `ignore` is set, or a crowd region: Pascal VOC does not count these.
        areas: (B,) float64, the file's `area` in square pixels (of the mask, in COCO), the box's where it has none.
        class_names: declared classes by ascending COCO id, whether or not a box uses them.
        category_ids: the COCO id of each class.
        annotation_ids: (B,) as in the file, int64 where all are numbers; for messages only.
        faults: what is wrong with the file.
        lvis: for each image its LVIS lists of classes, see detector.evaluation.metrics; None where no image has them.
        frequencies: LVIS's `frequency` of each class, None where there is none.
        other_ids: of images of the file that are not in this index (see `select`).
    """

    annotation_file: Path
    image_dir: Path
    image_ids: list[Any]
    file_names: list[str]
    sizes: np.ndarray
    upright: np.ndarray
    offsets: np.ndarray
    xywh: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray
    areas: np.ndarray
    class_names: tuple[str, ...]
    category_ids: tuple[Any, ...]
    annotation_ids: np.ndarray
    faults: tuple[Finding, ...] = ()
    lvis: list[_Row] | None = None
    frequencies: tuple[str | None, ...] = ()
    other_ids: frozenset[Any] = frozenset()

    def __len__(self) -> int:
        return len(self.image_ids)

    @cached_property
    def place(self) -> dict[Any, int]:
        """Place of each image id."""
        return {image_id: i for i, image_id in enumerate(self.image_ids)}

    @property
    def images(self) -> np.ndarray:
        """(B,) int64, the image of each box."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @property
    def corners(self) -> np.ndarray:
        """(B, 4) float64, xyxy, as in the file."""
        return _corners(self.xywh)

    @property
    def degenerate(self) -> np.ndarray:
        """(B,) bool; no area inside its image. Training leaves it out, metrics count it, it can never be found."""
        return np.less_equal(self.boxes[:, 2:], self.boxes[:, :2]).any(axis=1)

    @property
    def clipped(self) -> np.ndarray:
        """(B,) bool; the box sticks out of its image, by more than rounding."""
        return (np.abs(self.boxes - self.corners) > _ROUNDING).any(axis=1)

    @property
    def empty(self) -> np.ndarray:
        """(M,) bool; no box to train on."""
        return np.bincount(self.images[~self.degenerate], minlength=len(self)) == 0

    @property
    def counts(self) -> dict[str, int]:
        """How many images, boxes to train on, crowds among them, images without one, clipped and degenerate boxes."""
        good = ~self.degenerate
        return {
            "images": len(self),
            "boxes": int(good.sum()),
            "crowds": int((self.crowd & good).sum()),
            "empty": int(self.empty.sum()),
            "clipped": int((self.clipped & good).sum()),
            "degenerate": int((~good).sum()),
        }

    def objects(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes (G, 4), labels (G,) and crowd flags (G,) of image i to train on, as copies."""
        rows = np.arange(self.offsets[i], self.offsets[i + 1])
        rows = rows[(self.boxes[rows, 2:] > self.boxes[rows, :2]).all(axis=1)]
        return self.boxes[rows], self.labels[rows], self.crowd[rows]

    def path(self, i: int) -> Path:
        """The file of image i."""
        return self.image_dir / self.file_names[i]

    def read(self, i: int) -> np.ndarray:
        """Decode image i, in the frame that its boxes are in.

        That is after an EXIF rotation, or before it: see `detector.data.image_files.match_files`. Where nobody looked,
        the size that the file declares decides; without one, the rotation is applied.

        Returns:
            uint8 RGB (h, w, 3).

        Raises:
            InputError: the file cannot be read, or has another size than the annotation file says.
        """
        path, name, upright = self.path(i), f"image id {self.image_ids[i]!r}", bool(self.upright[i])
        try:
            image = read_image(path, exif=upright)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        declared = tuple(self.sizes[i].tolist())
        if 0 in declared or image.shape[:2] == declared:
            return image
        other = read_image(path, exif=not upright)
        if other.shape[:2] == declared:
            return other
        raise InputError(
            f"{name}: {path} is {image.shape[1]} x {image.shape[0]} pixels, but {self.annotation_file.name} says width "
            f"{declared[1]} and height {declared[0]}, so its boxes would be in the wrong place; correct width and "
            f"height (and boxes) in the annotation file, or restore the original image."
        )

    def select(self, places: Sequence[int] | np.ndarray) -> AnnotationIndex:
        """These images only, in this order."""
        chosen = np.asarray(places, np.int64)
        counts = np.diff(self.offsets)[chosen]
        offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[chosen] - offsets[:-1], counts)
        names = ("xywh", "boxes", "labels", "crowd", "difficult", "areas", "annotation_ids")
        ids = [self.image_ids[i] for i in chosen]
        return replace(
            self,
            image_ids=ids,
            file_names=[self.file_names[i] for i in chosen],
            sizes=self.sizes[chosen],
            upright=self.upright[chosen],
            offsets=offsets,
            lvis=[self.lvis[i] for i in chosen] if self.lvis is not None else None,
            other_ids=self.other_ids.union(self.image_ids) - frozenset(ids),
            **{name: getattr(self, name)[rows] for name in names},
        )

    def check(self) -> AnnotationIndex:
        """This index, if its file has no error; warnings are logged.

        Raises:
            InputError: the first error, and how many more there are.
        """
        places = list(RULES)
        faults = sorted(self.faults, key=lambda one: places.index(one.check))
        errors = [one for one in faults if one.severity == ERROR]
        if errors:
            remedy = "" if errors[0].check == "file" else f"; {errors[0].remedy}"  # each of these says its own
            more = sum(one.count for one in errors) - 1
            hint = f" {more} more of its entries are at fault: tools/doctor.py lists them." if more else ""
            raise InputError(f"{self.annotation_file}: {errors[0].examples[0]}{remedy}.{hint}")
        for one in faults:
            what = f"{one.count} {one.message}, the first: {one.examples[0]}; {one.remedy}"
            logger.warning("%s: %s.", self.annotation_file, what)
        return self

    def describe(self, row: int) -> str:
        """Which box this is, for a message."""
        image = int(np.searchsorted(self.offsets, row, side="right")) - 1
        annotation = self.annotation_ids[row : row + 1].tolist()[0]
        return f"annotation {'(no id)' if annotation is None else repr(annotation)} of image {self.image_ids[image]!r}"

    def degenerate_boxes(self) -> list[Finding]:
        """The fault that some boxes have no area inside their images; none where all have."""
        bad = np.flatnonzero(self.degenerate).tolist()
        texts = [f"`bbox` of {self.describe(row)} is {self.xywh[row].tolist()}" for row in bad[:EXAMPLES]]
        return fault("degenerate_boxes", texts, len(bad))

    def summary(self) -> str:
        """One line for the log."""
        counts = self.counts
        return (
            f"{self.annotation_file.name}: {counts['images']} images, {counts['empty']} without a box; "
            f"{counts['boxes']} boxes of {len(self.class_names)} classes, {counts['crowds']} crowd regions; "
            f"{counts['clipped']} boxes clipped to the image, {counts['degenerate']} without area inside it"
            + (" (not trained on; counted by metrics, can never be found)" if counts["degenerate"] else "")
        )


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
        class_names: the classes that the file must declare, in this order (those of a checkpoint); None takes any.
        limit: keep only this many images, the first ones.
        exif_boxes: which frame the boxes of images with an EXIF rotation are in; see `match_files`.

    Raises:
        InputError: a file or folder is missing; the file has an error; nothing is left; the classes are not
            `class_names`.
    """
    path, folder = Path(annotation_file), Path(image_dir)
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}: at least 1 image; leave it out (null) to take all.")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder that holds the images of {path.name}.")
    everything = index = read_annotations(path, folder)
    if keep_empty and limit is not None:
        index = index.select(np.arange(len(index))[:limit])
    index = match_files(index, exif_boxes).check()
    _check_class_names(path, index.class_names, class_names)
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


def show(values: Sequence[Any], most: int = 8) -> str:
    """The first values, for a message."""
    shown = ", ".join(map(brief, values[:most]))
    return shown if len(values) <= most else f"{shown} ... ({len(values)} in all)"


def id_order(value: Any) -> tuple[bool, Any]:
    """Key to sort ids by that may be numbers and texts."""
    return isinstance(value, str), value


def look_up(ids: Sequence[Hashable], known: Mapping[Any, int]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (N,) int64 of ids, -1 for unknown ones; and (N,) bool, which were only found as text or as number."""
    found = np.fromiter(map(known.get, ids, repeat(-1)), np.int64, len(ids))
    other_type = np.zeros(len(ids), bool)
    for place in np.flatnonzero(found < 0).tolist():
        found[place] = known.get(_other_type(ids[place]), -1)
        other_type[place] = found[place] >= 0
    return found, other_type


def _other_type(value: Any) -> Any:
    if not isinstance(value, str):
        return str(value)
    return int(value) if re.fullmatch(r"-?\d{1,20}", value) else None


def _check_class_names(path: Path, names: tuple[str, ...], expected: Sequence[str] | None) -> None:
    if expected is None or names == tuple(expected):
        return
    pairs = zip(names, expected, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(names), len(expected)))
    raise InputError(
        f"{path} declares {len(names)} classes ({show(names)}), but the detector knows {len(expected)} "
        f"({show(tuple(expected))}); the first difference is class {at}. Give `categories` these names in the order of "
        f"their ids, or train a detector on this data set."
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
            boxes=clip_boxes(_corners(xywh), sizes[places[order]]),
            labels=labels[order],
            crowd=crowd,
            difficult=crowd | difficult | ignored,
            areas=np.where(np.isnan(areas), xywh[:, 2] * xywh[:, 3], areas),
            class_names=tuple(categories["name"][classes[number]] for number in category_ids),
            category_ids=tuple(category_ids),
            annotation_ids=_ids([annotations["entry"][i].get("id") for i in order]),
            lvis=lvis if any(value is not None for entry in lvis for value in entry.values()) else None,
            frequencies=tuple(word if word in ("r", "c", "f") else None for word in frequencies),
        )
        return replace(index, faults=(*self.faults, *index.degenerate_boxes()))

    def _sections(self, content: Any) -> dict[str, list[_Row]]:
        """The entries of each section; none where the file cannot be used at all."""
        if self.faults:
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
            names = {i: _entry("annotations", annotations["entry"][i], i) for i in at[:EXAMPLES]}
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


def _corners(xywh: np.ndarray) -> np.ndarray:
    return np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1)
