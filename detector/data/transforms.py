"""What happens to a decoded training image before it becomes network input.

Crop, flips and colours in pixels of the image that is given (`dataset.py` has shrunk a large one), then one resize to a
drawn size: `preprocess.resize`, the only one here.

Draws are made from generators that each loader worker seeds for itself (`dataset.seed_worker`).
"""

from __future__ import annotations

import os
import random
import sys
from typing import Any, NamedTuple, Self

import numpy as np
from pydantic import model_validator

from detector.data.preprocess import Preprocessing, resize
from detector.errors import InputError
from detector.options import Options, Positive, Share

# Share of an object that the window cuts: with less of it in sight, nobody could tell what it is. Chosen by this
# project, as all numbers here without another source.
_MIN_VISIBLE = 0.3
# A crop keeps at least this share of each side (Liu et al. 2016, SSD, section 2.2, takes 0.1 to 1 of the area).
_MIN_CROP_SIDE = 0.3
# Factors on brightness and contrast, and on saturation: what another lamp, hour or camera does to a photograph.
_BRIGHTNESS, _SATURATION = (0.6, 1.4), (0.5, 1.5)
# In turns of the colour circle, 14 degrees: colours keep their names.
_HUE = (-0.04, 0.04)
_BLUR = (0.3, 1.5)  # standard deviation in pixels: a lens a little out of focus
_NOISE = (0.02, 0.06)  # standard deviation by the range of values: a camera at dusk
# Shares of the images that `photometric` changes: rarer, because they take away what small objects are known by.
_BLUR_SHARE, _GREY_SHARE = 1 / 5, 1 / 20


class Transformed(NamedTuple):
    """One image and its objects, ready to be padded.

    Attributes:
        image: uint8 RGB (h, w, 3).
        boxes: (G, 4) float32, xyxy in pixels of `image`, inside it.
        labels: (G,) int64.
        crowd: (G,) bool.
        scale: (2,) float64, input pixels per original pixel of the resize, (x, y). After a training transform it does
            not bring boxes back: crops, flips and windows are not in it.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    scale: np.ndarray


class AugmentOptions(Options):
    """How training images are changed at random. The defaults are the released code of Li et al. 2017: mirroring."""

    flip: Share = 0.5
    """probability of left for right"""
    vertical_flip: Share = 0.0
    """probability of top for bottom"""
    rotate90: Share = 0.0
    """probability of a turn by a multiple of 90 degrees (0 is one of four)"""
    scale: tuple[Positive, Positive] = (1.0, 1.0)
    """lowest and highest size factor, drawn log-uniformly (Li et al. 2017: a single scale but in section 4.2)"""
    photometric: Share = 0.0
    """probability that brightness, contrast, saturation and hue change; blur, noise and grey come more rarely"""
    crop: Share = 0.0
    """probability of a crop that keeps all objects"""

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise InputError(
                f"augment.scale={list(self.scale)}: expected lowest <= highest; [1, 1] leaves the size alone."
            )
        return self


class TrainTransform:
    """Random crop, flips, colours and size; never larger than the image that evaluation would see.

    Every object stays whole in the crop. A size factor above 1 zooms in: a window as large as the unchanged size is
    cut out, and objects with less than 30% of their area in it are left out, crowd regions with nothing in it.
    Objects below one pixel are left out.
    """

    def __init__(self, preprocessing: Preprocessing, options: AugmentOptions, *, seed: int) -> None:
        """
        Args:
            preprocessing: the size at factor 1.
            options: what is drawn.
            seed: sets the draws, together with the rank and, in loader workers, with the worker's own seed; >= 0.
        """
        self.preprocessing = preprocessing
        self.options = options
        self.seed = seed
        self._compose = _compose(options)
        # Seeded at the first call: by then the process knows its rank.
        self._generator: np.random.Generator | None = None

    def largest_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which every view of an image of this size is drawn from as many pixels as it has.

        That is its size at factor 1, times the largest factor, over the share of a side that a crop leaves at least;
        the size of the image where that is less.
        """
        factor = max(1.0, self.options.scale[1]) / (_MIN_CROP_SIDE if self.options.crop else 1)
        target = self.preprocessing.target_size(height, width)
        return min(height, round(target[0] * factor)), min(width, round(target[1] * factor))

    def reseed(self, worker_seed: int) -> None:
        """Start another stream of draws: it depends on `seed`, the process's rank and this number (>= 0)."""
        numpy_seed, python_seed = np.random.SeedSequence((self.seed, process_rank(), worker_seed)).spawn(2)
        self._generator = np.random.default_rng(numpy_seed)
        # Not set_random_seed: it gives every transform the same stream, so that all flips would happen together.
        self._python = random.Random(int(python_seed.generate_state(1, np.uint64)[0]))
        self._compose.set_random_state(self._generator, self._python)

    def state(self) -> dict[str, Any] | None:
        """Where the draws stand, in plain types; None before the first."""
        if self._generator is None:
            return None
        return {"numpy": self._generator.bit_generator.state, "python": self._python.getstate()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` said."""
        self.reseed(0)
        assert self._generator is not None
        self._generator.bit_generator.state = state["numpy"]
        self._python.setstate(state["python"])

    def __call__(self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, crowd: np.ndarray) -> Transformed:
        """Draw one view of an image. The arguments are not written to.

        Args:
            image: uint8 RGB (h, w, 3).
            boxes: (G, 4) float32, xyxy in pixels of the image.
            labels: (G,) int64.
            crowd: (G,) bool.
        """
        if self._generator is None:
            self.reseed(0)
        assert self._generator is not None
        if self._generator.random() < self.options.crop:
            image, boxes = _crop(image, boxes, self._generator)
        # One index comes back for each box that is left; labels and flags need not pass through float32.
        rows = np.arange(len(boxes))
        out: dict[str, Any] = self._compose(image=image, bboxes=boxes, rows=rows)
        rows = np.asarray(out["rows"], np.int64)
        boxes = np.asarray(out["bboxes"], np.float32).reshape(-1, 4)
        return self._resize(out["image"], boxes, labels[rows], crowd[rows])

    def _resize(self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, crowd: np.ndarray) -> Transformed:
        """Resize to a drawn size, and cut out a window where that is larger than the size at factor 1."""
        assert self._generator is not None
        height, width = self.preprocessing.target_size(*image.shape[:2])
        factor = np.exp(self._generator.uniform(*np.log(self.options.scale)))
        full = max(1, round(height * factor)), max(1, round(width * factor))
        scale = np.array([full[1] / image.shape[1], full[0] / image.shape[0]])
        boxes = _inside((boxes * np.tile(scale, 2)).astype(np.float32), *full)
        height, width = min(height, full[0]), min(width, full[1])
        top = int(self._generator.integers(full[0] - height + 1))
        left = int(self._generator.integers(full[1] - width + 1))
        cut = _inside(boxes - np.array([left, top, left, top], np.float32), height, width)
        sides = cut[:, 2:] - cut[:, :2]
        visible = sides.prod(axis=1) / (boxes[:, 2:] - boxes[:, :2]).prod(axis=1).clip(1e-6)
        keep = (sides >= 1).all(axis=1) & ((visible >= _MIN_VISIBLE) | crowd)
        window = np.ascontiguousarray(resize(image, *full)[top : top + height, left : left + width])
        return Transformed(window, cut[keep], labels[keep], crowd[keep], scale)


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
    """The albumentations part: flips, turns and colours."""
    # Read at import time: without it, albumentations asks the network for its newest version.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations as A

    steps: list[Any] = [
        A.HorizontalFlip(p=options.flip),
        A.VerticalFlip(p=options.vertical_flip),
        A.RandomRotate90(p=options.rotate90),
        A.ColorJitter(
            brightness=_BRIGHTNESS, contrast=_BRIGHTNESS, saturation=_SATURATION, hue=_HUE, p=options.photometric
        ),
        A.OneOf(
            [A.GaussianBlur(sigma_limit=_BLUR, p=1), A.GaussNoise(std_range=_NOISE, p=1)],
            p=options.photometric * _BLUR_SHARE,
        ),
        A.ToGray(p=options.photometric * _GREY_SHARE),
    ]
    return A.Compose(
        steps,
        # Nothing here cuts objects off, so one check at the end will do; clip and filter absorb rounding.
        bbox_params=A.BboxParams(
            format="pascal_voc",
            label_fields=["rows"],
            clip=True,
            filter_invalid_bboxes=True,
            check_each_transform=False,
        ),
    )


def _crop(image: np.ndarray, boxes: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cut out a random part that holds all boxes whole.

    Not albumentations' BBoxSafeRandomCrop: it rounds the far edges down and fails on boxes thinner than a pixel.
    """
    height, width = image.shape[:2]
    # Without a box nothing limits where the part starts and ends.
    low, high = boxes[:, :2].min(axis=0, initial=np.inf), boxes[:, 2:].max(axis=0, initial=-np.inf)
    left, right = _crop_side(width, low[0], high[0], generator)
    top, bottom = _crop_side(height, low[1], high[1], generator)
    return np.ascontiguousarray(image[top:bottom, left:right]), boxes - np.array([left, top, left, top], np.float32)


def _crop_side(size: int, low: float, high: float, generator: np.random.Generator) -> tuple[int, int]:
    """Start and end of a random part of [0, size] that holds [low, high] and is not too short."""
    shortest = max(1, round(size * _MIN_CROP_SIDE))
    start = int(generator.integers(int(np.clip(np.floor(low), 0, size - shortest)) + 1))
    end = int(generator.integers(int(np.clip(np.ceil(high), start + shortest, size)), size + 1))
    return start, end


def _inside(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    return boxes.clip(0, np.array([width, height, width, height], np.float32))
