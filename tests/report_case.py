"""Three images with known mistakes, and class names that would break a page that trusted them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = {3: "cat", 8: '<b>&"</script><script>alert(1)</script>', 5: "http://elsewhere.example/\u2028"}
CAT, ODD = 3, 8
SIZES = {11: (120, 90), 7: (64, 100), 20: (80, 80)}  # width, height
OBJECTS: list[tuple[int, int, list[float], int]] = [
    (11, CAT, [10, 10, 40, 40], 0),
    (11, CAT, [60, 10, 30, 40], 0),
    (11, ODD, [10, 60, 30, 20], 0),
    (7, ODD, [5, 5, 40, 60], 0),
    (7, CAT, [5, 70, 20, 20], 0),
    (20, CAT, [10, 10, 30, 30], 0),
    (20, CAT, [40, 40, 40, 40], 1),
]
# Image, class, box, score, and what it is.
FOUND: list[tuple[int, int, list[float], float, str]] = [
    (11, CAT, [10, 10, 40, 40], 0.9, "correct"),
    (11, CAT, [12, 10, 40, 40], 0.8, "duplicate"),
    (11, CAT, [75, 10, 30, 40], 0.7, "localisation"),
    (11, CAT, [10, 60, 30, 20], 0.6, "classification"),
    (7, ODD, [5, 5, 40, 60], 0.5, "correct"),
    (7, ODD, [50, 90, 10, 10], 0.95, "background"),
    (20, CAT, [10, 10, 30, 30], 0.4, "correct"),
    (20, CAT, [42, 42, 36, 36], 0.3, "ignored"),
    (20, ODD, [60, 0, 10, 10], 0.97, "background"),
    (7, CAT, [40, 0, 8, 8], 0.1, "background"),
]


def write_case(folder: Path) -> Path:
    """The images in images/, gt.json and dt.json. Returns the folder."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for image_id, (width, height) in SIZES.items():
        noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        noise.resize((width, height)).save(folder / "images" / f"{image_id}.png")
    (folder / "gt.json").write_text(json.dumps(ground_truth()))
    (folder / "dt.json").write_text(json.dumps(results()))
    return folder


def ground_truth() -> dict[str, Any]:
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": width, "height": height} for i, (width, height) in SIZES.items()
        ],
        "annotations": [
            {"id": place + 1, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": crowd}
            for place, (i, c, b, crowd) in enumerate(OBJECTS)
        ],
        "categories": [{"id": i, "name": name} for i, name in CLASSES.items()],
    }


def results() -> list[dict[str, Any]]:
    return [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s, _ in FOUND]


def boxes_shown(threshold: float, kinds: set[str], category: int | None = None) -> int:
    """How many boxes a page draws on the images, all of which have errors: worked out from the tables above."""
    found = [row for row in FOUND if row[3] >= threshold and row[4] in kinds and category in (None, row[1])]
    return len(found) + sum(
        _state(place, threshold) in kinds for place, row in enumerate(OBJECTS) if category in (None, row[1])
    )


# The detection that decides on each object, by its score; 0.6 takes the third object for a cat.
_FINDS = {0: 0.9, 3: 0.5, 5: 0.4}
_MISTAKES = {1: 0.7, 2: 0.6}


def _state(place: int, threshold: float) -> str:
    if OBJECTS[place][3]:
        return "crowd"
    if _FINDS.get(place, -1) >= threshold:
        return "found"
    return "mistaken" if _MISTAKES.get(place, -1) >= threshold else "missed"
