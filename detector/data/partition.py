"""A split of images where nobody made one: by class, with images that look alike on one side."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from detector.data.alike import alike, look_at_all
from detector.data.image_files import match_files
from detector.data.index import AnnotationIndex
from detector.data.voc import read_list
from detector.errors import InputError

log = logging.getLogger(__name__)


def parts(index: AnnotationIndex, root: Path, share: float, seed: int) -> dict[str, np.ndarray]:
    """Places of the images to train and to validate on: by FOLDER/train.txt and val.txt, else drawn.

    All images are decoded to draw.

    Args:
        index: all images of a folder without a split.
        root: the folder.
        share: of the images that validate.
        seed: of the draw.

    Raises:
        InputError: there is no image; a list is empty, names one twice or what is no image of the folder; or nothing
            would be left for one side.
    """
    if not len(index):
        index.check()  # which says why, where it can
    lists = lists_of(root)
    if all(path.is_file() for path in lists.values()):
        return {name: _listed(path, index) for name, path in lists.items()}
    index = match_files(index)
    present = np.zeros((len(index), len(index.class_names) + 1), bool)
    present[index.images, index.labels] = True
    present[:, -1] = ~present.any(axis=1)
    validates = stratify(present, groups := groups_of(index), share, seed)
    if not validates.any() or validates.all():
        raise InputError(
            f"{root}: no split, and its {len(index)} images ({len(np.unique(groups))} that do not look alike) are too "
            f"few to draw one with a share of {share:g} (data.val_share, or val); add images, give another share, or "
            "write your own train.txt and val.txt there."
        )
    log.info("%s has no split: val=%g is drawn by class, seed %d, look-alikes together.", root, share, seed)
    return {"train": np.flatnonzero(~validates), "val": np.flatnonzero(validates)}


def lists_of(root: Path) -> dict[str, Path]:
    """The files of a split that somebody made, paths of images relative to the folder."""
    return {name: root / f"{name}.txt" for name in ("train", "val")}


def _listed(path: Path, index: AnnotationIndex) -> np.ndarray:
    place = {os.path.abspath(index.path(i)): i for i in range(len(index))}
    found = [(number, line, place.get(os.path.abspath(path.parent / line))) for number, line in read_list(path)]
    if not found:
        raise InputError(f"{path}: this list of images is empty; name images in it, or remove both lists.")
    seen: set[int] = set()
    for number, line, i in found:
        if i is None:
            raise InputError(f"{path}:{number}: {line!r} is no image of this data set; correct or remove the line.")
        if i in seen:
            raise InputError(f"{path}:{number}: {line!r} is listed before, and would count twice; remove the line.")
        seen.add(i)
    return np.array([i for _, _, i in found], np.int64)


def groups_of(index: AnnotationIndex) -> np.ndarray:
    """(M,) int64, equal for images that look the same or nearly (see `alike`), also by way of others."""
    decoded = look_at_all({"": index}, os.cpu_count() or 1)[""]
    good = np.array([i for i, one in enumerate(decoded) if one.error is None], np.int64)
    groups = np.arange(len(index))
    for a, b in alike([decoded[i] for i in good]):
        a, b = groups[good[a]], groups[good[b]]
        if a != b:
            groups[groups == b] = a
    return groups


def stratify(present: np.ndarray, groups: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Draw images to validate on: iterative stratification (Sechidis et al. 2011, algorithm 1) of groups of images.

    The rarest class goes first, each of its groups to the side that lacks it most; then the rarest of what is left.

    Args:
        present: (M, K) bool, which classes are on an image; at least one.
        groups: (M,) images of one number stay together.
        share: of the images that validate.
        seed: of the order within a class; larger groups come first.

    Returns:
        (M,) bool.
    """
    _, groups = np.unique(groups, return_inverse=True)
    sizes = np.bincount(groups)
    counts = np.zeros((len(sizes), present.shape[1]))
    np.add.at(counts, groups, present)
    shares = np.array([1 - share, share])
    lacking, room = np.outer(shares, counts.sum(axis=0)), shares * len(present)
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    side = np.full(len(sizes), -1)
    while (waiting := order[side[order] < 0]).size:
        left = counts[waiting].sum(axis=0)
        label = int(np.where(left > 0, left, np.inf).argmin())
        for group in waiting[counts[waiting, label] > 0]:
            side[group] = max((0, 1), key=lambda one: (lacking[one, label], room[one]))
            lacking[side[group]] -= counts[group]
            room[side[group]] -= sizes[group]
    return np.equal(side[groups], 1)
