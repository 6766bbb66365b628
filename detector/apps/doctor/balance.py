"""The data doctor's counts of the boxes of each class in each split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from detector.data.annotations import AnnotationIndex
from detector.data.finding import INFO, WARNING, Finding, Splits, found

# A class with fewer boxes than this in the training split is hardly learnt. Chosen by this project.
FEW = 10
# A class's share in one split over that in another, and how many standard deviations the shares differ by (two
# proportions, boxes taken as independent): both, because objects of one image are not independent. Chosen by
# this project.
SKEW_RATIO, SKEW_DEVIATIONS = 2.0, 4.0


def check_balance(splits: Splits) -> list[Finding]:
    """Boxes of each class in each split, and what is odd about them."""
    counts = {split: _boxes_of_classes(index) for split, index in splits.items()}
    names = list(dict.fromkeys(name for count in counts.values() for name in count))
    if not names:
        return []
    unused = [f"{split}: {name}" for split, count in counts.items() for name, number in count.items() if not number]
    few = [
        f"{name}: {number} boxes" for name, number in next(iter(counts.values())).items() if 0 < number < FEW
    ]  # the first split is the one that is trained on
    summary = [
        f"{name}: " + ", ".join(f"{split} {count.get(name, 0)}" for split, count in counts.items()) for name in names
    ]
    return [
        Finding(
            "class_balance", INFO, len(names), "classes, and their boxes in each split", tuple(summary),
            figures={split: dict(count) for split, count in counts.items()},
        ),
        *found(
            "unused_categories", WARNING, unused, "declared classes without a box in a split",
            "annotate some, move images between the splits, or remove the class from all files",
        ),
        *found(
            "rare_classes", WARNING, few, f"classes with fewer than {FEW} boxes to train on",
            "annotate more, or merge them with a related class",
        ),
        *_skew(counts, names),
    ]  # fmt: skip


def _boxes_of_classes(index: AnnotationIndex) -> Counter[str]:
    counts = np.bincount(index.labels, minlength=len(index.class_names)).tolist()
    return Counter(dict(zip(index.class_names, counts, strict=True)))


def _skew(counts: dict[str, Counter[str]], names: Sequence[str]) -> list[Finding]:
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
    return found(
        "split_skew", WARNING, culprits, "classes whose share of the boxes differs much between splits",
        "split at random (by video or place, if images come in series), so that scores say what training can expect",
    )  # fmt: skip
