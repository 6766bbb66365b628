"""The data doctor's checks of boxes: the reader's faults, and what it does not judge. No image is opened here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from detector.data.finding import INFO, KEPT, WARNING, Finding, found
from detector.data.index import AnnotationIndex, Splits
from detector.data.preprocess import STRIDE, Preprocessing
from detector.data.rules import RULES
from detector.models.anchor_fit import POOR_IOU, best_anchor_iou, coverage, propose

if TYPE_CHECKING:
    from detector.models.rpn import RPNOptions

# Pixels of the original image: what sticks out by less is an annotator's hand, not a fault.
TOLERANCE = 1.0
# Pixels of the network input. Nothing is left of such an object at stride 16.
TINY = 2.0
# A class with fewer boxes than this in the training split is hardly learnt. Chosen by this project.
FEW = 10
# A class's share in one split over that in another, and how many standard deviations the shares differ by (two
# proportions, boxes taken as independent): both, because objects of one image are not independent. Chosen by
# this project.
SKEW_RATIO, SKEW_DEVIATIONS = 2.0, 4.0
# More than this share of objects that no anchor comes near is worth a warning. Chosen by this project.
POOR_SHARE = 0.10


def check_faults(splits: Splits) -> list[Finding]:
    """What the reader of annotation files found, a finding for each of its rules."""
    findings = []
    for name in RULES:
        faults = [(split, fault) for split, index in splits.items() for fault in index.faults if fault.check == name]
        if faults:
            count = sum(fault.count for _, fault in faults)
            files = {split: splits[split].annotation_file.name for split, _ in faults}
            examples = [f"{split}: {files[split]}: {text}" for split, fault in faults for text in fault.examples]
            findings.append(replace(faults[0][1], count=count, examples=tuple(examples[:KEPT])))
    return findings


def check_boxes(splits: Splits, sizes: Mapping[str, np.ndarray], preprocessing: Preprocessing) -> list[Finding]:
    """Boxes outside their image, or too small to learn.

    Args:
        splits: the annotation files.
        sizes: (M, 2) height and width of the images of each split, in the frame of the boxes; 0 where unknown.
        preprocessing: the training input.
    """
    outside: list[str] = []
    tiny: list[str] = []
    for split, index in splits.items():
        size = sizes[split][index.images]
        low, high = np.hsplit(index.corners, 2)
        limit = np.where(size > 0, size, np.inf)[:, ::-1]
        inside = np.minimum(high, limit) - np.maximum(low, 0)
        some = (high > low).all(axis=1) & (inside > 0).all(axis=1)
        out = ((low < -TOLERANCE) | (high > limit + TOLERANCE)).any(axis=1)
        small = (inside * _input_scales(size, preprocessing) < TINY).any(axis=1) & ~index.crowd
        for culprits, rows in ((outside, out & some), (tiny, small & some)):
            culprits += [
                f"{split}: {index.describe(row)}: {index.xywh[row].tolist()}" for row in np.flatnonzero(rows).tolist()
            ]
    return [
        *found(
            "boxes_outside",
            WARNING,
            outside,
            f"boxes that stick out of their image by more than {TOLERANCE:g} pixel; training clips them",
            "check that boxes are x, y, width, height in pixels of this image, then clip them",
        ),
        *found(
            "tiny_boxes",
            WARNING,
            tiny,
            f"boxes with a side below {TINY:g} pixels at the training input",
            "raise input.short_side and input.long_side, cut the images into tiles, or remove these objects",
        ),
    ]


def check_balance(splits: Splits) -> list[Finding]:
    """Boxes of each class in each split, and what is odd about them."""
    counts: dict[str, Counter[str]] = {}
    for split, index in splits.items():
        boxes = np.bincount(index.labels, minlength=len(index.class_names)).tolist()
        counts[split] = Counter(dict(zip(index.class_names, boxes, strict=True)))
    names = list(dict.fromkeys(name for count in counts.values() for name in count))
    if not names:
        return []
    unused = [f"{split}: {name}" for split, count in counts.items() for name, number in count.items() if not number]
    trained = next(iter(counts.values()))
    few = [f"{name}: {number} boxes" for name, number in trained.items() if 0 < number < FEW]
    summary = [f"{name}: " + ", ".join(f"{split} {count[name]}" for split, count in counts.items()) for name in names]
    return [
        Finding(
            "class_balance",
            INFO,
            len(names),
            "classes, and their boxes in each split",
            tuple(summary),
            figures={split: dict(count) for split, count in counts.items()},
        ),
        *found(
            "unused_categories",
            WARNING,
            unused,
            "declared classes without a box in a split",
            "annotate some, move images between the splits (one that is drawn: after tools/prepare_data.py split), or "
            "remove the class from all files",
        ),
        *found(
            "rare_classes",
            WARNING,
            few,
            f"classes with fewer than {FEW} boxes to train on",
            "annotate more, or merge them with a related class",
        ),
        *found(
            "split_skew",
            WARNING,
            _skewed(counts, names),
            "classes whose share of the boxes differs much between splits",
            "split at random (by video or place, if images come in series), so that scores say what training can "
            "expect",
        ),
    ]


def _skewed(counts: Mapping[str, Counter[str]], names: Sequence[str]) -> list[str]:
    """Classes whose share of the boxes differs between the first split and another one."""
    (first, base), *others = counts.items()
    culprits = []
    for split, count in others:
        totals = base.total(), count.total()
        for name in names:
            a, b = base[name], count[name]
            if not a or not b:
                continue  # unused_categories
            shares = a / totals[0], b / totals[1]
            pooled = (a + b) / sum(totals)
            deviation = (pooled * (1 - pooled) * (1 / totals[0] + 1 / totals[1])) ** 0.5
            far = abs(shares[0] - shares[1]) > SKEW_DEVIATIONS * deviation
            if far and max(shares) > SKEW_RATIO * min(shares):
                culprits.append(f"{name}: {first} {shares[0]:.1%} ({a} boxes), {split} {shares[1]:.1%} ({b})")
    return culprits


def check_anchors(
    index: AnnotationIndex, sizes: np.ndarray, preprocessing: Preprocessing, rpn: RPNOptions, stride: int
) -> list[Finding]:
    """How well anchors cover the objects of the training split; `sizes` as of one split for `check_boxes`."""
    scales, ratios = list(rpn.scales), list(rpn.ratios)
    boxes, canvas = _at_input(index, sizes, preprocessing)
    if not len(boxes):
        return []
    before = coverage(best_anchor_iou(boxes, canvas, scales, ratios, stride), rpn.foreground_iou)
    new_scales, new_ratios = propose(boxes, canvas, scales, ratios, stride)
    after = coverage(best_anchor_iou(boxes, canvas, new_scales, new_ratios, stride), rpn.foreground_iou)
    override = " ".join(
        f"'rpn.{name}=[{', '.join(f'{value:g}' for value in values)}]'"
        for name, values in (("scales", new_scales), ("ratios", new_ratios))
    )
    same = (new_scales, new_ratios) == (scales, ratios)
    poor = before["share_below_0.5"] > POOR_SHARE
    remedy = ""
    if not same:
        remedy = f"{'' if poor else 'if proposals miss objects: '}{override} (a new network: weights of the RPN differ)"
    elif poor:
        remedy = "no better scales and ratios were found: raise input.short_side and input.long_side"
    lines = [
        f"{name}: mean IoU {shares['mean_iou']:.3f}, below {POOR_IOU}: {shares['share_below_0.5']:.1%}, below the "
        f"foreground threshold: {shares['share_below_foreground_iou']:.1%}"
        for name, shares in (("these anchors", before), (override, after))
    ]
    return [
        Finding(
            "anchor_coverage",
            WARNING if poor else INFO,
            round(before["share_below_0.5"] * len(boxes)),
            f"objects whose best anchor has an IoU below {POOR_IOU} at the training input",
            tuple(lines[:1] if same else lines),
            remedy,
            figures={
                "objects": len(boxes),
                "scales": scales,
                "ratios": ratios,
                "before": before,
                "proposed_scales": new_scales,
                "proposed_ratios": new_ratios,
                "after": after,
                "override": override,
            },
        )
    ]


def _at_input(index: AnnotationIndex, sizes: np.ndarray, preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """The objects of a split as the network meets them without augmentation.

    Returns:
        Boxes (B, 4) xyxy in pixels of the network input, and the canvas (B, 2), height and width, of each.
    """
    size = sizes[index.images]
    scale = _input_scales(size, preprocessing)
    corners = index.corners.clip(0, size[:, [1, 0, 1, 0]]) * scale
    canvas = -(-np.rint(size * scale).astype(np.int64) // STRIDE) * STRIDE
    good = (corners[:, 2:] > corners[:, :2]).all(axis=1) & ~index.crowd
    return corners[good], canvas[good]


def _input_scales(sizes: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """(B, 1) input pixels per original pixel of images (B, 2), height and width; 1 where the size is unknown."""
    sides = np.where(sizes > 0, sizes, 1)
    scale = np.minimum(preprocessing.short_side / sides.min(axis=1), preprocessing.long_side / sides.max(axis=1))
    return np.where((sizes > 0).all(axis=1), scale, 1.0)[:, None]
