"""Is detector B better than A, or was it luck? The difference in AP with its interval, and the images behind it.

A paired bootstrap over images (Efron and Tibshirani 1993, sections 6 and 13.3): the images are what another data set
would have drawn anew, and both detectors are scored on the same draws, so that what makes an image hard for both
cancels. What it does not know is how much another training run with another seed would differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from detector.data.index import AnnotationIndex
from detector.data.results import Results
from detector.errors import InputError
from detector.evaluation.records import SIZES
from detector.evaluation.resampling import (
    ClassMatches,
    MatchedDetections,
    average_precision,
    draw_images,
    leave_one_out,
    match_detections,
)
from detector.evaluation.tables import markdown_table

# The range of areas, and the IoU thresholds of 0.50:0.95, that a metric is the mean of.
METRICS: dict[str, tuple[str, slice]] = {
    "AP": ("all", slice(None)),
    "AP50": ("all", slice(0, 1)),
    "AP75": ("all", slice(5, 6)),
    "APs": ("small", slice(None)),
    "APm": ("medium", slice(None)),
    "APl": ("large", slice(None)),
}
CONFIDENCE = 0.95
THRESHOLDS = 10  # of 0.50:0.95


def compare(
    a: Results,
    b: Results,
    index: AnnotationIndex,
    *,
    draws: int = 1000,
    seed: int = 0,
    score_threshold: float = 0.3,
    top: int = 20,
) -> dict[str, Any]:
    """Compare the detections of two detectors on the same images.

    Args:
        a, b: what each found on the images of the index.
        index: the ground truth.
        draws: of the bootstrap.
        seed: of the draws.
        score_threshold: detections below it are not named in what changed on an image; AP counts all.
        top: images to name, of those that became better and of those that became worse.

    Returns:
        Plain values: "figures" {name of METRICS: difference} and "per_class" {class name: difference}, where a
        difference is {"a", "b", "difference" (b - a), "low", "high" (95% percentile interval), "b_better" (the share
        of draws in which b is ahead, draws without a winner counted half)}, each None where there is no object;
        "better" and "worse": the images with the largest parts in the difference, see `_changes`; "images", "draws",
        "seed", "score_threshold".

    Raises:
        InputError: draws or top are out of range.
    """
    if draws < 1 or top < 0:
        raise InputError(f"draws={draws}, top={top}: at least 1 draw, and no negative number of images.")
    sides = [match_detections(side, index) for side in (a, b)]
    count = len(sides[0].image_ids)
    # The data set itself is the first column.
    weights = np.concatenate((np.ones((count, 1), np.int32), draw_images(count, draws, seed)), axis=1)
    drawn = [_precision(matches, weights) for matches in sides]
    better, worse = _changes(sides, score_threshold, top)
    return {
        "images": count,
        "draws": draws,
        "seed": seed,
        "score_threshold": score_threshold,
        "figures": {
            name: difference(*(mean_precision(side[area][:, thresholds]) for side in drawn))
            for name, (area, thresholds) in METRICS.items()
        },
        "per_class": {
            name: difference(*(side["all"][place].mean(axis=0) for side in drawn))
            for place, name in enumerate(sides[0].class_names)
        },
        "better": better,
        "worse": worse,
    }


def _precision(matches: MatchedDetections, weights: np.ndarray) -> dict[str, np.ndarray]:
    """AP (K, T, S) of each class, threshold and multiset, for each range of areas."""
    return {area: np.stack([average_precision(m, weights) for m in matches.by_class[area]]) for area in SIZES}


def mean_precision(precision: np.ndarray) -> np.ndarray:
    """Mean (S,) over classes and thresholds of AP (K, T, S); a class without an object, NaN, does not count."""
    present = ~np.isnan(precision)
    number = present.sum(axis=(0, 1))
    total = np.where(present, precision, 0.0).sum(axis=(0, 1))
    return np.divide(total, number, out=np.full(len(number), np.nan), where=number > 0)


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, float | None]:
    """b - a with its percentile interval; a, b: (1 + S,), the metric itself and then that of each draw.

    Draws in which the metric does not exist (no object of a rare class was drawn) are left out.
    """
    if np.isnan(a[0]) or np.isnan(b[0]):
        return dict.fromkeys(("a", "b", "difference", "low", "high", "b_better"))
    drawn = (b - a)[1:]
    drawn = drawn[~np.isnan(drawn)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else (None, None)
    won = (drawn > 0).mean() + (drawn == 0).mean() / 2 if len(drawn) else None
    values = {"a": a[0], "b": b[0], "difference": b[0] - a[0], "low": low, "high": high, "b_better": won}
    return {key: None if value is None else float(value) for key, value in values.items()}


def _changes(sides: Sequence[MatchedDetections], score_threshold: float, top: int) -> tuple[list[Any], list[Any]]:
    """The images that b gains most on, and those that it loses most on.

    Each: {"image_id", "change", "objects", "a", "b", "what"}. The change is the image's part of AP(b) - AP(a), see
    `contributions`; a and b count, at IoU 0.5 and above the score threshold, the objects "found" and the "false"
    alarms, and "placed", the mean share of the ten IoU thresholds that the found ones pass.
    """
    names = sides[0].class_names
    change = contributions(sides[1], score_threshold) - contributions(sides[0], score_threshold)
    # What others gain moves precision here too; only images that were detected differently are of interest.
    change[(_signature(sides[0]) == _signature(sides[1])).all(axis=0)] = 0.0
    order = np.argsort(-change, kind="stable")
    better = [i for i in order[:top] if change[i] > 0]
    worse = [i for i in order[::-1][:top] if change[i] < 0]
    seen = [_Seen.of(side, score_threshold) for side in sides]

    def entry(i: int) -> dict[str, Any]:
        return {
            "image_id": sides[0].image_ids[i],
            "change": float(change[i]),
            "objects": sum(int(m.objects[i]) for m in sides[0].by_class["all"]),
            "a": seen[0].summary(i),
            "b": seen[1].summary(i),
            "what": _in_words(seen[0], seen[1], i, names),
        }

    return [entry(i) for i in better], [entry(i) for i in worse]


def _signature(matches: MatchedDetections) -> np.ndarray:
    """(2K, M) numbers that are the same for two detectors where they found the same with the same scores."""
    size = len(matches.image_ids)
    classes = matches.by_class["all"]
    scores = [np.bincount(m.image, weights=m.score, minlength=size) for m in classes]
    hits = [np.bincount(m.image, weights=m.score * m.hit.sum(axis=0), minlength=size) for m in classes]
    return np.stack(scores + hits)


def contributions(matches: MatchedDetections, score_threshold: float) -> np.ndarray:
    """The part (M,) that each image has in AP.

    The part in a class: its AP, less what the other images alone reach times their share of the objects. An image as
    good as the others has its share of the AP, one whose objects are all missed has nothing, and one with nothing but
    false alarms has less than nothing. Together they are AP to about a tenth of it: what 101 recalls and a running
    maximum give is not smooth. An image has no part in a class of which it has neither an object nor a detection above
    the score threshold. Chosen by this project, after the jackknife's pseudo-values (Efron and Tibshirani 1993, section
    11.5).
    """
    once = np.ones((len(matches.image_ids), 1), np.int32)
    parts = np.zeros(len(matches.image_ids))
    classes = [m for m in matches.by_class["all"] if m.objects.any()]
    for m in classes:
        whole, others = average_precision(m, once).mean(), np.nan_to_num(leave_one_out(m, score_threshold))
        parts += whole - (1 - m.objects / m.objects.sum()) * others
    return parts / max(1, len(classes))


class _Seen(NamedTuple):
    """What one detector found above a score, at IoU 0.5: counts (K, M) of hits and of false alarms, and how many of the
    IoU thresholds the hits pass, together (M,)."""

    found: np.ndarray
    false: np.ndarray
    passed: np.ndarray

    @classmethod
    def of(cls, matches: MatchedDetections, score_threshold: float) -> _Seen:
        def count(m: ClassMatches, weights: np.ndarray) -> np.ndarray:
            return np.bincount(m.image, (m.score >= score_threshold) * weights, minlength=len(m.objects))

        classes = matches.by_class["all"]
        found = np.stack([count(m, m.hit[0]) for m in classes]).astype(int)
        false = np.stack([count(m, m.counted[0] & ~m.hit[0]) for m in classes]).astype(int)
        return cls(found, false, np.sum([count(m, m.hit[0] * m.hit.sum(axis=0)) for m in classes], axis=0))

    def summary(self, image: int) -> dict[str, Any]:
        found = int(self.found[:, image].sum())
        placed = float(self.passed[image] / (THRESHOLDS * found)) if found else None  # whole numbers: 0.7 is 7 of 10
        return {"found": found, "false": int(self.false[:, image].sum()), "placed": placed}


def _in_words(a: _Seen, b: _Seen, image: int, names: Sequence[str]) -> str:
    found, false = (b.found - a.found)[:, image], (b.false - a.false)[:, image]
    changes = {"found": found, "lost": -found, "new false alarms": false, "false alarms gone": -false}
    parts = [
        f"{what}: {', '.join(f'{count[label]} {names[label]}' for label in np.flatnonzero(count > 0).tolist())}"
        for what, count in changes.items()
        if (count > 0).any()
    ]
    before, after = (side.summary(image)["placed"] for side in (a, b))
    if before is not None and after is not None and abs(after - before) >= 0.05:
        parts.append(f"boxes {'tighter' if after > before else 'looser'}")
    return "; ".join(parts) or "scores only"


def format_comparison(result: Mapping[str, Any], a: str, b: str, images: int = 5) -> str:
    """What `compare` returned as text for a terminal or a Markdown page.

    Args:
        result: of `compare`.
        a, b: names of the two.
        images: how many of the images that changed are listed on each side.
    """
    rows = [
        [
            name,
            *(_number(row[key], form) for key, form in (("a", ".4f"), ("b", ".4f"), ("difference", "+.4f"))),
            None if row["low"] is None else f"{row['low']:+.4f} .. {row['high']:+.4f}",
            _number(row["b_better"], ".1%"),
        ]
        for name, row in [*result["figures"].items(), *result["per_class"].items()]
    ]
    table = markdown_table(("metric", "a", "b", "b - a", "95% interval", "b better"), rows)
    lines = [f"a: {a}", f"b: {b}", f"{result['images']} images, {result['draws']} draws", "", table]
    if len(result["per_class"]) > 1:
        lines.append(f"Of {len(result['per_class'])} intervals of classes about 1 in 20 leaves out 0 by chance.")
    for key in ("better", "worse"):
        if changed := result[key][:images]:
            rows = [[row.get("file_name") or row["image_id"], f"{row['change']:+.5f}", row["what"]] for row in changed]
            heads = ("image", "change of AP", f"{key} in b: what changed")
            lines += ["", markdown_table(heads, rows, align="lrl")]
    return "\n".join([*lines, "", verdict(result)])


def verdict(result: Mapping[str, Any]) -> str:
    """The answer in a sentence."""
    row = result["figures"]["AP"]
    if row["low"] is None:
        return "There is no object to find: nothing can be said."
    span = f"AP {row['difference']:+.4f}, 95% interval {row['low']:+.4f} to {row['high']:+.4f}"
    if row["low"] > 0:
        return f"b is better on images like these: {span}."
    if row["high"] < 0:
        return f"b is worse on images like these: {span}."
    return f"These images do not tell: {span} holds zero. More images, or a larger difference, would."


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)
