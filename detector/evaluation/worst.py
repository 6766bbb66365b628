"""The images on which a detector is worst, with each detection and object labelled, ready to be drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from detector.evaluation.outcomes import CROWD, FOUND, KINDS, STATES, Outcomes


def worst(outcomes: Outcomes, score_threshold: float, count: int = 12, flawless: bool = False) -> list[dict[str, Any]]:
    """Rank the images by badness: 1 for each object that was not found, and the score of each wrong detection.

    Only detections of at least the threshold count and are listed. The badness is chosen by this project: a
    confident mistake is as bad as a missed object. Equally bad images are in the order of their ids; flawless ones are
    left out.

    Args:
        count: how many images at most.
        flawless: images without a mistake are not left out.

    Returns:
        The worst first, [{"image_id", "file_name", "badness": float,
        "detections": [{"name": class, "bbox": xywh in pixels of the original image, "score",
            "kind": one of outcomes.KINDS, "iou", "truth": place in "truths" of the object that it found or is wrong
            about, None without one}], best first,
        "truths": [{"name": class, "bbox", "state": one of outcomes.STATES}]}].
    """
    records = outcomes.records
    shown = records.results.scores >= score_threshold
    states = outcomes.states(score_threshold)
    wrong = shown & outcomes.wrong
    unfound = records.index.images[(states != FOUND) & (states != CROWD)]
    images = len(records.index)
    badness = np.bincount(unfound, minlength=images) + np.bincount(
        records.results.images[wrong], weights=records.results.scores[wrong], minlength=images
    )
    names, rows = records.index.class_names, list(records.per_image())

    def entry(objects: slice, found: slice) -> dict[str, Any]:
        detections = [
            {
                "name": names[records.results.labels[d]],
                "bbox": records.results.boxes[d].tolist(),
                "score": float(records.results.scores[d]),
                "kind": KINDS[outcomes.kind[d]],
                "iou": float(outcomes.iou[d]),
                "truth": int(outcomes.about[d] - objects.start) if outcomes.about[d] >= 0 else None,
            }
            for d in found.start + np.flatnonzero(shown[found])
        ]
        truths = [
            {"name": names[label], "bbox": box.tolist(), "state": STATES[state]}
            for label, box, state in zip(
                records.index.labels[objects], records.index.xywh[objects], states[objects], strict=True
            )
        ]
        return {"detections": detections, "truths": truths}

    return [
        {
            "image_id": records.index.image_ids[i],
            "file_name": records.index.file_names[i],
            "badness": float(badness[i]),
            **entry(*rows[i]),
        }
        for i in np.argsort(-badness, kind="stable")[:count].tolist()
        if flawless or badness[i] > 0
    ]
