"""Does an export find what the checkpoint finds? Differences, average precision and latency, side by side.

The gate: an export passes where its AP is at most so much below torch's, and, in float, where it agrees with torch on
nearly every confident detection. Boxes alone would let a tie decide, AP alone would let a data set without objects.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import numpy as np

from detector.data.boxes import box_iou
from detector.inference.detections import Found
from detector.inference.predictor import Predictor

REFERENCE = "torch"
# Turns of each contestant that are not timed: lazy initialisation, and torch's compilation for a size.
WARM_UP = 3
# A partner has the same class and at least this IoU ...
PARTNER_IOU = 0.5
# ... and agrees from this IoU on, with a score this near: a wrong graph misses both by far, rounding never does.
AGREEING_IOU, AGREEING_SCORE = 0.95, 0.01
CONFIDENT = 0.05
# Share of torch's confident detections that a float export may miss: ties in suppression.
MAX_DISAGREEMENT = 0.01


@dataclass(frozen=True)
class Difference:
    """Between two results on the same image, or the worst over many images.

    Attributes:
        box: largest difference of a coordinate between partners, in pixels of the original image.
        score: largest difference of a score between partners.
        partners: detections of the reference that have a partner.
        total: detections of the reference.
        confident, agreeing: detections of the reference with a score of CONFIDENT, and those whose partner agrees.
        extra: detections with a score of CONFIDENT that are no partner of any of the reference's.
    """

    box: float = 0.0
    score: float = 0.0
    partners: int = 0
    total: int = 0
    confident: int = 0
    agreeing: int = 0
    extra: int = 0

    def worst(self, other: Difference) -> Difference:
        """The larger differences of both, and the sums of their counts."""
        one, two = astuple(self), astuple(other)
        return Difference(*map(max, one[:2], two[:2]), *map(operator.add, one[2:], two[2:]))


def difference(reference: Found, found: Found) -> Difference:
    """Match by class and IoU, best first, each detection at most once; the nearer score wins among equal boxes."""
    free = np.ones(len(found.scores), bool)
    pairs: list[tuple[float, float]] = []  # differences of boxes and of scores
    agreeing = 0
    confident, overlaps = reference.scores >= CONFIDENT, box_iou(reference.boxes, found.boxes)
    for i, label in enumerate(reference.labels if len(found.scores) else ()):
        gap = np.abs(found.scores - reference.scores[i])
        fit = np.where(free & (found.labels == label), overlaps[i] - 1e-3 * gap, -1.0)
        j = int(fit.argmax())
        if overlaps[i, j] < PARTNER_IOU or fit[j] < 0:
            continue
        free[j] = False
        pairs.append((float(np.abs(found.boxes[j] - reference.boxes[i]).max()), float(gap[j])))
        agreeing += bool(confident[i] and overlaps[i, j] >= AGREEING_IOU and gap[j] <= AGREEING_SCORE)
    box, score = np.max([(0.0, 0.0), *pairs], axis=0).tolist()
    extra = int((found.scores[free] >= CONFIDENT).sum())
    return Difference(box, score, len(pairs), len(confident), int(confident.sum()), agreeing, extra)


@dataclass
class Trial:
    """What one contestant did: detections per image, seconds per image, and its difference from the reference."""

    found: list[Found] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    difference: Difference = field(default_factory=Difference)


def take_turns(contestants: Mapping[str, Predictor], images: Iterable[np.ndarray]) -> dict[str, Trial]:
    """All contestants predict every image, one after another, alone: batch 1, from decoded image to boxes.

    Args:
        contestants: by name; REFERENCE is what the others are compared with.
        images: uint8 RGB (h, w, 3) each; read one at a time.
    """
    records = {name: Trial() for name in contestants}
    for number, image in enumerate(images):
        for name, predictor in contestants.items():
            for _ in range(WARM_UP if number == 0 else 0):
                predictor.detect_images([image])
            start = time.perf_counter()
            found = predictor.detect_images([image])
            records[name].seconds.append(time.perf_counter() - start)
            records[name].found += found
        for record in records.values():
            of_image = difference(records[REFERENCE].found[-1], record.found[-1])
            record.difference = record.difference.worst(of_image)
    return records


@dataclass(frozen=True)
class Comparison:
    """One contestant in the table.

    Attributes:
        name: REFERENCE, the format, or what else took part.
        precision: "float32" or "int8".
        file_bytes: of the file, or of both.
        difference: from the reference, over all images.
        ap: average precision in points, 0 to 100; None where the images hold no object.
        drop: points below the reference.
        p50_ms, p90_ms: milliseconds an image.
        ratio: how many times faster than the reference: the median over the images.
        complaints: why it fails the gate; empty where it passes.
    """

    name: str
    precision: str
    file_bytes: int
    difference: Difference
    ap: float | None
    drop: float | None
    p50_ms: float
    p90_ms: float
    ratio: float
    complaints: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {"passed": not self.complaints}


def compare_contestants(
    records: Mapping[str, Trial],
    average_precision: Callable[[Sequence[Found]], float | None],
    *,
    files: Mapping[str, int],
    precisions: Mapping[str, str],
    max_drop: Mapping[str, float],
) -> list[Comparison]:
    """The table, the reference first.

    Args:
        records: of `take_turns`.
        average_precision: of the detections of all images, in their order; in [0, 1].
        files: bytes of each contestant's file.
        precisions: of each export; others take part for comparison, in float32, and cannot fail.
        max_drop: points of AP that an export of each precision may lose.
    """

    def points(record: Trial) -> float | None:
        share = average_precision(record.found)
        return None if share is None else 100 * share

    reference = records[REFERENCE]
    wanted, turns = points(reference), np.array(reference.seconds)
    rows = []
    for name, record in records.items():
        ap, seconds = points(record), np.array(record.seconds)
        drop = None if ap is None or wanted is None else wanted - ap
        p50, p90 = (1000 * np.percentile(seconds, (50, 90))).tolist()
        ratio = float(np.median(turns / seconds))
        complaints: Iterable[str] = ()
        if precision := precisions.get(name):
            complaints = _complaints(record.difference, wanted, drop, precision, max_drop[precision])
        about = precision or "float32", files[name], record.difference
        rows.append(Comparison(name, *about, ap, drop, p50, p90, ratio, tuple(complaints)))
    return sorted(rows, key=lambda row: row.name != REFERENCE)


def _complaints(
    found: Difference, wanted: float | None, drop: float | None, precision: str, allowed: float
) -> Iterable[str]:
    # not <=: a drop that is no number must fail.
    if drop is not None and not drop <= allowed:
        yield f"AP is {drop:.2f} points lower; {allowed:g} are allowed"
    if precision != "float32":
        if not wanted:
            yield "the checkpoint's own AP is 0, or the images hold no object: a loss could not be seen"
        return
    if not found.confident:
        yield f"the checkpoint finds nothing with a score of {CONFIDENT} in these images: nothing was compared"
    differing = found.confident - found.agreeing + found.extra
    if differing > MAX_DISAGREEMENT * found.confident:
        yield f"{differing} of {found.confident} confident detections differ"
