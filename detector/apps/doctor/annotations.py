"""The data doctor's checks of annotation files: entries, ids, references, boxes. No image is opened here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from detector.apps.doctor.split import ERROR, WARNING, Boxes, Finding, Split, describe, found, known_boxes
from detector.data.preprocess import Preprocessing

# Pixels of the original image: what sticks out by less is an annotator's hand, not a fault.
TOLERANCE = 1.0
# Pixels of the network input. Nothing is left of such an object at stride 16.
TINY = 2.0
DUPLICATE_IOU = 0.95


def check_entries(splits: Sequence[Split]) -> list[Finding]:
    return [
        *found(
            "file", ERROR, [f"{s.name}: {s.annotation_file} {s.broken}" for s in splits if s.broken],
            "annotation file that cannot be used at all", "give the right path, or fetch the file again",
        ),
        *found(
            "entries", ERROR, [fault for split in splits for fault in split.faults],
            "entries that lack a key, or whose value is no id, name, length or box of four finite numbers",
            "correct or remove them",
        ),
    ]  # fmt: skip


def check_ids(splits: Sequence[Split]) -> list[Finding]:
    """Whatever must be unique within a file."""

    def repeated(section: str, values: Callable[[Split], Iterable[Any]]) -> list[str]:
        return [
            f"{split.name}: {section} {value!r}, {count} times"
            for split in splits
            for value, count in Counter(values(split)).items()
            if count > 1
        ]

    return [
        *found(
            "image_ids", ERROR, repeated("image id", lambda s: (i["id"] for i in s.images)),
            "image ids that more than one image has", "renumber the images and their annotations",
        ),
        *found(
            "annotation_ids", WARNING,
            repeated("annotation id", lambda s: (repr(a["id"]) for a in s.annotations if "id" in a)),
            "annotation ids that more than one annotation has; not used here, but COCO's own code counts them wrongly",
            "renumber the annotations",
        ),
        *found(
            "category_ids", ERROR, repeated("category id", lambda s: (c["id"] for c in s.categories)),
            "category ids that more than one category has", "renumber the categories and the annotations that use them",
        ),
        *found(
            "category_names", ERROR, repeated("category", lambda s: (c["name"] for c in s.categories)),
            "class names that more than one category has", "merge these categories, or rename one",
        ),
        *found(
            "file_names", WARNING, repeated("file", lambda s: (i["file_name"] for i in s.images)),
            "files that more than one image entry names; an entry that lacks the objects of the other teaches wrongly",
            "merge the entries",
        ),
    ]  # fmt: skip


def check_references(splits: Sequence[Split]) -> list[Finding]:
    unknown_images, unknown_categories = [], []
    for split in splits:
        images = {image["id"] for image in split.images}
        categories = {category["id"] for category in split.categories}
        for a in split.annotations:
            if a["image_id"] not in images:
                unknown_images.append(describe(split, a))
            if a["category_id"] not in categories:
                unknown_categories.append(f"{describe(split, a)}: category {a['category_id']!r}")
    return [
        *found(
            "unknown_images", ERROR, unknown_images, "annotations of images that the file does not list",
            "add the images, or remove these annotations",
        ),
        *found(
            "unknown_categories", ERROR, unknown_categories,
            "annotations of categories that the file does not declare", "declare the categories, or correct the ids",
        ),
    ]  # fmt: skip


def check_categories(splits: Sequence[Split]) -> list[Finding]:
    """All files must declare the same classes: labels are their order."""
    declared = {
        s.name: tuple(c["name"] for c in sorted(s.categories, key=lambda c: c["id"])) for s in splits if not s.broken
    }
    culprits = [f"{name}: {', '.join(names)[:200] or 'none'}" for name, names in declared.items()]
    return found(
        "categories_differ", ERROR, culprits if len(set(declared.values())) > 1 else [],
        "splits that declare different classes, by ascending id", "give all files the same `categories`",
    ) + found(
        "no_categories", ERROR, [name for name, names in declared.items() if not names],
        "splits without any category", "declare every class with an `id` and a `name`",
    )  # fmt: skip


def check_boxes(splits: Sequence[Split], sizes: dict[str, np.ndarray], preprocessing: Preprocessing) -> list[Finding]:
    """Boxes without area, outside their image, too small to learn, or twice.

    Args:
        splits: the annotation files.
        sizes: (M, 2) height and width of the images of each split, in the frame of the boxes; 0 where unknown.
        preprocessing: the training input.
    """
    culprits: dict[str, list[str]] = {key: [] for key in ("degenerate", "outside", "tiny", "duplicate")}
    for split in splits:
        boxes = known_boxes(split)
        size = sizes[split.name][boxes.rows]
        low, high = boxes.xywh[:, :2], boxes.xywh[:, :2] + boxes.xywh[:, 2:]
        limit = np.where(size > 0, size, np.inf)[:, ::-1]
        inside = np.minimum(high, limit) - np.maximum(low, 0)
        empty = (boxes.xywh[:, 2:] <= 0).any(axis=1) | (inside <= 0).any(axis=1)
        out = ((low < -TOLERANCE) | (high > limit + TOLERANCE)).any(axis=1) & ~empty
        tiny = (inside * _scales(size, preprocessing) < TINY).any(axis=1) & ~empty & ~boxes.crowd
        culprits["duplicate"] += [boxes.where[i] for i in _duplicates(boxes)]
        for key, mask in (("degenerate", empty), ("outside", out), ("tiny", tiny)):
            culprits[key] += [f"{boxes.where[i]}: {boxes.xywh[i].tolist()}" for i in np.flatnonzero(mask)]
    return [
        *found(
            "degenerate_boxes", WARNING, culprits["degenerate"],
            "boxes without area inside their image; training leaves them out", "correct or remove them",
        ),
        *found(
            "boxes_outside", WARNING, culprits["outside"],
            f"boxes that stick out of their image by more than {TOLERANCE:g} pixel; training clips them",
            "check that boxes are x, y, width, height in pixels of this image, then clip them",
        ),
        *found(
            "tiny_boxes", WARNING, culprits["tiny"], f"boxes with a side below {TINY:g} pixels at the training input",
            "raise input.short_side and input.long_side, cut the images into tiles, or remove these objects",
        ),
        *found(
            "duplicate_boxes", WARNING, culprits["duplicate"],
            f"boxes that cover another of the same class and image (IoU above {DUPLICATE_IOU})", "remove one of each",
        ),
    ]  # fmt: skip


def _scales(sizes: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """(B, 1) input pixels per original pixel; 1 where the size is unknown."""
    sides = np.where(sizes > 0, sizes, 1)
    scale = np.minimum(preprocessing.short_side / sides.min(axis=1), preprocessing.long_side / sides.max(axis=1))
    return np.where((sizes > 0).all(axis=1), scale, 1.0)[:, None]


def _duplicates(boxes: Boxes) -> list[int]:
    """Rows that repeat an earlier box of their image and class."""
    keys = list(zip(boxes.rows.tolist(), boxes.names.tolist(), boxes.crowd.tolist(), strict=True))
    groups: dict[tuple[int, str, bool], list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    repeats = []
    for places in groups.values():
        if len(places) > 1:
            low, size = boxes.xywh[places, :2], boxes.xywh[places, 2:].clip(min=0)
            high = low + size
            inner = (np.minimum(high[:, None], high) - np.maximum(low[:, None], low)).clip(min=0).prod(axis=2)
            area = size.prod(axis=1)
            iou = inner / np.maximum(area[:, None] + area - inner, 1e-9)
            repeats += [places[i] for i in np.flatnonzero((np.tril(iou, -1) > DUPLICATE_IOU).any(axis=1))]
    return sorted(repeats)
