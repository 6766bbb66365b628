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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from detector.data.progress import progress
from detector.data.scenes import CLASS_NAMES, SIZE, Scene, render_scene
from detector.errors import InputError
from detector.files import write_json

# Raise it with every change of what is drawn or written: an older data set on disk is then made anew.
VERSION = 4
TRAIN, VAL = 1200, 200
SPLITS = ("train", "val")
STAMP = "stamp.json"


def ensure_shapes(root: Path, *, seed: int = 0, train: int = TRAIN, val: int = VAL, size: int = SIZE) -> Path:
    """Make the data set unless it is there already; see `make_once`.

    Args:
        root: where it belongs; becomes root/images/*.jpg and root/annotations/{train,val}.json.
        seed: another seed gives other images.
        train, val: number of images.
        size: longer side of an image in pixels.

    Returns:
        root.

    Raises:
        InputError: a parameter is out of range, root cannot be written, or root holds something else.
    """
    stamp = _stamp(seed, train, val, size)
    return make_once(
        root, STAMP, stamp, lambda folder: generate(folder, seed=seed, train=train, val=val, size=size), "shapes"
    )


def make_once(root: Path, stamp_name: str, stamp: Mapping[str, Any], make: Callable[[Path], None], name: str) -> Path:
    """Make an embedded data set unless it is there already.

    It is made in a folder beside `root` and moved into place when complete, so an interrupted run leaves no half of
    it. Processes that start at once (the ranks of a distributed run) each make it; the first to finish wins, and the
    others throw theirs away.

    Args:
        root: where it belongs.
        stamp_name: the JSON file in it that holds the stamp. A folder without one is somebody else's.
        stamp: what the data set follows from; where root's is another, it is made anew.
        make: given an empty folder, writes data set and stamp.
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
        _refuse_foreign(root, stamp_name, name)
        fresh.mkdir(parents=True)
        make(fresh)
        _move_into_place(fresh, root, stamp_name, stamp)
    except OSError as error:
        raise InputError(
            f"cannot write the embedded data set to {root}: {error.strerror or error}. "
            "Choose a folder that you may write to (and that has room) with data.root."
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return wanted


def generate(folder: Path, *, seed: int, train: int, val: int, size: int = SIZE) -> None:
    """Write the data set into an existing folder, the stamp last. Arguments as for `ensure_shapes`."""
    stamp = _stamp(seed, train, val, size)
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    for split, count in zip(SPLITS, (train, val), strict=True):
        content = _content(split, seed)
        for index in progress(range(count), f"drawing shapes/{split}"):
            scene = render_scene(scene_seed(seed, split, index), size=size)
            name = f"{split}_{index:06d}.jpg"
            (folder / "images" / name).write_bytes(jpeg(scene.image, scene.jpeg_quality))
            _append(content, scene, name)
        # Compact: an indented file would be twice as long, and nobody reads it.
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    write_json(folder / STAMP, stamp)


def scene_seed(seed: int, split: str, index: int) -> np.random.SeedSequence:
    """The seed of one image; no two (seed, split, index) share one."""
    return np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index))


def _content(split: str, seed: int) -> dict[str, Any]:
    description = f"embedded shapes, {split}, seed {seed}, version {VERSION}"
    return {
        "info": {"description": description, "version": str(VERSION)},
        "licenses": [],
        "images": [],
        "annotations": [],
        "categories": [
            {"id": label + 1, "name": name, "supercategory": "shape"} for label, name in enumerate(CLASS_NAMES)
        ],
    }


def _append(content: dict[str, Any], scene: Scene, name: str) -> None:
    height, width = scene.image.shape[:2]
    image_id = len(content["images"]) + 1
    content["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
    for (x1, y1, x2, y2), label, area in zip(scene.boxes.tolist(), scene.labels.tolist(), scene.areas, strict=True):
        content["annotations"].append(
            {
                "id": len(content["annotations"]) + 1,
                "image_id": image_id,
                "category_id": label + 1,
                "bbox": [round(x1, 2), round(y1, 2), round(x2 - x1, 2), round(y2 - y1, 2)],
                "area": round(float(area), 2),
                "iscrowd": 0,
            }
        )


def jpeg(image: np.ndarray, quality: int) -> bytes:
    """An image, uint8 RGB (h, w, 3), as the bytes of a JPEG file."""
    import cv2

    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])


def _stamp(seed: int, train: int, val: int, size: int) -> dict[str, int]:
    if seed < 0 or train < 1 or val < 1 or size < 64:
        raise InputError(
            f"embedded shapes: seed={seed}, train={train}, val={val}, size={size}; "
            "seed must not be negative, train and val must be at least 1, size at least 64."
        )
    return {"version": VERSION, "seed": seed, "train": train, "val": val, "size": size}


def _is_current(path: Path, stamp: Mapping[str, Any]) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(found == stamp)


def _refuse_foreign(root: Path, stamp_name: str, name: str) -> None:
    """Nothing that was not made here is ever replaced."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        names = [root.name] if root.exists() else []
    if not names or stamp_name in names:
        return
    raise InputError(
        f"{root} exists and is not an embedded {name} data set, so it is left alone. "
        f"Choose another data.root for the {name}, or move it away."
    )


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
