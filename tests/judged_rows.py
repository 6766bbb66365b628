"""Random results with every kind of error, and what a plain reading of COCO's and TIDE's rules makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np

Rows = list[dict[str, Any]]


def random_rows(seed: int, *, crowds: bool = True, images: int = 6, classes: int = 3) -> tuple[dict[str, Any], Rows]:
    """A ground truth of small images and results: shifted, doubled, misnamed and invented boxes; no equal scores."""
    rng = np.random.default_rng(seed)
    category_ids = [7 - 2 * k for k in range(classes)]  # descending: COCO's order is by id
    pictures = [{"id": 50 - i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in range(images)]
    truths: Rows = []
    results: Rows = []
    for picture in pictures:
        image_id = picture["id"]
        for _ in range(rng.integers(0, 6)):
            x, y, width, height = (*rng.uniform(0, 60, 2), *rng.uniform(5, 40, 2))
            label = int(rng.choice(category_ids))
            truths.append(
                {
                    "id": len(truths),
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [float(v) for v in (x, y, width, height)],
                    "area": float(width * height * rng.uniform(0.5, 1)),
                    "iscrowd": int(crowds and rng.random() < 0.15),
                }
            )
            for _ in range(rng.integers(0, 4)):
                moved = (x + rng.normal() * 0.25 * width, y + rng.normal() * 0.25 * height)
                box = (*moved, width * rng.uniform(0.7, 1.4), height * rng.uniform(0.7, 1.4))
                found = label if rng.random() < 0.7 else int(rng.choice(category_ids))
                results.append(_result(image_id, found, box, rng))
        for _ in range(rng.integers(0, 3)):
            box = (*rng.uniform(0, 60, 2), *rng.uniform(5, 40, 2))
            results.append(_result(image_id, int(rng.choice(category_ids)), box, rng))
    categories = [{"id": k, "name": f"class {k}"} for k in category_ids]
    return {"images": pictures, "annotations": truths, "categories": categories}, results


def _result(image_id: int, category_id: int, box: Any, rng: np.random.Generator) -> dict[str, Any]:
    score = float(rng.uniform(0.05, 1))
    return {"image_id": image_id, "category_id": category_id, "bbox": [float(v) for v in box], "score": score}


def box_iou(box: list[float], truth: list[float], crowd: bool = False) -> float:
    """Of two xywh boxes; with a crowd region, over the detection's area."""
    width = min(box[0] + box[2], truth[0] + truth[2]) - max(box[0], truth[0])
    height = min(box[1] + box[3], truth[1] + truth[3]) - max(box[1], truth[1])
    inside = max(width, 0.0) * max(height, 0.0)
    union = box[2] * box[3] + (0.0 if crowd else truth[2] * truth[3] - inside)
    return inside / union if union > 0 else 0.0


def naive_kinds(ground_truth: dict[str, Any], results: Rows) -> tuple[list[str], list[int | None]]:
    """Kind of each result, and the place of the annotation that it found or is wrong about; one loop for each rule."""
    kinds, about = [""] * len(results), [None] * len(results)
    truths = ground_truth["annotations"]
    taken: set[int] = set()
    for d in sorted(range(len(results)), key=lambda d: -results[d]["score"]):
        row = results[d]
        best, best_iou = None, 0.5
        for g, truth in enumerate(truths):
            usable = truth["image_id"] == row["image_id"] and truth["category_id"] == row["category_id"]
            if usable and not truth["iscrowd"] and g not in taken:
                iou = box_iou(row["bbox"], truth["bbox"])
                if iou >= best_iou:
                    best, best_iou = g, iou
        if best is not None:
            taken.add(best)
            kinds[d], about[d] = "correct", best
            continue
        own, other = (0.0, None), (0.0, None)
        for g, truth in enumerate(truths):
            if truth["image_id"] != row["image_id"]:
                continue
            same = truth["category_id"] == row["category_id"]
            if truth["iscrowd"]:
                if same and box_iou(row["bbox"], truth["bbox"], True) >= 0.5:
                    kinds[d] = "ignored"
                continue
            iou = box_iou(row["bbox"], truth["bbox"])
            if same and iou > own[0]:
                own = (iou, g)
            if not same and iou > other[0]:
                other = (iou, g)
        if kinds[d]:
            continue
        if 0.1 <= own[0] <= 0.5:
            kinds[d], about[d] = "localisation", own[1]
        elif other[0] >= 0.5:
            kinds[d], about[d] = "classification", other[1]
        elif own[0] >= 0.5:
            kinds[d], about[d] = "duplicate", own[1]
        elif other[0] <= 0.1:
            kinds[d] = "background"
        else:
            kinds[d], about[d] = "both", other[1]
    return kinds, about
