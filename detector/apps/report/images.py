"""The worst images as a report shows them: small JPEGs within a budget, and the boxes to draw over them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from detector.data.index import AnnotationIndex
from detector.data.preprocess import resize
from detector.data.results import Results
from detector.errors import InputError
from detector.evaluation.outcomes import judge
from detector.evaluation.records import sort_records
from detector.evaluation.worst import worst

# Longest side and JPEG quality, the best first; the last is taken whatever it costs (even noise has under 100 kB).
_SIZES = ((800, 82), (720, 75), (600, 70), (480, 65), (360, 55), (280, 40))
# The rest of an image's hundreds of detections are faint and lie over each other.
_DETECTIONS, _OBJECTS = 80, 300


def worst_images(
    shown: Sequence[Mapping[str, Any]], results: Results, index: AnnotationIndex, budget: int
) -> list[dict[str, Any]]:
    """The worst images as the page needs them, with all their detections: the reader chooses the threshold.

    Args:
        shown: what detector.evaluation.worst.worst returned for one threshold.
        results, index: what it was made of.
        budget: bytes for all images together, as text.

    Returns:
        {"name", "words", "width", "height": of the original, "jpeg": data URI,
         "detections": [{"b": xywh in pixels of the original, "c": class, "s": score, "k": kind,
            "o": place in "objects" of the object that it found or is wrong about, -1 without one}], best first,
         "objects": [{"b", "c", "crowd"}]} of each, in the order of `shown`.

    An image that cannot be read is a grey area that says so.
    """
    places = [index.place[row["image_id"]] for row in shown]
    complete = worst(judge(sort_records(results.select(places), index.select(places))), 0.0, len(places), flawless=True)
    by_id = {row["image_id"]: row for row in complete}
    label = {name: number for number, name in enumerate(index.class_names)}
    entries = []
    for old, i in zip(shown, places, strict=True):
        row = by_id[old["image_id"]]
        words = f"{len(row['truths'])} objects, error sum {old['badness']:.3g}"
        try:
            image = index.read(i)
            height, width = image.shape[:2]
        except InputError as error:
            words += f"; {error}"
            height, width = _frame(index, i, row)
            longest = max(height, width)
            image = np.full((max(1, 64 * height // longest), max(1, 64 * width // longest), 3), 127, np.uint8)
        objects = row["truths"][:_OBJECTS]
        detections = row["detections"][:_DETECTIONS]
        entries.append(
            {
                "name": row["file_name"] or f"image {row['image_id']}",
                "words": words,
                "width": width,
                "height": height,
                "jpeg": jpeg_uri(image, budget // len(shown)),
                "detections": [
                    _box(one, label)
                    | {
                        "s": round(one["score"], 4),
                        "k": one["kind"],
                        "o": one["truth"] if one["truth"] in range(len(objects)) else -1,
                    }
                    for one in detections
                ],
                "objects": [_box(one, label) | {"crowd": one["state"] == "crowd"} for one in objects],
            }
        )
    return entries


def _frame(index: AnnotationIndex, i: int, row: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of an image that cannot be read: declared, else what holds its objects."""
    if index.sizes[i].all():
        return int(index.sizes[i][0]), int(index.sizes[i][1])
    corners = np.array([one["bbox"] for one in row["truths"]]).reshape(-1, 2, 2).sum(axis=1)
    width, height = corners.max(axis=0, initial=1).astype(int).tolist()
    return height, width


def _box(row: Mapping[str, Any], label: Mapping[str, int]) -> dict[str, Any]:
    return {"b": [round(side, 1) for side in row["bbox"]], "c": label[row["name"]]}


def jpeg_uri(image: np.ndarray, budget: int) -> str:
    """An image, uint8 RGB (h, w, 3), as a JPEG data URI: as large and as good as `budget` characters allow."""
    from PIL import Image

    uri = ""
    for side, quality in _SIZES:
        share = min(1.0, side / max(image.shape[:2]))
        image = resize(image, *(max(1, round(length * share)) for length in image.shape[:2]))
        data = io.BytesIO()
        Image.fromarray(image).save(data, "JPEG", quality=quality, optimize=True)
        uri = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
        if len(uri) <= budget:
            break
    return uri
