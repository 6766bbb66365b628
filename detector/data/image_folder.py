"""Images for classification: a folder for each class, two splits with the same classes, views for training and scoring.

The layout of torchvision's ImageFolder; the images are read by `detector.data.images`, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
import torchvision
from pydantic import model_validator
from torch import Tensor
from torchvision.transforms import v2

from detector.data.images import IMAGE_SUFFIXES, read_image
from detector.errors import InputError
from detector.options import Count, Options, Positive, Share

LAYOUT = "data.root=DIR with the images in DIR/train/CLASS/ and DIR/val/CLASS/"

View = Callable[[Tensor], Tensor]  # uint8 RGB (3, h, w) -> uint8 RGB (3, size, size)


class PretrainInput(Options):
    """Sizes of what the network sees."""

    size: Count = 224
    """side of an image in pixels (V1: 224 x 224 centre crop)"""
    resize: Count = 256
    """pixels of the shorter side before the middle is cut out for scoring (V1: 256)"""

    @model_validator(mode="after")
    def _holds_the_crop(self) -> Self:
        if self.resize < self.size:
            raise InputError(
                f"input.resize={self.resize} is less than input.size={self.size}; the usual ratio is 256 to 224."
            )
        return self


class PretrainAugment(Options):
    """How training images are changed at random."""

    scale: tuple[Positive, Positive] = (0.08, 1.0)
    """least and largest share of an image's area that is cut out (code; V1: "slightly less aggressive")"""
    flip: Share = 0.5
    """probability of left for right (code)"""
    colour: Share = 0.4
    """brightness, contrast and saturation each change by up to this share (code)"""

    @model_validator(mode="after")
    def _scale_is_a_range_of_shares(self) -> Self:
        if not self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"augment.scale={list(self.scale)}: shares of an image's area, 0 < least <= largest <= 1.")
        return self


class ImageBatch(NamedTuple):
    """Images and their classes.

    Attributes:
        images: uint8 RGB (N, 3, H, W).
        labels: (N,) int64, index into the class names.
        paths: of the files, for messages.
    """

    images: Tensor
    labels: Tensor
    paths: tuple[str, ...]


class ImageFolder(torchvision.datasets.ImageFolder):
    """One split: folder/CLASS/**/*.jpg and other images; classes in alphabetical order, hidden files left out.

    A sample is (uint8 RGB (3, size, size), label, path). `folder[i]` and `folder[i, epoch]` draw their view from the
    seed, the epoch and i alone.

    Args:
        folder: of the split.
        view: applied to each image each time.
        seed: of the draws.

    Raises:
        InputError: the folder is missing, it has fewer than two classes, or one of them has no image.
    """

    def __init__(self, folder: Path, view: View, seed: int = 0) -> None:
        if not folder.is_dir():
            raise InputError(f"No folder {folder} here (looked in '{folder.resolve()}'): give {LAYOUT}.")
        super().__init__(str(folder), loader=read_image, is_valid_file=_is_image, allow_empty=True)
        self.view, self.seed = view, seed
        if empty := sorted(set(self.classes) - {self.classes[label] for label in self.targets}):
            raise InputError(
                f"{folder / empty[0]}: no image in this class folder; expected files that end in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}. Add some, or remove the folder."
            )

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Names of the classes, and label by name; what torchvision's class asks for."""
        folders = sorted(path.name for path in Path(directory).iterdir() if path.is_dir() and path.name[0] != ".")
        if len(folders) < 2:
            raise InputError(
                f"{directory}: {len(folders)} class folders ({', '.join(folders) or 'none'}), but a classifier needs "
                f"two or more: give {LAYOUT}."
            )
        return folders, {name: label for label, name in enumerate(folders)}

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int, str]:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        path, label = self.samples[index]
        image = torch.from_numpy(self.loader(path)).permute(2, 0, 1)
        with draws((self.seed, epoch, index)):
            return self.view(image), label, path


def check_same_classes(train: ImageFolder, val: ImageFolder) -> None:
    """
    Raises:
        InputError: a class is in one split only; the first is named.
    """
    for name in sorted({*train.classes} ^ {*val.classes}):
        here, there = (train, val) if name in train.classes else (val, train)
        raise InputError(
            f"The classes of {train.root} and {val.root} differ: '{name}' is a folder of {here.root}, but not of "
            f"{there.root}. Both must have the same class folders."
        )


def collate_images(samples: Sequence[tuple[Tensor, int, str]]) -> ImageBatch:
    """Samples of one size to a batch; no samples, to an empty one."""
    images = torch.stack([image for image, _, _ in samples]) if samples else torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    labels = torch.tensor([label for _, label, _ in samples], dtype=torch.int64)
    return ImageBatch(images, labels, tuple(path for _, _, path in samples))


def train_view(size: int, augment: PretrainAugment) -> View:
    """A random part of the image, resized; then colours and mirroring.

    Args:
        size: side of the view in pixels.
        augment: what is drawn; the aspect ratio of the part changes by up to 4/3 (Szegedy et al. 2015).
    """
    colours = [v2.ColorJitter(*[augment.colour] * 3)] if augment.colour else []
    part = v2.RandomResizedCrop(size, scale=augment.scale, antialias=True)
    return v2.Compose([part, *colours, v2.RandomHorizontalFlip(augment.flip)])


def eval_view(sizes: PretrainInput) -> View:
    """The shorter side to `sizes.resize`, then the middle square of side `sizes.size`."""
    return v2.Compose([v2.Resize(sizes.resize, antialias=True), v2.CenterCrop(sizes.size)])


@contextmanager
def draws(seed: tuple[int, ...]) -> Iterator[None]:
    """Random numbers of the transforms from this seed; torch's own go on afterwards as if nothing had been drawn.

    torchvision takes no generator. The CPU's default one alone is set: `torch.manual_seed` would set those of GPUs too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint32)[0]))
        yield


def _is_image(path: str) -> bool:
    name = Path(path).name
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
