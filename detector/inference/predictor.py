"""From anything that shows an image to results in its pixels, whatever runs the network. No torch here."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self, TypeAlias

import numpy as np
from pydantic import BeforeValidator
from pydantic.types import Strict

from detector.data.preprocess import Prepared, Preprocessing, prepare, restore
from detector.errors import InputError
from detector.inference.detections import Detections, Found
from detector.inference.sources import ReadingOptions, SourceImage, read_images
from detector.inference.tiles import Tiling, merge_flipped, merge_tiles, mirror_boxes
from detector.options import Count, Flag, Share

# Where nothing is known of a detector's scores.
USUAL_THRESHOLD = 0.3
ScoreThreshold: TypeAlias = Annotated[
    Literal["auto"] | Share | dict[Annotated[int, Strict()] | str, Share] | tuple[Share, ...],
    "a number from 0 to 1, auto, or a number for each class",
]
_NOTHING = Found(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


def _as_tile(value: Any) -> Any:
    if value is not None:
        Tiling.parse(value)
    return value


class SearchOptions(ReadingOptions):
    """How a source is read and searched."""

    score_threshold: ScoreThreshold = "auto"
    """Detections below are left out: a number, one for each class, {car: 0.5}; auto: the checkpoint's own, or 0.3."""
    classes: str | int | tuple[Any, ...] | None = None
    """Names, or numbers, of the classes to keep, [car,2]; null: all."""
    max_proposals: Count | None = None
    """At most so many candidate regions: faster, misses what stands out least; null: all of the network's."""
    tile: Annotated[tuple[int, int, int] | None, BeforeValidator(_as_tile)] = None
    """[width,height,overlap] in pixels: also search large images tile by tile, for objects too small in the whole."""
    flip: Flag = False
    """Also search the mirror image: twice the time."""
    batch_size: Count = 8
    """Images in memory, and in the network, at once; does not change results."""


class PredictOptions(SearchOptions):
    """What `Predictor.predict` takes beside the source."""

    on_error: Literal["raise", "report"] = "raise"
    """At an image that cannot be read: raise, after the results before it, or report, in `Detections.error`."""
    bgr: Flag = False
    """Arrays and tensors are in OpenCV's channel order."""

    @classmethod
    def of(cls, values: dict[str, Any]) -> PredictOptions:
        """From keyword arguments. Raises InputError for a name or a value that cannot be."""
        if unknown := values.keys() - cls.model_fields.keys():
            raise InputError(f"predict: there is no option {min(unknown)}; there is {', '.join(cls.model_fields)}.")
        return cls.parse(values)

    def labels(self, class_names: Sequence[str]) -> list[int] | None:
        """`classes` as indices; None: all. Raises InputError for a class that there is not."""
        if self.classes is None:
            return None
        given = (self.classes,) if isinstance(self.classes, str | int) else self.classes
        return [_label("classes", one, class_names) for one in given]

    def lowest(self, class_names: Sequence[str], thresholds: Sequence[float] | None) -> np.ndarray:
        """`score_threshold` of each class, (K,) float32. Raises InputError where it is not for these classes.

        Args:
            class_names: of the detector.
            thresholds: of each class, as the detector knows them; what auto is, and what a class has that is not named.
        """
        given = self.score_threshold
        values = np.array(thresholds or [USUAL_THRESHOLD] * len(class_names), np.float32)
        if isinstance(given, tuple) and len(given) != len(values):
            raise InputError(f"score_threshold: {len(given)} numbers, but this detector has {len(values)} classes.")
        if isinstance(given, dict):
            hint = "; or one number for each class"  # a command line has no quotes there
            labels = [_label("score_threshold", name, class_names, hint) for name in given]
            values[labels] = list(given.values())
        elif given != "auto":
            values[:] = given
        return values


class Predictor(ABC):
    """What predicts: a Detector in torch, or an exported one in another runtime.

    Attributes:
        class_names: label -> name.
        preprocessing: how an image becomes network input.
        canvas: height and width of every input; None: the smallest that holds an image.
        proposal_limit: the most that `max_proposals` can be; None: their number is fixed.
        thresholds: of each class, what `score_threshold="auto"` is; None: not known.
    """

    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    canvas: tuple[int, int] | None = None
    proposal_limit: int | None = None
    thresholds: tuple[float, ...] | None = None

    @abstractmethod
    def detect(self, prepared: Prepared, max_proposals: int | None = None) -> list[Found]:
        """Run the network.

        Args:
            prepared: images on one canvas.
            max_proposals: the best proposals only, fewer RoIs for the head; None: all.

        Returns:
            For each image, with boxes in pixels of the padded input.

        Raises:
            InputError: this predictor's number of proposals is fixed, and max_proposals is not None.
        """

    def detect_prepared(self, batches: Iterable[Prepared], max_proposals: int | None = None) -> list[Found]:
        """What the network finds in all batches that `prepare` made, in the order of the images given to it.

        Returns:
            For each image, with boxes in pixels of the original image.

        Raises:
            InputError: max_proposals does not fit, or the network gives numbers that are not finite, or
                classes without a name.
        """
        self.check_proposals(max_proposals)
        results: dict[int, Found] = {}
        for batch in batches:
            found = self.detect(batch, max_proposals)
            for place, one, scale, size in zip(batch.places, found, batch.scales, batch.original_sizes, strict=True):
                if not (np.isfinite(one.boxes).all() and np.isfinite(one.scores).all()):
                    raise InputError(
                        "The network gives boxes or scores that are not finite: its weights are damaged, or its "
                        "training went astray; take another checkpoint."
                    )
                if (label := one.labels.max(initial=-1)) >= len(self.class_names):
                    raise InputError(
                        f"The network finds class {label}, and only {len(self.class_names)} classes have names in its "
                        "file, which is damaged: export the checkpoint again."
                    )
                results[int(place)] = replace(one, boxes=restore(one.boxes, scale, size))
        return [results[place] for place in range(len(results))]

    def detect_images(self, images: Sequence[np.ndarray], max_proposals: int | None = None) -> list[Found]:
        """Prepare, detect, restore: all that the network finds in decoded images, in one batch per canvas size.

        Args:
            images: uint8 RGB (h, w, 3) each.
            max_proposals: see `detect`.

        Returns:
            For each image, with boxes in pixels of the original image.
        """
        return self.detect_prepared(prepare(images, self.preprocessing, self.canvas), max_proposals)

    def check_proposals(self, max_proposals: int | None) -> None:
        """Raises InputError where a number is given, and this predictor's is fixed."""
        if max_proposals is not None and self.proposal_limit is None:
            raise InputError(
                f"max_proposals={max_proposals}: this detector's number of proposals was fixed when it was exported; "
                f"leave the option out, or predict with the checkpoint."
            )

    def on_canvas(self, canvas: tuple[int, int] | None) -> Self:
        """The same network, every input padded to this height and width: what an export of a fixed size does."""
        other = copy.copy(self)
        other.canvas = canvas
        return other

    def predict(self, source: Any, **options: Any) -> list[Detections]:
        """Find objects in images. Always a list, one `Detections` per image or video frame, in the order given.

        Args:
            source: a path, a pattern such as "*.jpg", a folder (its images and videos, sorted, with subfolders), an
                address, the bytes of a file, a PIL image, a numpy array (h, w, 3) in RGB, a torch tensor (3, h, w), a
                video, a stream, a camera, or a list or generator of any of them: see detector.inference.sources.
            options: those of PredictOptions: score_threshold="auto", classes=None, max_proposals=None, tile=None ...

        Raises:
            InputError: an option that cannot be; an image is missing or unreadable, the message names it.
        """
        return list(self.stream(source, **options))

    def stream(self, source: Any, **options: Any) -> Iterator[Detections]:
        """As `predict`, batch by batch: for more images than fit in memory, and for what has no end.

        Args:
            source, options: see `predict`. Frames of a camera or a stream do not wait for a batch to fill.
        """
        return (found for _, found in self.search(source, PredictOptions.of(options)))

    def search(self, source: Any, options: PredictOptions) -> Iterator[tuple[SourceImage, Detections]]:
        """As `stream`, each with the image itself: to draw on it, or to cut from it."""
        # Not a generator itself: a wrong class is told here, not at the first image.
        lowest = options.lowest(self.class_names, self.thresholds)
        return self._search(source, options, options.labels(self.class_names), lowest)

    def _search(
        self, source: Any, options: PredictOptions, labels: list[int] | None, lowest: np.ndarray
    ) -> Iterator[tuple[SourceImage, Detections]]:
        for chunk in _chunks(read_images(source, options, bgr=options.bgr), options.batch_size):
            readable = [item for item in chunk if item.error is None]
            results = iter(self._detections(readable, options, lowest))
            for item in chunk:
                if item.error is not None and options.on_error == "raise":
                    raise item.error
                found = self._of(item, _NOTHING) if item.error is not None else next(results)
                yield item, found if labels is None else found.of(labels)

    def _detections(
        self, items: Sequence[SourceImage], options: PredictOptions, lowest: np.ndarray
    ) -> list[Detections]:
        images = [item.image for item in items]
        if options.tile:
            results = [self._detect_tiles(image, Tiling(*options.tile), options, lowest) for image in images]
        else:
            results = self._detect(images, options)
        detections = (self._of(item, found) for found, item in zip(results, items, strict=True))
        return [found.where(found.scores >= lowest[found.labels]) for found in detections]

    def _detect_tiles(self, image: np.ndarray, tiling: Tiling, options: PredictOptions, lowest: np.ndarray) -> Found:
        """The whole image and its tiles, a batch at a time."""
        size = _size(image)
        whole = np.array([[0, 0, size[1], size[0]]])
        regions = np.concatenate((whole, tiling.regions(*size)))
        looks: list[Found] = []
        for start in range(0, len(regions), options.batch_size):
            chunk = regions[start : start + options.batch_size]
            found = self._detect([image[y1:y2, x1:x2] for x1, y1, x2, y2 in chunk], options)
            for one, corner in zip(found, np.tile(chunk[:, :2], 2), strict=True):
                kept = one.where(one.scores >= lowest[one.labels])
                looks.append(replace(kept, boxes=(kept.boxes + corner).astype(np.float32)))
        return merge_tiles(looks, regions, size) if len(regions) > 1 else looks[0]

    def _detect(self, images: Sequence[np.ndarray], options: PredictOptions) -> list[Found]:
        straight = self.detect_images(images, options.max_proposals)
        if not options.flip:
            return straight
        mirrored = self.detect_images([np.ascontiguousarray(image[:, ::-1]) for image in images], options.max_proposals)
        return [
            merge_flipped(one, replace(other, boxes=mirror_boxes(other.boxes, image.shape[1])))
            for one, other, image in zip(straight, mirrored, images, strict=True)
        ]

    def _of(self, item: SourceImage, found: Found) -> Detections:
        about = _size(item.image), item.path, item.frame, item.time, None if item.error is None else str(item.error)
        return Detections(found.boxes, found.scores, found.labels, self.class_names, *about)


def _size(image: np.ndarray) -> tuple[int, int]:
    return image.shape[0], image.shape[1]


def _chunks(items: Iterable[SourceImage], size: int) -> Iterator[list[SourceImage]]:
    """Batches of a size; one that cannot be read, or that is live, ends its batch: it must not wait for others.

    Nor is what came before an error of the caller's generator lost.
    """
    chunk: list[SourceImage] = []
    source = iter(items)
    while True:
        try:
            item = next(source)
        except Exception as error:
            if chunk:
                yield chunk
            if isinstance(error, StopIteration):
                return
            raise
        chunk.append(item)
        if len(chunk) == size or item.live or item.error is not None:
            yield chunk
            chunk = []


def _label(option: str, given: Any, class_names: Sequence[str], hint: str = "") -> int:
    """The class that is meant: a text is a name. A whole number is an index; where a class has that name, too, it may
    be either, and is neither unless both are the same."""
    number = isinstance(given, int | np.integer) and not isinstance(given, bool)
    meant = {int(given)} if number and 0 <= given < len(class_names) else set()
    if (number or isinstance(given, str)) and str(given) in class_names:
        meant.add(class_names.index(str(given)))
    if len(meant) == 1:
        return meant.pop()
    if meant:
        raise InputError(
            f'{option}: {given} is the number of class "{class_names[given]}" and the name of another one; give the '
            f'name as a text, "{given}" or "{class_names[given]}"{hint}.'
        )
    known = ", ".join(f"{index}: {name}" for index, name in enumerate(class_names))
    raise InputError(f"{option}: there is no {given!r}; this detector knows {known}.")
