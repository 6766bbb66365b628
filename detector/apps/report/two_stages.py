"""The two stages seen apart: what the anchors can reach, what the RPN proposes, what the head makes of how many.

Backbone, RPN and thin map are computed once an image; the head runs again for each number of proposals. Proposals are
ranked, so that a smaller number is the beginning of the list: what a network with that limit would propose.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from detector.data.index import AnnotationIndex
from detector.data.preprocess import prepare, restore
from detector.data.progress import progress
from detector.data.results import Results
from detector.errors import InputError
from detector.evaluation.metrics import compute_metrics
from detector.evaluation.records import SIZES
from detector.inference.detections import Found
from detector.inference.detector import Detector
from detector.models.boxes import pairwise_iou

RECALL_AT = (10, 50, 100, 300, 1000)
BUDGETS = (10, 25, 50, 100, 200, 300, 1000)
IOUS = np.arange(10, 20) / 20  # 0.50:0.95, as COCO
EDGES = np.arange(21) / 20  # of the histogram of IoUs


def two_stages(
    detector: Detector, index: AnnotationIndex, *, limit: int | None = None, budgets: Sequence[int] = BUDGETS
) -> dict[str, Any]:
    """Run the detector image by image, with a progress bar, and measure each stage.

    An object is recalled at an IoU where some proposal reaches it, whatever its class; several objects may share a
    proposal. An object is out of the anchors' reach where no anchor of the padded input has the IoU with it that makes
    it foreground in training; its best anchor is foreground all the same (Ren et al. 2015, section 3.1.2), but it
    learns from a worse start. Crowd regions are left out. Sizes are COCO's, by the file's areas.

    Milliseconds are medians over the images, one image at a time on the detector's device, without reading, resizing
    and restoring boxes; the first images warm the machine up, so that few images tell little.

    Args:
        limit: the first images only; None takes all of the index.
        budgets: numbers of proposals; those above the network's limit are left out, and the limit itself is added.

    Returns:
        {"images": N, "limit": P of the network's test_limits,
         "recall": {"proposals": numbers of RECALL_AT up to the limit, and the limit,
                    "all", "small", "medium", "large": {"truths": count, "recall50": at IoU 0.5, "recall": mean over
                        0.50:0.95; one value in [0, 1] for each number, or None without objects}},
         "budgets": [{"proposals": n, "AP", "AP50": of the detections from n proposals, as
                        detector.evaluation.compute_metrics gives them, "ms": shared part and head}],
         "ms_shared": of backbone, neck, RPN and thin map,
         "anchors": {"foreground_iou": float, "edges": 21 bounds from 0 to 1,
                     "all", "small", "medium", "large": {"truths": count, "unmatched": share out of reach, None without
                        objects, "histogram": 20 counts of the best IoU}}}.

    Raises:
        InputError: limit or a budget is below 1, the classes are not the detector's, or an image cannot be read.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}: at least 1 image; leave it out to take all.")
    numbers, recall_at = _numbers(budgets, detector), _numbers(RECALL_AT, detector)
    if tuple(index.class_names) != detector.class_names:
        raise InputError(
            f"The data set has the classes {list(index.class_names)}, the detector {list(detector.class_names)}; "
            "take the data set that it was trained on, or one with the same classes."
        )
    places = range(len(index) if limit is None else min(limit, len(index)))
    _look(detector, index, places[0], numbers, recall_at)  # the first pass through a network is a slow one
    looks = [_look(detector, index, i, numbers, recall_at) for i in progress(places, "two stages")]
    milliseconds = 1000 * np.array([look.seconds for look in looks])  # (N, 1 + budgets)
    recall, anchors = _by_size(
        np.concatenate([look.reach for look in looks]),
        np.concatenate([look.anchor_iou for look in looks]),
        np.concatenate([index.areas[_objects(index, i)] for i in places]),
        detector.network.rpn.options.foreground_iou,
    )
    scored = index.select(places)
    rows = []
    for place, number in enumerate(numbers):
        metrics = compute_metrics(Results.of(places, [look.found[place] for look in looks]), scored)
        spent = float(np.median(milliseconds[:, 0] + milliseconds[:, place + 1]))
        rows.append({"proposals": number, "AP": metrics["AP"], "AP50": metrics["AP50"], "ms": spent})
    return {
        "images": len(looks),
        "limit": detector.proposal_limit,
        "recall": {"proposals": recall_at, **recall},
        "budgets": rows,
        "ms_shared": float(np.median(milliseconds[:, 0])),
        "anchors": anchors,
    }


class _Look(NamedTuple):
    """What one image told.

    Attributes:
        reach: (G, R) best IoU of each object with the first proposals, for each of R numbers of them.
        anchor_iou: (G,) best IoU of each object with an anchor.
        found: the detections from each number of proposals.
        seconds: of the shared part, then of the head with each number of proposals.
    """

    reach: np.ndarray
    anchor_iou: np.ndarray
    found: list[Found]
    seconds: list[float]


def _numbers(wanted: Sequence[int], detector: Detector) -> list[int]:
    """Ascending numbers of proposals up to the network's limit, which is the last."""
    limit = detector.proposal_limit
    if any(number < 1 for number in wanted):
        raise InputError(f"budgets={list(wanted)}: each is a number of proposals, 1 or more.")
    return sorted({number for number in wanted if number < limit} | {limit})


@torch.no_grad()
def _look(detector: Detector, index: AnnotationIndex, i: int, numbers: list[int], recall_at: list[int]) -> _Look:
    network, device = detector.network.eval(), detector.device
    (prepared,) = prepare([index.read(i)], detector.preprocessing)
    inputs = detector.inputs(prepared)
    clock = [_now(device)]
    regions = network.propose(*inputs)
    clock.append(_now(device))
    found = []
    for number in numbers:
        found += network.classify(regions, number).per_image()
        clock.append(_now(device))
    scale, size = prepared.scales[0], prepared.original_sizes[0].tolist()
    objects = torch.from_numpy(index.boxes[_objects(index, i)] * np.tile(scale, 2)).float().to(device)
    iou = pairwise_iou(regions.proposals.boxes[0], objects)  # (P, G), 0 where not valid: these boxes are empty
    arrays = [[tensor.cpu().numpy() for tensor in one] for one in found]
    return _Look(
        reach=iou.cummax(dim=0).values.cpu().numpy()[np.array(recall_at) - 1].T,
        anchor_iou=pairwise_iou(regions.anchors, objects).amax(dim=0).cpu().numpy(),
        found=[Found(restore(boxes, scale, size), scores, labels) for boxes, scores, labels in arrays],
        seconds=np.diff(clock).tolist(),
    )


def _by_size(
    reach: np.ndarray, anchor_iou: np.ndarray, areas: np.ndarray, foreground_iou: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Recall of the proposals and reach of the anchors, from best IoUs (G, R) and (G,), for objects of each size."""
    recall: dict[str, Any] = {}
    anchors: dict[str, Any] = {"foreground_iou": foreground_iou, "edges": EDGES.tolist()}
    for size, (low, high) in SIZES.items():
        chosen = (areas >= low) & (areas <= high)  # the bounds of a size belong to it, as in COCO
        hit, best = reach[chosen, :, None] >= IOUS, anchor_iou[chosen]  # (G, R, 10), (G,)
        recall[size] = {
            "truths": len(hit),
            "recall50": hit[:, :, 0].mean(axis=0).tolist() if len(hit) else None,
            "recall": hit.mean(axis=(0, 2)).tolist() if len(hit) else None,
        }
        anchors[size] = {
            "truths": len(best),
            "unmatched": float((best < foreground_iou).mean()) if len(best) else None,
            "histogram": np.histogram(best, EDGES)[0].tolist(),
        }
    return recall, anchors


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _objects(index: AnnotationIndex, i: int) -> np.ndarray:
    """Rows of the objects of image i that are no crowd regions."""
    rows = np.arange(index.offsets[i], index.offsets[i + 1])
    return rows[~index.crowd[rows]]
