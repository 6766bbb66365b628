"""What makes a training pointless, as far as annotations tell: training says it before it starts, the doctor lists it.

No image is decoded here.
"""

from __future__ import annotations

import filecmp
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from detector.data.boxes import box_iou
from detector.data.finding import ERROR, INFO, WARNING, Finding, found
from detector.data.image_files import THREADS
from detector.data.index import AnnotationIndex, Splits
from detector.errors import InputError

log = logging.getLogger(__name__)

# Shares above which a split is said to be nearly all of one kind, and the share of both sides of its image that a box
# of the whole image has: annotators' hands are a pixel off. Chosen by this project.
NEARLY_ALL, WHOLE_SIDE = 0.9, 0.99
MOSTLY_EMPTY = 0.5
DUPLICATE_IOU = 0.95
SAMPLE = 4096  # bytes


def refuse_pointless(splits: Splits) -> None:
    """Log what makes a training on these splits doubtful.

    Raises:
        InputError: it would be pointless.
    """
    findings = [*check_splits(splits), *_copies(splits)]
    for finding in findings:
        if finding.severity == ERROR:
            raise InputError(str(finding))
    for finding in findings:
        if finding.severity == WARNING:
            log.warning("%s", finding)


def check_categories(splits: Splits) -> None:
    """
    Raises:
        InputError: splits declare different classes, so that a number means one class here and another there.
    """
    for finding in _categories(splits):
        if finding.severity == ERROR:
            raise InputError(str(finding))


def check_splits(splits: Splits) -> list[Finding]:
    """What is wrong with splits as training data and as a measure of it.

    Args:
        splits: none without an image; the training split first. Of a single one it is not known what it is for, so
            that it is only looked at by itself.
    """
    if not splits:
        return []
    findings = [*_marked(splits), *_whole_images(splits), *_empty(splits), *_duplicates(splits)]
    if len(splits) > 1:
        findings += [*_categories(splits), *_objects(splits), *_shared_files(splits)]
    return findings


def _marked(splits: Splits) -> list[Finding]:
    return found(
        "mostly_ignored",
        WARNING,
        _nearly_all({split: index.difficult for split, index in splits.items()}),
        "splits whose boxes are nearly all marked `iscrowd`, `ignore` or `difficult`, so that hardly any counts",
        "clear these marks where the boxes are ordinary objects",
    )


def _whole_images(splits: Splits) -> list[Finding]:
    whole = {}
    for split, index in splits.items():
        size = index.sizes[index.images][:, ::-1]
        sides = index.boxes[:, 2:] - index.boxes[:, :2]
        whole[split] = (sides >= WHOLE_SIDE * size).all(axis=1)[(size > 0).all(axis=1)]
    return found(
        "whole_image_boxes",
        WARNING,
        _nearly_all(whole),
        "splits whose boxes are nearly all the whole image: a detector learns no places from them",
        "annotate the objects, or train a classifier",
    )


def _nearly_all(marks: Mapping[str, np.ndarray]) -> list[str]:
    """Splits of which nearly all boxes are marked."""
    shares = {split: mark.mean() for split, mark in marks.items() if len(mark)}
    return [f"{split}: {share:.1%} of its boxes" for split, share in shares.items() if share > NEARLY_ALL]


def _empty(splits: Splits) -> list[Finding]:
    empty = {split: int((np.diff(index.offsets) == 0).sum()) for split, index in splits.items()}
    shares = {split: empty[split] / len(index) for split, index in splits.items()}
    texts = [f"{split}: {share:.1%} of {len(splits[split])}" for split, share in shares.items()]
    mostly = max(shares.values()) > MOSTLY_EMPTY
    remedy = "check that no annotations are missing; data.keep_empty=false trains without such images"
    return [
        Finding(
            "empty_images",
            WARNING if mostly else INFO,
            sum(empty.values()),
            "images without a box",
            tuple(texts),
            remedy if mostly else "",
            figures=shares,
        )
    ]


def _duplicates(splits: Splits) -> list[Finding]:
    return found(
        "duplicate_boxes",
        WARNING,
        [f"{split}: {index.describe(row)}" for split, index in splits.items() for row in _repeated(index)],
        f"boxes that cover another of the same class and image (IoU above {DUPLICATE_IOU})",
        "remove one of each",
    )


def _repeated(index: AnnotationIndex) -> list[int]:
    """Rows that repeat an earlier box of their image and class."""
    _, group = np.unique(np.stack((index.images, index.labels, index.crowd)), axis=1, return_inverse=True)
    order, corners = np.argsort(group, kind="stable"), index.corners
    repeats: list[int] = []
    for rows in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        if len(rows) > 1:
            again = np.tril(box_iou(corners[rows], corners[rows]), -1) > DUPLICATE_IOU
            repeats += rows[again.any(axis=1)].tolist()
    return sorted(repeats)


def _categories(splits: Splits) -> list[Finding]:
    """All files must declare the same classes: labels are their order by id."""
    declared = {split: dict(zip(index.class_names, index.category_ids, strict=True)) for split, index in splits.items()}
    declared = {split: ids for split, ids in declared.items() if ids}
    (first, base), *others = declared.items() or [("", {})]
    moved = [
        f"{name!r} is id {base[name]!r} in {first}, {ids[name]!r} in {split}"
        for split, ids in others
        for name in base
        if name in ids and ids[name] != base[name]
    ]
    if len({splits[split].class_names for split in declared}) > 1:
        lists = [f"{split}: {', '.join(ids)[:200]}" for split, ids in declared.items()]
        message = "splits that declare different classes, by ascending id"
        remedy = "all files must declare the same `categories`, with the same ids"
        return [Finding("categories_differ", ERROR, len(lists), message, (*lists, *moved[:3]), remedy)]
    return found(
        "category_ids_differ",
        WARNING,
        moved,
        "classes whose id differs between splits; read by name here, as their order is the same",
        "give all files the same `categories`: other tools compare the ids",
    )


def _objects(splits: Splits) -> list[Finding]:
    """Splits without an object, classes that cannot be learnt, and one class alone where more are declared."""
    boxes = {}
    for split, index in splits.items():
        counts = np.bincount(index.labels[~index.crowd & ~index.degenerate], minlength=len(index.class_names))
        boxes[split] = dict(zip(index.class_names, counts.tolist(), strict=True))
    nothing = {
        split: f"{split}: {len(splits[split].labels)} boxes, of which none counts"
        for split, counts in boxes.items()
        if not any(counts.values())
    }
    (first, base), *others = boxes.items()
    used = [name for name, count in base.items() if count]
    unlearnt = [
        f"{name}: {count} boxes in {split}, none in {first}"
        for split, counts in others
        for name, count in counts.items()
        if used and count and base.get(name) == 0
    ]
    only = [f"{first}: all {base[used[0]]} boxes are {used[0]}, {len(base)} classes are declared"] if used else []
    remedy = "annotate some; check that `annotations` is complete and not all crowd regions or boxes without area"
    return [
        *found(
            "nothing_to_learn",
            ERROR,
            [nothing[first]] if first in nothing else [],
            "training split without an object",
            remedy,
        ),
        *found(
            "nothing_to_score",
            WARNING,
            [text for split, text in nothing.items() if split != first],
            "split to score without an object",
            remedy,
        ),
        *found(
            "unlearnt_classes",
            WARNING,
            unlearnt,
            "classes that are scored, but have no box to train on",
            "annotate some, or move images between the splits (one that is drawn: after tools/prepare_data.py split)",
        ),
        *found(
            "one_class",
            WARNING,
            only if len(used) == 1 < len(base) else [],
            "training split whose boxes are all of one class",
            "check the `category_id` of the annotations, or declare this class alone",
        ),
    ]


def _files(splits: Splits) -> list[tuple[str, dict[str, None]]]:
    """The paths of the image files of each split, each once."""
    folders = {split: str(index.image_dir.resolve()) for split, index in splits.items()}
    return [
        (split, dict.fromkeys(os.path.normpath(os.path.join(folders[split], name)) for name in index.file_names))
        for split, index in splits.items()
    ]


def _copies(splits: Splits) -> list[Finding]:
    """By their bytes, where sizes and then a sample agree: little is read where nothing is shared.

    The doctor compares pixels instead.
    """
    (first, base), *others = _files(splits)
    copies = []
    with ThreadPoolExecutor(THREADS) as pool:
        for split, files in others:
            sizes = [dict(zip(paths, pool.map(_size, paths), strict=True)) for paths in (base, files)]
            common = {*sizes[0].values()} & {*sizes[1].values()} - {0}
            ours, theirs = ({path: size for path, size in own.items() if size in common} for own in sizes)
            trained = dict(zip(pool.map(_sample, ours.items()), ours, strict=True))
            twins = zip(theirs, map(trained.get, pool.map(_sample, theirs.items())), strict=True)
            copies += [
                f"{first}: {twin} and {split}: {path}"
                for path, twin in twins
                if twin and path not in base and filecmp.cmp(path, twin, shallow=False)
            ]
    return found(
        "copied_files",
        WARNING,
        copies,
        "image files that are scored have a copy in the training split: scores are too good",
        "take them out of one split: what is trained on must not be scored on; where both splits name one folder, name "
        "it once, and a split is drawn",
    )


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # said elsewhere
        return 0


def _sample(file: tuple[str, int]) -> tuple[int, bytes]:
    """The size of a file, and some bytes of its middle: beginnings are alike."""
    path, size = file
    with open(path, "rb") as opened:
        opened.seek(max(0, size // 2 - SAMPLE // 2))
        return size, opened.read(SAMPLE)


def _shared_files(splits: Splits) -> list[Finding]:
    """By name: opening no file, and asking the disk for none."""
    (first, base), *others = _files(splits)
    shared = [f"{first} and {split}: {file}" for split, files in others for file in files if file in base]
    return found(
        "shared_files",
        WARNING,
        shared,
        "image files of the training split that are scored, too: scores are too good",
        "take them out of one split: what is trained on must not be scored on",
    )
