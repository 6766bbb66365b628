"""The worst pictures as a report shows them: small JPEGs within a budget, and the boxes to draw over them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from detector.data.annotations import AnnotationIndex
from detector.data.preprocess import resize
from detector.data.results import Results
from detector.evaluation.outcomes import judge
from detector.evaluation.records import sort_records
from detector.evaluation.worst import worst

# Longest side and JPEG quality, the best first; the last is taken whatever it costs (even noise has under 100 kB).
_SIZES = ((800, 82), (720, 75), (600, 70), (480, 65), (360, 55), (280, 40))
# The rest of a picture's hundreds of detections are faint and lie over each other.
_DETECTIONS, _TRUTHS = 80, 300


def worst_at_any_threshold(
    shown: Sequence[Mapping[str, Any]], results: Results, index: AnnotationIndex
) -> list[dict[str, Any]]:
    """The images of `shown` in its order, with all their detections: the reader chooses the threshold.

    Args:
        shown: what detector.evaluation.worst.worst returned for one threshold.
        results, index: what it was made of.
    """
    place = {image_id: i for i, image_id in enumerate(index.image_ids)}
    places = [place[row["image_id"]] for row in shown]
    complete = worst(judge(sort_records(results.select(places), index.select(places))), 0.0, len(places))
    by_id = {row["image_id"]: row for row in complete}
    # An image without a mistake at threshold 0 is not among the worst there.
    return [{**by_id.get(old["image_id"], old), "badness": old["badness"]} for old in shown]


def picture_entries(
    pictures: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    read: Callable[[Any], np.ndarray],
    budget: int,
) -> Iterator[dict[str, Any]]:
    """What the page needs of each picture.

    Args:
        pictures: as `worst` returns them.
        class_names: boxes name their class by its place here.
        read: uint8 RGB (h, w, 3) of an image id, in the frame of its boxes.
        budget: bytes for all pictures together, as text.

    Yields:
        {"name", "words", "width", "height": of the original, "jpeg": data URI,
         "detections": [{"b": xywh in pixels of the original, "c": class, "s": score, "k": kind,
            "o": place in "objects" of the object that it found or is wrong about, -1 without one}], best first,
         "objects": [{"b", "c", "crowd"}]}.
    """
    place = {name: i for i, name in enumerate(class_names)}
    for picture in pictures:
        image = read(picture["image_id"])
        height, width = image.shape[:2]
        truths = picture["truths"][:_TRUTHS]
        name = picture["file_name"] or f"image {picture['image_id']}"
        yield {
            "name": name,
            "words": f"{len(picture['truths'])} objects, badness {picture['badness']:.3g}",
            "width": width,
            "height": height,
            "jpeg": jpeg_uri(image, budget // len(pictures)),
            "detections": [
                {
                    "b": [round(side, 1) for side in row["bbox"]],
                    "c": place[row["name"]],
                    "s": round(row["score"], 4),
                    "k": row["kind"],
                    "o": -1 if row["truth"] is None or row["truth"] >= len(truths) else row["truth"],
                }
                for row in picture["detections"][:_DETECTIONS]
            ],
            "objects": [
                {
                    "b": [round(side, 1) for side in row["bbox"]],
                    "c": place[row["name"]],
                    "crowd": row["state"] == "crowd",
                }
                for row in truths
            ],
        }


def jpeg_uri(image: np.ndarray, budget: int) -> str:
    """A picture, uint8 RGB (h, w, 3), as a JPEG data URI: as large and as good as `budget` characters allow."""
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
