"""What happens to a decoded training image before it becomes network input.

Crop, flips and colours in pixels of the image that is given (`dataset.py` has shrunk a large one), then one resize to a
drawn size and place: `windows.place`, the only one here.

Draws are made from a generator that `dataset.py` seeds for each image, by seed, rank, epoch and image.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, Self, TypeAlias

import numpy as np
from pydantic import Field, model_validator
from pydantic.types import Strict

from detector.data.pipeline import check_result, failures_named, load_pipeline
from detector.data.preprocess import STRIDE, Preprocessing
from detector.data.windows import MIN_SIDE, crop_by_iou, crop_whole, place
from detector.errors import InputError
from detector.options import Options, Share

# Factors on brightness and contrast, and on saturation: what another lamp, hour or camera does to a photograph. Chosen
# by this project, as all numbers here without another source.
_BRIGHTNESS, _SATURATION = (0.6, 1.4), (0.5, 1.5)
# In turns of the colour circle, 14 degrees: colours keep their names.
_HUE = (-0.04, 0.04)
_BLUR = (0.3, 1.5)  # standard deviation in pixels: a lens a little out of focus
_NOISE = (0.02, 0.06)  # standard deviation by the range of values: a camera at dusk
# Shares of the images that `photometric` changes: rarer, because they take away what small objects are known by.
_BLUR_SHARE, _GREY_SHARE = 1 / 5, 1 / 20
_LEAST_SIDE = 0.01  # of a box in pixels: what is left of one outside the image


# An image uint8 RGB (h, w, 3), its boxes (G, 4), labels (G,) and crowd flags (G,).
View: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Transformed(NamedTuple):
    """One image and its objects, ready to be padded.

    Attributes:
        image: uint8 RGB (h, w, 3).
        boxes: (G, 4) float32, xyxy in pixels of `image`, inside it.
        labels: (G,) int64.
        crowd: (G,) bool.
        scale: (2,) float64, input pixels per original pixel of the resize, (x, y). After a training transform it does
            not bring boxes back: crops, flips, windows and mosaics are not in it.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    scale: np.ndarray


# Bounds: what is drawn beyond them is no photograph any more, and takes all memory or ends in an error of OpenCV.
Factor = Annotated[float, Strict(), Field(ge=0.05), Field(le=20)]


class AugmentOptions(Options):
    """How training images are changed at random. The defaults are the released code of Li et al. 2017: mirroring."""

    flip: Share = 0.5
    """probability of left for right"""
    vertical_flip: Share = 0.0
    """probability of top for bottom"""
    rotate90: Share = 0.0
    """probability of a turn by a multiple of 90 degrees (0 is one of four)"""
    scale: tuple[Factor, Factor] = (1.0, 1.0)
    """lowest and highest size factor, drawn log-uniformly (Li et al. 2017: a single scale but in section 4.2)"""
    photometric: Share = 0.0
    """probability that brightness, contrast, saturation and hue change; blur, noise and grey come more rarely"""
    crop: Share = 0.0
    """probability of a crop that keeps all objects, where iou_crop made none"""
    iou_crop: Share = 0.0
    """probability of a crop that overlaps an object by a drawn IoU (Liu et al. 2016, SSD, section 2.2: 0.86)"""
    zoom_out: Share = 0.0
    """probability that the image lies, smaller, on a canvas of the mean colour (SSD's expansion: 0.5)"""
    zoom_out_factor: Annotated[float, Strict(), Field(ge=1), Field(le=20)] = 4.0
    """how many times the image's sides those of that canvas are at most"""
    stretch: tuple[Factor, Factor] = (1.0, 1.0)
    """lowest and highest factor on the ratio of width to height, drawn log-uniformly (NanoDet's configurations)"""
    batch_scale: tuple[Factor, Factor] = (1.0, 1.0)
    """lowest and highest size factor of a whole batch, in steps of 32 pixels of the long side (PicoDet: 0.6 to 1.2)"""
    mosaic: Share = 0.0
    """probability that parts of four images make one (YOLOX-Nano: 0.5); no crop, scale, stretch or zoom_out then"""
    mosaic_scale: tuple[Factor, Factor] = (0.5, 1.5)
    """lowest and highest size factor of each of the four, drawn log-uniformly (YOLOX-Nano)"""
    pipeline: str | None = None
    """YAML file of an albumentations pipeline (albumentations.save), in the place of `photometric`"""

    @model_validator(mode="after")
    def _are_ranges(self) -> Self:
        sizes = dict.fromkeys(("scale", "batch_scale", "mosaic_scale"), "the size")
        for name, unchanged in (sizes | {"stretch": "the ratio"}).items():
            low, high = getattr(self, name)
            if low > high:
                raise InputError(
                    f"augment.{name}=[{low}, {high}]: expected lowest <= highest; [1, 1] leaves {unchanged} alone."
                )
        return self


class TrainTransform:
    """Random crop, flips, colours, size and place; never larger than evaluation's image times the factor of the batch.

    A size factor above 1 zooms in: a window as large as the unchanged size is cut out, and objects with less than 30%
    of their area in it are left out, crowd regions with nothing in it. Where the view is zoomed out, the size is
    divided once more, and the image lies anywhere on its canvas. Objects below one pixel are left out. What a crop has
    left of an image just fits into the canvas of the whole, so that batches of one shape stay so.
    """

    def __init__(self, preprocessing: Preprocessing, options: AugmentOptions, *, seed: int) -> None:
        """
        Args:
            preprocessing: the size at factor 1.
            options: what is drawn.
            seed: sets the draws of an image by itself; in training they follow rank, epoch and image, too; >= 0.
        """
        self.preprocessing = preprocessing
        self.options = options
        self.seed = seed
        self._compose = _compose(options)
        # Seeded at the first call: by then the process knows its rank.
        self._generator: np.random.Generator | None = None

    def largest_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which every view of an image of this size is drawn from as many pixels as it has.

        That is its size at factor 1, times the largest factors, over the share of a side that a crop leaves at least;
        the size of the image where that is less.
        """
        options = self.options
        factor = max(self.batch_factors()) * max(1.0, options.scale[1], options.mosaic_scale[1] * (options.mosaic > 0))
        factor *= max(1.0, options.stretch[1], 1 / options.stretch[0]) ** 0.5
        factor /= MIN_SIDE if options.crop or options.iou_crop else 1
        target = self.preprocessing.target_size(height, width)
        return min(height, round(target[0] * factor)), min(width, round(target[1] * factor))

    def batch_factors(self) -> list[float]:
        """The size factors that a batch may have: those of whole strides on the long side, because canvases are."""
        low, high = self.options.batch_scale
        if low == high:
            return [low]
        side = self.preprocessing.long_side / STRIDE
        return [max(1, steps) / side for steps in range(round(low * side), round(high * side) + 1)]

    def reseed(self, *numbers: int) -> None:
        """Start another stream of draws: it depends on `seed`, the process's rank and these numbers (>= 0)."""
        numpy_seed, python_seed = np.random.SeedSequence((self.seed, process_rank(), *numbers)).spawn(2)
        self._generator = np.random.default_rng(numpy_seed)
        # Not set_random_seed: it gives every transform the same stream, so that all flips would happen together.
        self._python = random.Random(int(python_seed.generate_state(1, np.uint64)[0]))
        self._compose.set_random_state(self._generator, self._python)

    def partners(self, count: int) -> list[int]:
        """Draw which of `count` images make a mosaic with the next one: three, or none."""
        generator = self._started()
        return generator.integers(count, size=3).tolist() if generator.random() < self.options.mosaic else []

    def __call__(
        self,
        image: np.ndarray,
        boxes: np.ndarray,
        labels: np.ndarray,
        crowd: np.ndarray,
        factor: float = 1.0,
        partners: Sequence[View] = (),
    ) -> Transformed:
        """Draw one view of an image. The arguments are not written to.

        Args:
            image: uint8 RGB (h, w, 3).
            boxes: (G, 4) float32, xyxy in pixels of the image.
            labels: (G,) int64.
            crowd: (G,) bool.
            factor: on the size, the same for all images of a batch: one of `batch_factors`.
            partners: three more images with their objects, for a mosaic of the size that the first one would have.
        """
        generator = self._started()
        target = np.array(self.preprocessing.target_size(*image.shape[:2])) * factor
        # One index comes back for each box that is left; labels and flags need not pass through float32.
        rows = np.arange(len(boxes))
        if partners:
            image, boxes, labels, crowd = self._mosaic([(image, boxes, labels, crowd), *partners], target, factor)
            rows = np.arange(len(boxes))
        elif generator.random() < self.options.iou_crop:
            image, boxes, rows = crop_by_iou(image, boxes, crowd, generator)
        elif generator.random() < self.options.crop:
            image, boxes = crop_whole(image, boxes, generator)
        height, width = image.shape[:2]
        image, boxes, rows = self._change(image, boxes, rows)
        if height != width and image.shape[:2] == (width, height):  # turned by 90 degrees
            target = target[::-1]
        size, canvas = (
            (_whole(target), _whole(target)) if partners else self._draw_size(np.array(image.shape[:2]), target)
        )
        scale = np.array([size[1] / image.shape[1], size[0] / image.shape[0]])
        image, boxes, kept = place(image, boxes, crowd[rows], size, canvas, generator)
        return Transformed(image, boxes, labels[rows][kept], crowd[rows][kept], scale)

    def _started(self) -> np.random.Generator:
        if self._generator is None:
            self.reseed(0)
        assert self._generator is not None
        return self._generator

    def _change(self, image: np.ndarray, boxes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """Flips, turns and colours: the image, the boxes that are left, and the rows of these.

        Raises:
            InputError: the user's own pipeline fails on this image, or makes none of it that a network takes.
        """
        with failures_named(self.options.pipeline, image.shape):
            out: dict[str, Any] = self._compose(image=image, bboxes=boxes, rows=rows)
            check_result(out["image"])
        return out["image"], np.asarray(out["bboxes"], np.float32).reshape(-1, 4), np.asarray(out["rows"], np.int64)

    def _draw_size(self, shape: np.ndarray, target: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width to resize an image of this shape to, and of a canvas that is no larger than the target.

        At factor 1 the image, or what a crop has left of it, just fits in there: batches need no larger canvas.
        """
        generator = self._started()
        factor, stretch = np.exp(generator.uniform(*np.log([self.options.scale, self.options.stretch]).T))
        sides = shape * (target / shape).min() * factor * stretch ** np.array([-0.5, 0.5])
        canvas = _whole(np.minimum(sides, target))
        if generator.random() < self.options.zoom_out:
            sides /= generator.uniform(1, self.options.zoom_out_factor)
        return _whole(sides), canvas

    def _mosaic(self, views: Sequence[View], target: np.ndarray, factor: float) -> View:
        """A part of each of four images, in the quarters of one: they meet anywhere in its middle half (YOLOX)."""
        generator = self._started()
        height, width = np.maximum(_whole(target), 2).tolist()
        y, x = (max(1, int(side * generator.uniform(0.25, 0.75))) for side in (height, width))
        quarters = ((0, 0, y, x), (0, x, y, width), (y, 0, height, x), (y, x, height, width))
        whole = np.empty((height, width, 3), np.uint8)
        objects: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for (image, boxes, labels, crowd), (top, left, bottom, right) in zip(views, quarters, strict=True):
            drawn = factor * np.exp(generator.uniform(*np.log(self.options.mosaic_scale)))
            size = _whole(np.array(self.preprocessing.target_size(*image.shape[:2])) * drawn)
            part, cut, rows = place(image, boxes, crowd, size, (bottom - top, right - left), generator)
            whole[top:bottom, left:right] = part
            objects.append((cut + np.array([left, top, left, top], np.float32), labels[rows], crowd[rows]))
        boxes, labels, crowd = map(np.concatenate, zip(*objects, strict=True))
        return whole, boxes, labels, crowd


def _whole(sides: np.ndarray) -> tuple[int, int]:
    height, width = sides.round().astype(int).clip(1).tolist()
    return height, width


def process_rank() -> int:
    """The rank of this process among those that train together; 0 where there is one.

    Torch is asked where it runs distributed; before that, or in a spawned worker, the launcher's variables are.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 0


def _compose(options: AugmentOptions) -> Any:
    """The albumentations part: flips, turns and colours, or the user's pipeline."""
    # Read at import time: without it, albumentations asks the network for its newest version.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations as A

    steps: list[Any] = [
        A.HorizontalFlip(p=options.flip),
        A.VerticalFlip(p=options.vertical_flip),
        A.RandomRotate90(p=options.rotate90),
        *(_colours(options.photometric) if options.pipeline is None else [load_pipeline(options.pipeline)]),
    ]
    return A.Compose(
        steps,
        # Nothing built in cuts objects off, so one check at the end will do; clip and filter absorb rounding, and what
        # the user's crops leave of objects outside: a box without area, which is refused elsewhere.
        bbox_params=A.BboxParams(
            format="pascal_voc",
            label_fields=["rows"],
            clip=True,
            filter_invalid_bboxes=True,
            min_width=_LEAST_SIDE,
            min_height=_LEAST_SIDE,
            check_each_transform=False,
        ),
    )


def _colours(probability: float) -> list[Any]:
    import albumentations as A

    return [
        A.ColorJitter(brightness=_BRIGHTNESS, contrast=_BRIGHTNESS, saturation=_SATURATION, hue=_HUE, p=probability),
        A.OneOf(
            [A.GaussianBlur(sigma_limit=_BLUR, p=1), A.GaussNoise(std_range=_NOISE, p=1)],
            p=probability * _BLUR_SHARE,
        ),
        A.ToGray(p=probability * _GREY_SHARE),
    ]
