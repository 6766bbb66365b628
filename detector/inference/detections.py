"""What prediction gives for one image: Detections, numpy arrays in pixels of the original image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from detector.errors import InputError, require

if TYPE_CHECKING:
    import pandas
    import supervision
    from PIL.Image import Image


# The columns of `Detections.rows` and `Detections.to_pandas`.
ROW_COLUMNS = ("path", "frame", "time", "label", "name", "score", "x1", "y1", "x2", "y2")


@dataclass(frozen=True)
class Found:
    """What a network finds in one image, best first; whoever gives one says in which frame the boxes are.

    Attributes:
        boxes: (D, 4) float32, xyxy in pixels.
        scores: (D,) float32 in [0, 1], descending.
        labels: (D,) int64, index into class_names.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[Found]) -> Found:
        """All of them, one after the other; their order is the caller's affair."""
        return cls(*(np.concatenate([getattr(one, key.name) for one in parts]) for key in fields(cls)))

    def __post_init__(self) -> None:
        count = len(self.scores)
        if self.boxes.shape != (count, 4) or self.labels.shape != (count,):
            raise ValueError(
                f"Detections: boxes {self.boxes.shape}, scores {self.scores.shape}, labels {self.labels.shape}; "
                f"expected (D, 4), (D,), (D,)"
            )

    def __len__(self) -> int:
        return len(self.scores)

    def where(self, keep: np.ndarray | slice) -> Self:
        """The detections that a mask (D,), an index array or a slice keeps."""
        return replace(self, boxes=self.boxes[keep], scores=self.scores[keep], labels=self.labels[keep])


@dataclass(frozen=True)
class Detections(Found):
    """What was found in one image, best first.

    Attributes:
        boxes, scores, labels: as of Found; boxes in pixels of the original image, inside it.
        class_names: the names that labels index.
        image_size: height and width of the original image.
        path: where the image came from: a file, an address (without user name and password), a camera; None for what
            was in memory.
        frame: of a video: its number, from 0.
        time: of a video: seconds since its first frame.
        error: why the image could not be read (`on_error="report"`); then there are no boxes, and no size, (0, 0).
    """

    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    path: str | None = None
    frame: int | None = None
    time: float | None = None
    error: str | None = None

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        return [self.class_names[label] for label in self.labels]

    def above(self, threshold: float) -> Detections:
        """The detections with score >= threshold."""
        return self.where(self.scores >= threshold)

    def of(self, labels: Sequence[int]) -> Detections:
        """The detections of these classes, indices into class_names."""
        return self.where(np.isin(self.labels, np.asarray(labels, np.int64)))

    def to_coco(self, image_id: Any, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """COCO's results format: xywh boxes in original pixels.

        Args:
            image_id: the id that the annotation file uses for this image.
            category_ids: the data set's id of each class; None counts 1, 2, 3 ... in the order of class_names.
        """
        ids = range(1, len(self.class_names) + 1) if category_ids is None else category_ids
        rows = self.boxes.astype(np.float64)
        rows[:, 2:] -= rows[:, :2]
        return [
            {"image_id": image_id, "category_id": int(ids[label]), "bbox": row, "score": score}
            for row, label, score in zip(rows.tolist(), self.labels, self.scores.tolist(), strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON; the fields of the class and `names`."""
        return {
            "path": self.path,
            "frame": self.frame,
            "time": self.time,
            "height": self.image_size[0],
            "width": self.image_size[1],
            "boxes": self.boxes.tolist(),
            "scores": self.scores.tolist(),
            "labels": self.labels.tolist(),
            "names": self.names,
            "error": self.error,
        }

    def to_json(self) -> str:
        """`to_dict` as one line without a line break at its end: a line of a JSON Lines file."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def rows(self) -> list[dict[str, Any]]:
        """One flat dict of plain values for each detection: a line of a table."""
        columns = self.labels.tolist(), self.names, self.scores.tolist(), *self.boxes.T.tolist()
        origin = self.path, self.frame, self.time
        return [dict(zip(ROW_COLUMNS, (*origin, *row), strict=True)) for row in zip(*columns, strict=True)]

    def to_pandas(self) -> pandas.DataFrame:
        """A table of ROW_COLUMNS, a line for each detection.

        Raises:
            InputError: pandas is not installed.
        """
        pandas = require("pandas", package="pandas", what="to_pandas")
        return pandas.DataFrame(self.rows(), columns=list(ROW_COLUMNS))

    def to_supervision(self) -> supervision.Detections:
        """For Roboflow's `supervision`: xyxy, confidence, class_id, and the names as data["class_name"].

        Raises:
            InputError: supervision is not installed.
        """
        supervision = require("supervision", package="supervision", what="to_supervision")
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32),
            confidence=self.scores.astype(np.float32),
            class_id=self.labels.astype(np.int64),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def crop(self, image: Any = None, *, bgr: bool = False) -> list[np.ndarray]:
        """The part of the image inside each box, rounded outwards to whole pixels: uint8 RGB (h, w, 3) copies.

        Args:
            image: anything that shows the image; None reads `path` again.
            bgr: an array is OpenCV's BGR, as of `predict`.

        Raises:
            InputError: there is no image to cut from, or it has another size than the one that was searched.
        """
        searched = self._read(image, bgr)
        height, width = self.image_size
        corners = np.floor(self.boxes[:, :2]).astype(int).clip(0, (width - 1, height - 1))
        ends = np.maximum(np.ceil(self.boxes[:, 2:]).astype(int), corners + 1)
        return [searched[y1:y2, x1:x2].copy() for (x1, y1), (x2, y2) in zip(corners, ends, strict=True)]

    def draw(self, image: Any = None, threshold: float = 0.0, *, bgr: bool = False) -> Image:
        """A copy of the image with boxes, names and scores drawn on it.

        Args:
            image: anything that `predict` takes; None reads `path` again.
            threshold: detections below this score are not drawn; 0 draws all that there are.
            bgr: an array is OpenCV's BGR, as of `predict`.

        Raises:
            InputError: no image was given and the detections do not come from a file.
        """
        from detector.inference.drawing import class_colour, draw_boxes

        shown = self.above(threshold).where(slice(None, None, -1))  # the best is drawn last, on top
        texts = [f"{name}  {score:.2f}" for name, score in zip(shown.names, shown.scores, strict=True)]
        return draw_boxes(
            self._read(image, bgr), shown.boxes, texts, [class_colour(int(label)) for label in shown.labels]
        )

    def _read(self, image: Any, bgr: bool) -> np.ndarray:
        """The image that was searched, uint8 RGB (h, w, 3): the given one, or `path` once more for None."""
        from PIL import Image

        from detector.data.images import read_image

        if image is None:
            if self.path is None or self.frame is not None or self.error is not None or "://" in self.path:
                raise InputError(
                    "the detections do not come from an image file that can be read again: give the image, "
                    "draw(image), crop(image)."
                )
            image = self.path
        # It was searched, perhaps with a larger limit than Pillow's.
        height, width = self.image_size
        pixels = read_image(image, bgr=bgr, max_pixels=max(height * width, Image.MAX_IMAGE_PIXELS or 0))
        if pixels.shape[:2] != tuple(self.image_size):
            raise InputError(
                f"the image is {pixels.shape[1]}x{pixels.shape[0]}, the detections belong to one of "
                f"{self.image_size[1]}x{self.image_size[0]}; give the image that was searched."
            )
        return pixels
