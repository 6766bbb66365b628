"""From anything that shows a picture to results in its pixels, whatever runs the network. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from detector.data.preprocess import Preprocessing, group_by_canvas, pad, restore_boxes
from detector.errors import InputError
from detector.inference.detections import Detections
from detector.inference.sources import Picture, Reading, is_count, read_pictures
from detector.inference.tiles import Found, Tiling, merge_flipped, merge_tiles, mirror_boxes

ON_ERROR = ("raise", "report")


@dataclass(frozen=True)
class Options:
    """What `Predictor.predict` takes beside the source; its docstring says what each is.

    Raises:
        InputError: a value that none of them can have.
    """

    score_threshold: float = 0.3
    classes: Sequence[str | int] | None = None
    max_proposals: int | None = None
    tile: Sequence[int] | None = None
    flip: bool = False
    batch_size: int = 8
    on_error: str = "raise"
    bgr: bool = False
    every: int = 1
    max_pixels: int | None = None
    allow_private: bool = False

    def __post_init__(self) -> None:
        if not is_count(self.batch_size):
            raise InputError(f"batch_size={self.batch_size}; expected a whole number, 1 or more.")
        threshold = self.score_threshold
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise InputError(f"score_threshold={threshold}; expected a number from 0 to 1.")
        if self.max_proposals is not None and not is_count(self.max_proposals):
            raise InputError(f"max_proposals={self.max_proposals}; expected a whole number, 1 or more, or None.")
        if self.on_error not in ON_ERROR:
            raise InputError(f"on_error={self.on_error!r}; expected one of {', '.join(ON_ERROR)}.")
        # They check themselves.
        _ = self.reading, self.tiling

    @property
    def reading(self) -> Reading:
        """What concerns the sources."""
        return Reading(self.bgr, self.every, self.max_pixels, self.allow_private)

    @property
    def tiling(self) -> Tiling | None:
        """How large pictures are cut."""
        return None if self.tile is None else Tiling.parse(self.tile)

    def labels(self, class_names: Sequence[str]) -> list[int] | None:
        """`classes` as indices; None: all. Raises InputError for a class that there is not."""
        if self.classes is None:
            return None
        given = [self.classes] if isinstance(self.classes, str | int) else self.classes
        return [_label(one, class_names) for one in given]


class Predictor(ABC):
    """What predicts: a Detector in torch, or an exported one in another runtime.

    Attributes:
        class_names: label -> name.
        preprocessing: how a picture becomes network input.
    """

    class_names: tuple[str, ...]
    preprocessing: Preprocessing

    @abstractmethod
    def find(self, images: np.ndarray, image_sizes: np.ndarray) -> list[Found]:
        """Run the network.

        Args:
            images: uint8 RGB (N, 3, H, W), padded to one canvas.
            image_sizes: (N, 2), height and width inside the padding.

        Returns:
            Per picture: boxes float32 xyxy in pixels of the padded input, scores, labels.
        """

    def find_among(self, images: np.ndarray, image_sizes: np.ndarray, max_proposals: int) -> list[Found]:
        """As `find`, with the best proposals only: fewer RoIs for the head.

        Raises:
            InputError: this predictor's number of proposals is fixed.
        """
        raise InputError(
            f"max_proposals={max_proposals}: this detector's number of proposals was fixed when it was exported; leave "
            f"the option out, or predict with the checkpoint."
        )

    def predict(
        self,
        source: Any,
        *,
        score_threshold: float = 0.3,
        classes: Sequence[str | int] | None = None,
        max_proposals: int | None = None,
        tile: Sequence[int] | None = None,
        flip: bool = False,
        batch_size: int = 8,
        on_error: str = "raise",
        bgr: bool = False,
        every: int = 1,
        max_pixels: int | None = None,
        allow_private: bool = False,
    ) -> list[Detections]:
        """Find objects in pictures. Always a list, one `Detections` per picture or video frame, in the order given.

        Args:
            source: a path, a pattern such as "*.jpg", a folder (its pictures, sorted, with subfolders), an address, the
                bytes of a file, a PIL image, a numpy array (h, w, 3) in RGB, a torch tensor (3, h, w), a video, a
                stream, a camera, or a list or generator of any of them: see detector.inference.sources.
            score_threshold: detections below are left out; 0 gives all that the network's own threshold leaves.
            classes: names, or indices into `class_names`, to keep; None: all.
            max_proposals: at most so many candidate regions are looked at: faster, and what stands out least is
                missed first. None: as many as the detector was made for, which more than that is too.
            tile: (width, height, overlap) in pixels of the picture: what is larger is also searched tile by tile, for
                objects too small to see in the whole; merged as `merge_tiles` says. Detections below the
                score_threshold take no part in that.
            flip: also search the mirror image, for twice the time; merged as `merge_flipped` says.
            batch_size: pictures that go through the network at once, and that are in memory. It does not change
                results.
            on_error: "raise" an InputError at the first picture that cannot be read, after the results of those before
                it; or "report": its place is taken by Detections without boxes, whose `error` says why, and the rest is
                done.
            bgr: arrays and tensors are in OpenCV's channel order.
            every: of videos and streams, frames 0, every, 2 * every ...
            max_pixels: picture files that declare more are refused; None: Pillow's limit, 179 million.
            allow_private: addresses may lead to this machine and the local network: see detector.inference.remote.

        Raises:
            InputError: an option that cannot be; a picture is missing or unreadable, the message names it.
        """
        return list(
            self.stream(
                source,
                score_threshold=score_threshold,
                classes=classes,
                max_proposals=max_proposals,
                tile=tile,
                flip=flip,
                batch_size=batch_size,
                on_error=on_error,
                bgr=bgr,
                every=every,
                max_pixels=max_pixels,
                allow_private=allow_private,
            )
        )

    def stream(self, source: Any, **options: Any) -> Iterator[Detections]:
        """As `predict`, batch by batch: for more pictures than fit in memory, and for what has no end.

        Args:
            source, options: see `predict`. Frames of a camera or a stream do not wait for a batch to fill.
        """
        return (found for _, found in self.search(source, Options(**options)))

    def search(self, source: Any, options: Options) -> Iterator[tuple[Picture, Detections]]:
        """As `stream`, each with the picture itself: to draw on it, or to cut from it."""
        # Not a generator itself: a wrong class is told here, not at the first picture.
        return self._search(source, options, options.labels(self.class_names))

    def _search(self, source: Any, options: Options, labels: list[int] | None) -> Iterator[tuple[Picture, Detections]]:
        for chunk in _chunks(read_pictures(source, options.reading), options.batch_size):
            readable = [picture for picture in chunk if picture.error is None]
            results = iter(self._detections(readable, options))
            for picture in chunk:
                if picture.error is not None and options.on_error == "raise":
                    raise picture.error
                found = self._failure(picture) if picture.error is not None else next(results)
                yield picture, found if labels is None else found.of(labels)

    def predict_images(self, images: Sequence[np.ndarray], paths: Sequence[str | None]) -> list[Detections]:
        """All that the network finds in decoded pictures, uint8 RGB (h, w, 3) each, in one batch per canvas size."""
        return [
            Detections(*found, self.class_names, _size(image), path)
            for found, image, path in zip(self._look(images), images, paths, strict=True)
        ]

    def _detections(self, pictures: Sequence[Picture], options: Options) -> list[Detections]:
        tiling = options.tiling
        if tiling is None:
            looks = self._look([picture.image for picture in pictures], options)
        else:
            looks = [self._look_closely(picture.image, tiling, options) for picture in pictures]
        return [
            Detections(*found, self.class_names, _size(one.image), one.path, one.frame, one.time).above(
                options.score_threshold
            )
            for found, one in zip(looks, pictures, strict=True)
        ]

    def _look_closely(self, image: np.ndarray, tiling: Tiling, options: Options) -> Found:
        """The whole picture and its tiles, a batch at a time."""
        size = _size(image)
        whole = np.array([[0, 0, size[1], size[0]]])
        regions = np.concatenate((whole, tiling.regions(*size)))
        found: list[Found] = []
        for start in range(0, len(regions), options.batch_size):
            chunk = regions[start : start + options.batch_size]
            looks = self._look([image[y1:y2, x1:x2] for x1, y1, x2, y2 in chunk], options)
            for (boxes, scores, labels), corner in zip(looks, np.tile(chunk[:, :2], 2), strict=True):
                keep = scores >= options.score_threshold
                found.append(((boxes + corner).astype(np.float32)[keep], scores[keep], labels[keep]))
        return merge_tiles(found, regions, size) if len(regions) > 1 else found[0]

    def _look(self, images: Sequence[np.ndarray], options: Options | None = None) -> list[Found]:
        """What the network finds in each picture, boxes in its pixels."""
        budget = options.max_proposals if options else None
        straight = self._look_once(images, budget)
        if options is None or not options.flip:
            return straight
        mirrored = self._look_once([np.ascontiguousarray(image[:, ::-1]) for image in images], budget)
        return [
            merge_flipped(one, (mirror_boxes(boxes, image.shape[1]), scores, labels))
            for one, (boxes, scores, labels), image in zip(straight, mirrored, images, strict=True)
        ]

    def _look_once(self, images: Sequence[np.ndarray], budget: int | None) -> list[Found]:
        resized = [self.preprocessing(image) for image in images]
        results: dict[int, Found] = {}
        for group in group_by_canvas([image.shape[:2] for image in resized]):
            sizes = np.array([resized[i].shape[:2] for i in group], np.int64)
            canvas = pad([resized[i] for i in group])
            found = self.find(canvas, sizes) if budget is None else self.find_among(canvas, sizes, budget)
            for i, (boxes, scores, labels) in zip(group, found, strict=True):
                scale = input_scale(images[i].shape, resized[i].shape)
                results[i] = restore_boxes(boxes, scale, _size(images[i])), scores, labels
        return [results[i] for i in range(len(images))]

    def _failure(self, picture: Picture) -> Detections:
        nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)
        return Detections(*nothing, self.class_names, (0, 0), picture.path, error=str(picture.error))


def input_scale(original: tuple[int, ...], resized: tuple[int, ...]) -> np.ndarray:
    """Input pixels per original pixel, (x, y), from (height, width, ...) before and after the resize."""
    return np.array([resized[1] / original[1], resized[0] / original[0]])


def _size(image: np.ndarray) -> tuple[int, int]:
    return image.shape[0], image.shape[1]


def _chunks(pictures: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    """Batches of a size; one that cannot be read, or that is live, ends its batch: it must not wait for others."""
    chunk: list[Picture] = []
    for picture in pictures:
        chunk.append(picture)
        if len(chunk) == size or picture.live or picture.error is not None:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _label(given: Any, class_names: Sequence[str]) -> int:
    if isinstance(given, str) and given in class_names:
        return class_names.index(given)
    if isinstance(given, int | np.integer) and not isinstance(given, bool) and 0 <= given < len(class_names):
        return int(given)
    known = ", ".join(f"{index}: {name}" for index, name in enumerate(class_names))
    raise InputError(f"classes: there is no {given!r}; this detector knows {known}.")
