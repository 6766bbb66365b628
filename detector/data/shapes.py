"""The embedded data set: COCO JSON and JPEG images of shapes, made from a seed at first use. scenes.py draws them.

Every image has its own seed, derived from (seed, split, index): train and val never share a scene, and a larger
data set begins with the images of a smaller one. The same versions of numpy and OpenCV give the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from pydantic.types import Strict

from detector.data.progress import progress
from detector.data.scenes import CLASS_NAMES, SIZE, Scene, render_scene
from detector.errors import InputError
from detector.files import write_json
from detector.options import Count, Natural, Options

# Raise it with every change of what is drawn or written: an older data set on disk is then made anew.
VERSION = 4
SPLITS = ("train", "val")
STAMP = "stamp.json"


class ShapesOptions(Options):
    """The embedded data set, drawn at first use; see data/README.md."""

    seed: Natural = 0
    """seed of the scenes"""
    train: Count = 1200
    """images of the training split"""
    val: Count = 200
    """images of the validation split"""
    size: Annotated[int, Strict(), Field(ge=64)] = SIZE
    """longer side of an image in pixels"""


def ensure_shapes(root: Path, **given: int) -> Path:
    """Make the data set unless it is there already; see `make_once`.

    Args:
        root: where it belongs; becomes root/images/*.jpg and root/annotations/{train,val}.json.
        given: `ShapesOptions`.

    Returns:
        root.

    Raises:
        InputError: an option is out of range, root cannot be written, or root holds something else.
    """
    options = ShapesOptions.parse(given, "data.generate")
    stamp = {"version": VERSION} | options.to_dict()
    return make_once(root, STAMP, stamp, lambda folder: generate(folder, options), "shapes")


def make_once(root: Path, stamp_name: str, stamp: Mapping[str, Any], make: Callable[[Path], None], name: str) -> Path:
    """Make an embedded data set unless it is there already.

    It is made in a folder beside `root` and moved into place when complete, so an interrupted run leaves no half of
    it. Processes that start at once (the ranks of a distributed run) each make it; the first to finish wins, and the
    others throw theirs away.

    Args:
        root: where it belongs.
        stamp_name: the JSON file in it that holds the stamp. A folder without one is somebody else's.
        stamp: what the data set follows from; where root's is another, it is made anew.
        make: given an empty folder, writes the data set.
        name: of the data set, for messages.

    Returns:
        root.

    Raises:
        InputError: root cannot be written, or holds something else.
    """
    wanted, root = root, Path(root).resolve()  # behind a link to another disk, if there is one
    if _is_current(root / stamp_name, stamp):
        return wanted
    fresh = root.with_name(f".{root.name}-{uuid.uuid4().hex[:8]}")
    try:
        if _is_foreign(root, stamp_name):
            raise InputError(
                f"{root} exists and is not an embedded {name} data set, so it is left alone. "
                f"Choose another data.root for the {name}, or move it away."
            )
        fresh.mkdir(parents=True)
        make(fresh)
        write_json(fresh / stamp_name, stamp)
        _move_into_place(fresh, root, stamp_name, stamp)
    except OSError as error:
        raise InputError(
            f"cannot write the embedded data set to {root}: {error.strerror or error}. "
            "Choose a folder that you may write to (and that has room) with data.root."
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return wanted


def generate(folder: Path, options: ShapesOptions) -> None:
    """Write the data set into an existing folder."""
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    for split, count in zip(SPLITS, (options.train, options.val), strict=True):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index, scene in drawn_scenes("shapes", split, count, options.seed, options.size):
            name = f"{split}_{index:06d}.jpg"
            (folder / "images" / name).write_bytes(jpeg(scene.image, scene.jpeg_quality))
            height, width = scene.image.shape[:2]
            images.append({"id": index + 1, "file_name": name, "width": width, "height": height})
            for (x1, y1, x2, y2), label, area in zip(scene.boxes.tolist(), scene.labels, scene.areas, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": int(label) + 1,
                        "bbox": [round(x1, 2), round(y1, 2), round(x2 - x1, 2), round(y2 - y1, 2)],
                        "area": round(float(area), 2),
                        "iscrowd": 0,
                    }
                )
        description = f"embedded shapes, {split}, seed {options.seed}, version {VERSION}"
        classes = [{"id": label, "name": name, "supercategory": "shape"} for label, name in enumerate(CLASS_NAMES, 1)]
        content = {
            "info": {"description": description, "version": str(VERSION)},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": classes,
        }
        # Compact: an indented file would be twice as long, and nobody reads it.
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


def drawn_scenes(name: str, split: str, count: int, seed: int, size: int = SIZE) -> Iterator[tuple[int, Scene]]:
    """The scenes of a split and their indices, with a progress bar."""
    for index in progress(range(count), f"drawing {name}/{split}"):
        yield index, render_scene(scene_seed(seed, split, index), size=size)


def scene_seed(seed: int, split: str, *index: int) -> np.random.SeedSequence:
    """The seed of one image; no two (seed, split, index) share one."""
    return np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), *index))


def jpeg(image: np.ndarray, quality: int) -> bytes:
    """An image, uint8 RGB (h, w, 3), as the bytes of a JPEG file."""
    import cv2

    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])


def _is_current(path: Path, stamp: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")) == stamp)
    except (OSError, ValueError):
        return False


def _is_foreign(root: Path, stamp_name: str) -> bool:
    """Whether root was not made here, and so is never replaced. One look: another process may be moving it."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        return root.exists()
    return bool(names) and stamp_name not in names


def _move_into_place(fresh: Path, root: Path, stamp_name: str, stamp: Mapping[str, Any]) -> None:
    """Rename fresh to root; where another process was faster, keep what it made."""
    old = fresh.with_name(f"{fresh.name}-old")
    for attempts_left in (2, 1, 0):
        if _is_current(root / stamp_name, stamp):
            return
        try:
            if root.exists():
                root.rename(old)
            fresh.rename(root)
            return
        except OSError:  # another process moves its own folder at this moment: let it finish
            if not attempts_left:
                raise
            time.sleep(0.1)
        finally:
            shutil.rmtree(old, ignore_errors=True)
