"""What makes a training pointless, as far as annotations tell: training says it before it starts, the doctor lists it.

No image is opened here.
"""

from __future__ import annotations

import logging
import os

import numpy as np

from detector.data.annotations import AnnotationIndex
from detector.data.boxes import box_iou
from detector.data.finding import ERROR, INFO, WARNING, Finding, Splits, found
from detector.errors import InputError

log = logging.getLogger(__name__)

# Shares above which a split is said to be nearly all of one kind, and the share of both sides of its image that a box
# of the whole image has: annotators' hands are a pixel off. Chosen by this project.
NEARLY_ALL, WHOLE_SIDE = 0.9, 0.99
MOSTLY_EMPTY = 0.5
DUPLICATE_IOU = 0.95


def refuse_pointless(splits: Splits) -> None:
    """Log what makes a training on these splits doubtful.

    Raises:
        InputError: it would be pointless.
    """
    findings = check_splits(splits)
    for finding in findings:
        if finding.severity == ERROR:
            raise InputError(str(finding))
    for finding in findings:
        if finding.severity == WARNING:
            log.warning("%s", finding)


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
        findings += [*_categories(splits), *_no_objects(splits), *_classes_to_learn(splits), *_shared_files(splits)]
    return findings


def _marked(splits: Splits) -> list[Finding]:
    shares = {split: float(index.difficult.mean()) for split, index in splits.items() if len(index.labels)}
    return found(
        "mostly_ignored", WARNING,
        [f"{split}: {share:.1%} of its boxes" for split, share in shares.items() if share > NEARLY_ALL],
        "splits whose boxes are nearly all marked `iscrowd`, `ignore` or `difficult`, so that hardly any counts",
        "clear these marks where the boxes are ordinary objects",
    )  # fmt: skip


def _whole_images(splits: Splits) -> list[Finding]:
    culprits = []
    for split, index in splits.items():
        size = index.sizes[index.images]
        known = (size > 0).all(axis=1)
        sides = index.boxes[:, 2:] - index.boxes[:, :2]
        share = (sides >= WHOLE_SIDE * size[:, ::-1]).all(axis=1)[known].mean() if known.any() else 0.0
        if share > NEARLY_ALL:
            culprits.append(f"{split}: {share:.1%} of its boxes")
    return found(
        "whole_image_boxes", WARNING, culprits,
        "splits whose boxes are nearly all the whole image: a detector learns no places from them",
        "annotate the objects, or train a classifier",
    )  # fmt: skip


def _empty(splits: Splits) -> list[Finding]:
    empty = {split: int((np.diff(index.offsets) == 0).sum()) for split, index in splits.items()}
    shares = {split: empty[split] / len(index) for split, index in splits.items()}
    texts = [f"{split}: {share:.1%} of {len(splits[split])}" for split, share in shares.items()]
    mostly = max(shares.values()) > MOSTLY_EMPTY
    remedy = "check that no annotations are missing; data.keep_empty=false trains without such images"
    return [
        Finding(
            "empty_images", WARNING if mostly else INFO, sum(empty.values()), "images without a box", tuple(texts),
            remedy if mostly else "", figures=shares,
        )
    ]  # fmt: skip


def _duplicates(splits: Splits) -> list[Finding]:
    return found(
        "duplicate_boxes", WARNING,
        [f"{split}: {index.describe(row)}" for split, index in splits.items() for row in _repeated(index)],
        f"boxes that cover another of the same class and image (IoU above {DUPLICATE_IOU})", "remove one of each",
    )  # fmt: skip


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
        for split, ids in others for name in base if name in ids and ids[name] != base[name]
    ]  # fmt: skip
    if len({splits[split].class_names for split in declared}) > 1:
        lists = [f"{split}: {', '.join(ids)[:200]}" for split, ids in declared.items()]
        message = "splits that declare different classes, by ascending id"
        remedy = "all files must declare the same `categories`, with the same ids"
        return [Finding("categories_differ", ERROR, len(lists), message, (*lists, *moved[:3]), remedy)]
    return found(
        "category_ids_differ", WARNING, moved,
        "classes whose id differs between splits; read by name here, as their order is the same",
        "give all files the same `categories`: other tools compare the ids",
    )  # fmt: skip


def _no_objects(splits: Splits) -> list[Finding]:
    trained = next(iter(splits))
    nothing = {
        split: f"{split}: {len(index.labels)} boxes, of which none counts"
        for split, index in splits.items()
        if (index.crowd | index.degenerate).all()
    }
    scored = [text for split, text in nothing.items() if split != trained]
    unlearnable = [nothing[trained]] if trained in nothing else []
    remedy = "annotate some; check that `annotations` is complete and not all crowd regions or boxes without area"
    return [
        *found("nothing_to_learn", ERROR, unlearnable, "training split without an object", remedy),
        *found("nothing_to_score", WARNING, scored, "split to score without an object", remedy),
    ]


def _classes_to_learn(splits: Splits) -> list[Finding]:
    """Classes that are scored and cannot be learnt, and a training split of one class where more are declared."""
    boxes = {}
    for split, index in splits.items():
        counts = np.bincount(index.labels[~index.crowd & ~index.degenerate], minlength=len(index.class_names))
        boxes[split] = dict(zip(index.class_names, counts.tolist(), strict=True))
    (first, base), *others = boxes.items()
    if not any(base.values()):
        return []  # nothing_to_learn
    unlearnt = [
        f"{name}: {count} boxes in {split}, none in {first}"
        for split, counts in others for name, count in counts.items() if count and base.get(name) == 0
    ]  # fmt: skip
    used = [name for name, count in base.items() if count]
    only = [f"{first}: all {base[used[0]]} boxes are {used[0]}, {len(base)} classes are declared"]
    return [
        *found(
            "unlearnt_classes", WARNING, unlearnt, "classes that are scored, but have no box to train on",
            "move images between the splits, or annotate some",
        ),
        *found(
            "one_class", WARNING, only if len(used) == 1 < len(base) else [],
            "training split whose boxes are all of one class",
            "check the `category_id` of the annotations, or declare this class alone",
        ),
    ]  # fmt: skip


def _shared_files(splits: Splits) -> list[Finding]:
    """By name: opening no file, and asking the disk for none."""
    (first, base), *others = {split: _files(index) for split, index in splits.items()}.items()
    shared = [f"{first} and {split}: {file}" for split, files in others for file in files if file in base]
    return found(
        "shared_files", WARNING, shared,
        "image files of the training split that are scored, too: scores are too good",
        "take them out of one split: what is trained on must not be scored on",
    )  # fmt: skip


def _files(index: AnnotationIndex) -> dict[str, None]:
    folder = str(index.image_dir.resolve())
    return dict.fromkeys(os.path.normpath(os.path.join(folder, name)) for name in index.file_names)
