"""Malformed inputs by the thousand: each mutant of a valid file or command line is refused in words, or used rightly.

python tests/fuzz.py --count 10000 --seed 0 [--only annotations,images,videos]
python tests/fuzz.py --replay 4711          one mutant again, with its traceback

A mutant passes where it ends in InputError, of one or two lines, or in a result that an oracle accepts: pycocotools'
metrics, the entries and images that were not touched, boxes that are finite and inside their image. Another exception,
a wrong result, and more than LIMIT seconds are failures. The seed alone makes the mutant; failures are kept in a file.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import logging
import math
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from starlette.testclient import TestClient

from detector.apps import export as export_app
from detector.apps.doctor.examine import examine
from detector.apps.evaluate import EvalOptions
from detector.apps.evaluate import evaluate as evaluate_command
from detector.apps.predict import PredictCommandOptions
from detector.apps.predict import predict as predict_command
from detector.apps.serve import Limits, ServerOptions
from detector.apps.serve.app import build_app
from detector.cli import compose, explain
from detector.data.annotations import load_annotations, read_annotations
from detector.data.collate import collate
from detector.data.dataset import DetectionDataset
from detector.data.image_files import match_files
from detector.data.index import AnnotationIndex
from detector.data.preprocess import Preprocessing
from detector.data.results import Results, read_results
from detector.data.transforms import AugmentOptions, TrainTransform
from detector.errors import InputError
from detector.evaluation.compare import compare
from detector.evaluation.diagnosis import diagnose
from detector.evaluation.metrics import compute_metrics
from detector.export.formats import export_info, export_onnx, export_openvino, export_torch
from detector.files import write_json
from detector.inference.detector import Detector
from detector.inference.loading import load
from detector.models.backbones import build_backbone
from detector.models.backbones.pretrained import load_weights
from detector.models.build import NetworkOptions, build_network

LIMIT = 10.0  # seconds for a mutant
LATE = f"more than {LIMIT:.0f} s"
CLASSES = ("car", "cat", "kite")
SPEC: dict[str, Any] = {
    "backbone": {"name": "shufflenet_v2", "stem_channels": 8, "channels": [16, 32, 64], "repeats": [1, 1, 1]},
    "neck": {"name": "none"},
    "rpn": {
        "channels": 16, "scales": [16, 32], "ratios": [1.0], "sample_count": 16,
        "train_limits": {"before_nms": 50, "after_nms": 20}, "test_limits": {"before_nms": 40, "after_nms": 10},
    },
    "light_head": {
        "mid_channels": 4, "kernel_size": 3, "thin_channels": 2, "hidden_channels": 16, "sample_count": 8,
        "score_threshold": 0.001, "max_detections": 10,
    },
}  # fmt: skip
# What stands where something else should.
ODD: tuple[Any, ...] = (
    None, math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, -1, 0, 1, 0.5, -0.0, 2**31, 2**53 + 1, 2**63, 10**30,
    10**400, True, False, "", " ", "0", "1", "-1", "1.0", "nan", "1e3", "1_000", "text", "é\ud800", "a\nb", "\x00",
    "../x", "a\\b.png", "C:\\a.png", "x" * 300, [], [1], [None] * 4, [1, 2, 3, 4], [[]], {}, {"a": 1},
)  # fmt: skip
# What is meant as a value that COCO writes otherwise.
PLAIN: tuple[Any, ...] = (None, "0", "1", 0.0, 1.0, True, False, "", 0, 1)
NAMES = (
    "caf\udce9.png", "a b.png", "-a.png", "[a].png", "a*.png", "it's.png", 'q"uo.png', "a\nb.png", "ü.png", "%41.png",
    "$HOME.png", "#a.png", "a=b.png", "n" * 246 + ".png", "A.PNG", ".hidden.png", "a.tar.png", "a;b.png", "{a}.png",
)  # fmt: skip


class Late(BaseException):
    """The time is over; no Exception, so that no handler takes it for an error of its own."""


class Wrong(Exception):
    """A result that an oracle does not accept."""


def demand(right: Any, what: str) -> None:
    if not right:
        raise Wrong(what)


@dataclass
class Outcome:
    """How one mutant ended: "used", "refused", or else the failure's first line, with its traceback."""

    kind: str
    seed: int
    end: str
    reached: bool
    seconds: float
    trace: str = ""

    @property
    def failed(self) -> bool:
        return self.end not in ("used", "refused")


class Workshop:
    """Valid inputs, made once: a data set of six images, results on it, a checkpoint, its exports, two videos."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reached = False
        rng = np.random.default_rng(0)
        self.root = folder / "data"
        (self.root / "images").mkdir(parents=True)
        sizes = [(64, 48), (48, 64), (50, 50), (80, 40), (64, 64), (33, 65)]
        self.content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
        for i, (width, height) in enumerate(sizes):
            pixels = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height))
            pixels.save(self.root / "images" / f"{i}.png")
            image = {"id": 10 + i, "file_name": f"{i}.png", "width": width, "height": height}
            self.content["images"].append(image)
            for _ in range(4):
                box = [float(rng.integers(0, width - 20)), float(rng.integers(0, height - 20)), 16.0, 12.5]
                self.content["annotations"].append(
                    {"id": 100 + len(self.content["annotations"]), "image_id": 10 + i, "bbox": box, "area": 150.25,
                     "category_id": int(rng.choice([3, 17, 90])), "iscrowd": int(rng.random() < 0.15)}
                )  # fmt: skip
        self.content["categories"] = [{"id": k, "name": n} for k, n in zip((3, 17, 90), CLASSES, strict=True)]
        (self.root / "annotations").mkdir()
        for split in ("train", "val"):
            write_json(self.root / "annotations" / f"{split}.json", self.content)
        self.index = read_annotations(self.root / "annotations/val.json", self.root / "images")
        self.rows = self.results_for(self.index, rng)
        write_json(folder / "results.json", self.rows)
        torch.manual_seed(0)
        self.detector = Detector(NetworkOptions.parse(SPEC), CLASSES, Preprocessing(short_side=48, long_side=64))
        self._settle()
        self.detector.save(folder / "d.ckpt")
        self.checkpoint = torch.load(folder / "d.ckpt", weights_only=True)
        export_onnx(self.detector, folder / "d.onnx")
        export_openvino(self.detector, folder / "d.xml", batch=1, canvas=(64, 64))
        export_torch(self.detector, folder / "d.pt2", batch=1, canvas=(64, 64))
        torch.save(self.detector.network.backbone.state_dict(), folder / "w.pth")
        self.videos = [make_video(folder / f"v.{kind}") for kind in ("mp4", "avi")]
        self.good = self.root / "images" / "0.png"
        self.expected = {
            name: load(folder / name).predict(self.good, score_threshold=0)[0].to_dict()
            for name in ("d.ckpt", "d.onnx", "d.xml", "d.pt2")
        }
        demand(self.expected["d.ckpt"]["boxes"], "the valid checkpoint finds nothing, so nothing would be compared")

    def _settle(self) -> None:
        """Statistics that fit the weights, so that outputs differ from place to place."""
        network = self.detector.network.train()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        dataset = DetectionDataset(self.index, self.transform())
        with torch.no_grad():
            network.losses(collate([dataset[i] for i in range(len(dataset))]))
        network.eval()

    @staticmethod
    def transform() -> TrainTransform:
        return TrainTransform(Preprocessing(short_side=48, long_side=64), AugmentOptions(), seed=0)

    @staticmethod
    def results_for(index: AnnotationIndex, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Detections near the objects of an index, and some anywhere, in COCO's format; ids as the index has them."""
        rows = []
        for i in range(len(index)):
            own = index.xywh[index.offsets[i] : index.offsets[i + 1]]
            labels = index.labels[index.offsets[i] : index.offsets[i + 1]]
            for box, label in [*zip(own, labels, strict=True), (np.array([1.0, 2, 9, 8]), 0)]:
                if index.class_names and np.abs(box).max() < 1e6:
                    box = box + rng.normal(0, 2, 4)
                    row = [float(value) for value in (*box[:2], *np.abs(box[2:]))]
                    rows.append({"image_id": index.image_ids[i], "category_id": index.category_ids[label], "bbox": row,
                                 "score": round(float(rng.random()), 3)})  # fmt: skip
        return rows


def make_video(path: Path) -> Path:
    """Six frames of 64 x 48."""
    import av

    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(6):
            pixels = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((64, 48)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


# Mutations of what JSON can say.


def spots(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside a tree of dicts and lists."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield (*path, key)
            yield from spots(value, (*path, key))


def inside(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def pick(rng: np.random.Generator, items: Any) -> Any:
    return items[int(rng.integers(len(items)))]


def mutate(tree: Any, rng: np.random.Generator) -> None:
    """Change one thing somewhere in a tree, in place."""
    paths = list(spots(tree))
    if not paths:
        return
    *outer, key = pick(rng, paths)
    parent = inside(tree, tuple(outer))
    value = parent[key]
    action = rng.integers(8)
    if action < 3:
        parent[key] = copy.deepcopy(pick(rng, ODD))
    elif action == 3:
        parent[key] = as_another_type(value, rng)
    elif action == 4:
        del parent[key]
    elif action == 5 and isinstance(parent, list):
        parent.insert(int(rng.integers(len(parent) + 1)), copy.deepcopy(value))
    elif action == 5:
        parent[pick(rng, ["", str(key).upper(), f"{key} ", "id", "bbox", "name", "é"])] = parent.pop(key)
    elif action == 6 and isinstance(parent, list):
        parent[:] = [parent[i] for i in rng.permutation(len(parent))]
    elif action == 6:
        parent[pick(rng, ["extra", "segmentation", "score", "difficult", "ignore"])] = copy.deepcopy(pick(rng, ODD))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        parent[key] = value * float(pick(rng, [-1, 0.5, 1e3, 1e-3, 1e9]))


def as_another_type(value: Any, rng: np.random.Generator) -> Any:
    """The same value, as another type has it."""
    if isinstance(value, str):
        return pick(rng, [value.encode().hex(), f" {value}", [value], value.upper()])
    if isinstance(value, list | dict):
        return pick(rng, [json.dumps(value), [value], list(value)])
    return pick(rng, [str(value), [value], f" {value} ", f"{value}.0" if isinstance(value, int) else str(value)])


def encoded(tree: Any, rng: np.random.Generator) -> bytes:
    """JSON as some tool may have written it, or as a broken disk gives it back."""
    text = json.dumps(tree, ensure_ascii=bool(rng.random() < 0.8), indent=pick(rng, [None, 1]))
    way = rng.random()
    if way < 0.05:
        return text.encode("utf-16", "surrogatepass")
    content = text.encode("utf-8", "surrogatepass")
    if way < 0.1:
        return b"\xef\xbb\xbf" + content
    return damaged(content, rng) if way < 0.14 else content


Mutation = Callable[[Any, np.random.Generator], None]


def write_mutant(path: Path, tree: Any, odd: Mutation, times: Sequence[int], rng: np.random.Generator) -> Any:
    """Write a tree with some mutations as JSON; `odd` makes those that fit its kind.

    Returns:
        What the file says, by json itself: damage may have changed a letter; None where it is no JSON.
    """
    tree = copy.deepcopy(tree)
    for _ in range(int(pick(rng, times))):
        if rng.random() < 0.6:
            odd(tree, rng)
        else:
            mutate(tree, rng)
    path.write_bytes(encoded(tree, rng))
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed, cut off, or put in."""
    data = bytearray(content)
    action = rng.integers(4)
    if action == 0:
        return bytes(data[: int(rng.integers(len(data) + 1))])
    if action == 1:
        at = int(rng.integers(len(data) + 1))
        return bytes(data[:at] + rng.bytes(int(rng.integers(1, 9))) + data[at:])
    for _ in range(int(pick(rng, [1, 1, 2, 8, 64]))):
        if data:
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    return bytes(data)


# What each kind of input must survive.


def fuzz_annotations(shop: Workshop, rng: np.random.Generator, folder: Path) -> None:
    """Read, train a step, score, and let the doctor look."""
    path = folder / "a.json"
    content = write_mutant(path, shop.content, odd_option, [1, 1, 2, 4], rng)
    read = match_files(read_annotations(path, shop.root / "images"))
    errors = [fault for fault in read.faults if fault.severity == "error"]
    diagnosis = examine({"val": read}, preprocessing=shop.detector.preprocessing, anchors=None)
    json.dumps(diagnosis.to_dict(), allow_nan=False, default=str)
    demand(bool(errors) <= (diagnosis.counts["error"] > 0), "the doctor sees no error where training refuses")
    index = load_annotations(path, shop.root / "images")
    demand(not errors, "an error of the rule book is not refused")
    check_index(index)
    check_untouched(shop.content, content, index)
    rows = shop.results_for(index, rng)
    shop.reached = True
    if len(index.class_names):
        check_metrics(read_results(json.loads(json.dumps(rows)), index), index)
    train_a_step(shop, index)


def odd_option(content: dict[str, Any], rng: np.random.Generator) -> None:
    """Give an optional key, an order or a box a form that is rare, but plain."""
    section = pick(rng, ["images", "annotations", "annotations", "annotations"])
    items = content.get(section)
    if not isinstance(items, list) or not items or not isinstance(item := pick(rng, items), dict):
        return
    action = rng.integers(6)
    if action == 0:
        item[pick(rng, ["area", "iscrowd", "difficult", "ignore"])] = copy.deepcopy(pick(rng, PLAIN))
    elif action == 1:
        items[:] = [items[i] for i in rng.permutation(len(items))]
    elif action == 2 and isinstance(item.get("bbox"), list) and item["bbox"]:
        item["bbox"][int(rng.integers(len(item["bbox"])))] = pick(rng, [0, -5, 1e4, 0.001, 200, "7", 1e15, -1e15])
    elif action == 3:
        key = pick(rng, list(item) or ["id"])
        if isinstance(item.get(key), int | float):
            item[key] = pick(rng, [str, float])(item[key])
    elif action == 4:
        item.pop(pick(rng, ["area", "iscrowd", "id"]) if section == "annotations" else "width", None)
    else:
        item["segmentation"] = copy.deepcopy(pick(rng, ODD))


def check_index(index: AnnotationIndex) -> None:
    demand(np.isfinite(index.xywh).all() and np.isfinite(index.boxes).all(), "a box that is not finite")
    demand(np.isfinite(index.areas).all(), "an area that is not finite")
    demand(((index.labels >= 0) & (index.labels < len(index.class_names))).all(), "a label without a class")
    demand(len(index.offsets) == len(index) + 1 and (np.diff(index.offsets) >= 0).all(), "offsets that fall")
    sizes = index.sizes[index.images]
    known = (sizes > 0).all(axis=1)
    corners = index.boxes.reshape(-1, 2, 2)
    within = ((corners >= 0) & (corners <= sizes[:, None, ::-1])).all(axis=(1, 2))
    demand(within[known].all(), "a box to train on outside its image")


def check_untouched(before: dict[str, Any], after: dict[str, Any], index: AnnotationIndex) -> None:
    """Entries that the mutation left alone mean what they meant."""

    def same(section: str) -> dict[Any, dict[str, Any]]:
        there = after.get(section) if isinstance(after, dict) else None
        there = there if isinstance(there, list) else []
        return {item["id"]: item for item in before[section] if sum(repr(item) == repr(other) for other in there) == 1}

    images, categories = same("images"), same("categories")
    for item in same("annotations").values():
        if item["image_id"] not in images or item["category_id"] not in categories:
            continue
        demand(item["image_id"] in index.place, f"image {item['image_id']} is gone")
        place = index.place[item["image_id"]]
        rows = np.arange(index.offsets[place], index.offsets[place + 1])
        same_box = rows[(index.xywh[rows] == item["bbox"]).all(axis=1)]
        found = [
            (index.class_names[index.labels[row]], bool(index.crowd[row]), float(index.areas[row])) for row in same_box
        ]
        own = (categories[item["category_id"]]["name"], bool(item["iscrowd"]), item["area"])
        demand(own in found, f"annotation {item['id']}, which was not touched, is read as {found}")


def check_metrics(results: Results, index: AnnotationIndex) -> None:
    """By pycocotools; nothing outside [0, 1]."""
    found, oracle = compute_metrics(results, index), compute_metrics(results, index, "pycocotools")
    for key in (key for key in oracle if key != "per_class"):
        a, b = found[key], oracle[key]
        demand((a is None) == (b is None) and (a is None or abs(a - b) < 1e-9), f"{key} is {a}, by pycocotools {b}")
    for key, value in {**found["per_class"], **compute_metrics(results, index, "voc")["per_class"]}.items():
        demand(value is None or 0 <= value <= 1, f"AP of {key!r} is {value}")
    json.dumps(diagnose(results, index), allow_nan=False, default=str)


def train_a_step(shop: Workshop, index: AnnotationIndex) -> None:
    dataset = DetectionDataset(index, shop.transform())
    batch = collate([dataset[i] for i in range(min(4, len(dataset)))])
    network = copy.deepcopy(shop.detector.network).train()
    losses = network.losses(batch)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    demand(torch.isfinite(total), f"losses { ({name: float(value) for name, value in losses.items()}) }")


def fuzz_images(shop: Workshop, rng: np.random.Generator, folder: Path) -> None:
    """Predict on a folder with a good image in it: its boxes stay, and every output file is whole."""
    source = folder / "source"
    source.mkdir()
    shutil.copy(shop.good, source / "good.png")
    name, content = image_file(rng)
    odd = source / name
    odd.write_bytes(content)
    save = ["json", *(form for form in ("images", "crops", "jsonl", "csv", "coco") if rng.random() < 0.3)]
    options = {"ckpt": str(shop.folder / "d.ckpt"), "source": str(source), "out": str(folder / "out"), "save": save,
               "score_threshold": 0, "device": "cpu", "batch_size": int(pick(rng, [1, 8]))}  # fmt: skip
    shop.reached = True
    try:
        predict_command(PredictCommandOptions.parse(options))
    except SystemExit as stop:
        demand(stop.code == 1, f"exit code {stop.code}")
    rows = json.loads((folder / "out" / "detections.json").read_text("utf-8"))
    rows = rows if isinstance(rows, list) else rows["images"]
    by_name = {Path(row["path"]).name: row for row in rows}
    demand("good.png" in by_name, "the good image is missing")
    check_equal(by_name["good.png"], shop.expected["d.ckpt"])
    for row in rows:
        check_detections(row)
    size = independent_size(content)
    others = [row for key, row in by_name.items() if key != "good.png"]
    if size and others and others[0].get("error") is None:
        demand((others[0]["width"], others[0]["height"]) == size, f"an image of {size} is said to be {others[0]}"[:200])
    if rng.random() < 0.5:
        train_with(shop, folder, name, size, rng)


def train_with(shop: Workshop, folder: Path, name: str, size: tuple[int, int] | None, rng: np.random.Generator) -> None:
    """Train a step on a good image and this one; the doctor sees an error where training does."""
    width, height = size or (40, 30)
    declared = {"width": width, "height": height} if rng.random() < 0.7 else {}
    box = [0.1 * width, 0.2 * height, 0.5 * width, 0.6 * height]
    content = {
        "images": [
            {"id": 1, "file_name": "good.png", "width": 64, "height": 48},
            {"id": 2, "file_name": name} | declared,
        ],
        "annotations": [{"id": i, "image_id": i, "category_id": 3, "bbox": box} for i in (1, 2)],
        "categories": shop.content["categories"],
    }
    path = folder / "own.json"
    path.write_text(json.dumps(content))
    read = match_files(read_annotations(path, folder / "source"))
    diagnosis = examine({"train": read}, preprocessing=shop.detector.preprocessing)
    write_json(folder / "doctor.json", diagnosis.to_dict())
    try:
        train_a_step(shop, load_annotations(path, folder / "source"))
    except InputError as error:
        demand(diagnosis.counts["error"], f"the doctor sees no error, and training refuses: {error}")
        raise


def image_file(rng: np.random.Generator) -> tuple[str, bytes]:
    """A name and the bytes of an image in some mode, size and format, often damaged."""
    mode = pick(rng, ["RGB", "RGB", "L", "LA", "P", "RGBA", "1", "I;16", "I", "F", "CMYK", "YCbCr"])
    form = pick(rng, ["PNG", "PNG", "JPEG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
    size = pick(rng, [(40, 30), (40, 30), (1, 1), (1, 70), (70, 1), (2, 3), (300, 7), (17, 33), (600, 400)])
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * int(pick(rng, [1, 16, 256])))
    elif mode != "RGB":
        image = image.convert(mode)
    exif = Image.Exif()
    if rng.random() < 0.3:
        exif[0x0112] = pick(rng, [1, 2, 3, 5, 6, 8, 0, 9, 255])
    file = io.BytesIO()
    try:
        image.save(file, form, exif=exif) if form in ("JPEG", "PNG", "WEBP", "TIFF") else image.save(file, form)
    except (OSError, ValueError):  # a mode that the format does not have
        image.convert("RGB").save(file, form)
    content = file.getvalue()
    if form == "PNG" and rng.random() < 0.2:
        content = with_png_size(content, *(int(pick(rng, [0, 1, 40, 1 << 16, 1 << 31, (1 << 32) - 1])) for _ in "wh"))
    elif rng.random() < 0.4:
        content = damaged(content, rng)
    suffix = pick(rng, [form.lower(), form.lower(), "png", "jpg", "JPG", "jpeg"])
    name = pick(rng, NAMES) if rng.random() < 0.4 else f"odd.{suffix}"
    return name, content


def with_png_size(content: bytes, width: int, height: int) -> bytes:
    """The same PNG, which claims another size, with the right checksum."""
    header = struct.pack(">II", width, height) + content[24:29]
    return content[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + content[33:]


def independent_size(content: bytes) -> tuple[int, int] | None:
    """Width and height as Pillow alone shows the image; None where it cannot."""
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content))
            image.load()
            return ImageOps.exif_transpose(image).size
    except Exception:  # of any decoder
        return None


def check_detections(row: dict[str, Any]) -> None:
    """Of one image, as `Detections.to_dict` gives them."""
    for box, score, label, name in zip(*(row[key] for key in ("boxes", "scores", "labels", "names")), strict=True):
        x1, y1, x2, y2 = box
        inside_image = 0 <= x1 <= x2 <= row["width"] and 0 <= y1 <= y2 <= row["height"]
        demand(inside_image, f"a box {box} on {row['width']} x {row['height']}")
        demand(0 <= score <= 1, f"a score of {score}")
        demand(label >= 0 and isinstance(name, str), f"label {label}, name {name!r}")


def check_equal(row: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, tolerance in (("labels", 0), ("scores", 1e-3), ("boxes", 0.1)):
        a, b = np.array(row[key]), np.array(expected[key])
        near = a.shape == b.shape and np.allclose(a, b, rtol=0, atol=tolerance)
        demand(near, f"{key} of an image that was not touched are {a.tolist()} instead of {b.tolist()}")


def fuzz_checkpoints(shop: Workshop, rng: np.random.Generator, folder: Path) -> None:
    path = folder / "d.ckpt"
    untouched = False
    if rng.random() < 0.2:
        return import_mutant(shop, rng, folder)
    if rng.random() < 0.15:
        path.write_bytes(damaged((shop.folder / "d.ckpt").read_bytes(), rng))
    else:
        checkpoint = copy.deepcopy(shop.checkpoint)
        part = pick(rng, ["weights", "weights", "provenance", "spec", "preprocessing", "detector", "all"])
        if part == "weights":
            mutate_weights(checkpoint["state_dict"], rng)
        elif part == "provenance":
            checkpoint["detector"]["provenance"] = copy.deepcopy(pick(rng, ODD))
            checkpoint["epoch"] = copy.deepcopy(pick(rng, ODD))
            untouched = True
        elif part == "all":
            mutate(checkpoint, rng)
        else:
            mutate(checkpoint["detector"][part] if part != "detector" else checkpoint["detector"], rng)
        torch.save(checkpoint, path)
    predict_with(shop, path, "d.ckpt" if untouched else None)


def import_mutant(shop: Workshop, rng: np.random.Generator, folder: Path) -> None:
    """Weights of a backbone, some of them odd: what is written is read again, and finite."""
    content = torch.load(shop.folder / "w.pth", weights_only=True)
    if rng.random() < 0.2:
        (folder / "w.pth").write_bytes(damaged((shop.folder / "w.pth").read_bytes(), rng))
    else:
        mutate_weights(content, rng)
        torch.save(content, folder / "w.pth")
    words = [word.replace("OUT", "out") for word in WORDS["import_weights"]]
    composed = compose("import_weights", words[: -1 if rng.random() < 0.5 else None])
    shop.reached = True
    composed.run(composed.options())
    backbone = build_backbone(NetworkOptions.parse(SPEC).backbone)
    load_weights(backbone, folder / "out/w.pth")
    demand(all(value.isfinite().all() for value in backbone.state_dict().values()), "weights that are not finite")


def mutate_weights(weights: dict[str, Any], rng: np.random.Generator) -> None:
    key = pick(rng, list(weights))
    value = weights[key]
    action = rng.integers(6)
    if action == 0:
        weights[key] = value.to(pick(rng, [torch.float16, torch.float64, torch.int64, torch.bfloat16]))
    elif action == 1 and value.is_floating_point():
        value.view(-1)[int(rng.integers(value.numel()))] = pick(rng, [math.nan, math.inf, -math.inf, 1e30, 0.0, -1e30])
    elif action == 2 and value.is_floating_point():
        weights[key] = value * pick(rng, [0.0, -1.0, 1e3, 1e20])
    elif action == 3:
        weights[key] = pick(rng, [value[None], value.reshape(-1)[:1], torch.zeros(0)])
    elif action == 4:
        del weights[key]
    else:
        weights[pick(rng, ["extra", "network.extra", key + "x"])] = copy.deepcopy(pick(rng, [value, *ODD]))


def predict_with(shop: Workshop, path: Path, expected: str | None) -> None:
    predictor = load(path, "cpu")
    shop.reached = True
    found = predictor.predict(shop.good, score_threshold=0)[0]
    json.dumps(found.to_dict(), allow_nan=False)
    check_detections(found.to_dict())
    demand(len(found.names) == len(found), "detections without a name")
    if expected:
        check_equal(found.to_dict(), shop.expected[expected])


def fuzz_exports(shop: Workshop, rng: np.random.Generator, folder: Path) -> None:
    name = pick(rng, ["d.onnx", "d.onnx", "d.xml", "d.pt2"])
    path = folder / name
    content = (shop.folder / name).read_bytes()
    if name == "d.xml":
        shutil.copy(shop.folder / "d.bin", folder / "d.bin")
    if rng.random() < 0.5:
        content = mutate_metadata(content, name, rng)
    elif rng.random() < 0.5 and name == "d.pt2":
        content = mutate_entry(content, rng)
    elif rng.random() < 0.3 and name == "d.xml":
        (folder / "d.bin").write_bytes(damaged((folder / "d.bin").read_bytes(), rng))
    else:
        content = damaged(content, rng)
    path.write_bytes(content)
    predict_with(shop, path, None)


def mutate_metadata(content: bytes, name: str, rng: np.random.Generator) -> bytes:
    """Change what an export says about itself."""
    if name == "d.onnx":
        import onnx

        model = onnx.load_from_string(content)
        entry = pick(rng, list(model.metadata_props))
        entry.value = odd_text(entry.value, rng)
        if rng.random() < 0.1:
            model.metadata_props.remove(entry)
        return bytes(model.SerializeToString())
    if name == "d.pt2":
        about = next(entry for entry in zipfile.ZipFile(io.BytesIO(content)).namelist() if "light_head" in entry)

        def odd(text: bytes) -> bytes:
            properties = json.loads(text)
            key = pick(rng, list(properties))
            properties[key] = odd_text(properties[key], rng)
            whole = rng.random() < 0.1
            return json.dumps(pick(rng, ODD[:2] + ODD[-6:]) if whole else properties).encode("utf-8", "replace")

        return rezipped(content, about, odd)
    from xml.etree import ElementTree

    tree = ElementTree.fromstring(content)
    section = next(node for node in tree.iter() if node.tag == "light_head_detector")
    node = pick(rng, list(section))
    node.set("value", odd_text(node.get("value") or "", rng).encode("utf-8", "replace").decode().replace("\x00", ""))
    return ElementTree.tostring(tree)


def rezipped(content: bytes, name: str, change: Callable[[bytes], bytes]) -> bytes:
    """An archive with another entry, and right sums."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(written, "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            target.writestr(entry.filename, change(data) if entry.filename == name else data)
    return written.getvalue()


def mutate_entry(content: bytes, rng: np.random.Generator) -> bytes:
    """Change what an archive of torch.export says, or its numbers, under right sums."""
    entries = zipfile.ZipFile(io.BytesIO(content)).namelist()

    def change(data: bytes) -> bytes:
        try:
            tree = json.loads(data)
        except ValueError:
            return damaged(data, rng)
        mutate(tree, rng)
        return json.dumps(tree).encode("utf-8", "replace")

    likely = [entry for entry in entries if entry.endswith(".json") and "light_head" not in entry]
    return rezipped(content, pick(rng, likely if rng.random() < 0.7 else entries), change)


def fuzz_videos(shop: Workshop, rng: np.random.Generator, folder: Path) -> None:
    """Predict on a damaged video: frames in order, boxes inside them; sometimes by the command, with a good image."""
    valid = pick(rng, shop.videos)
    path = folder / f"odd{pick(rng, [valid.suffix, valid.suffix, '.mp4', '.avi', '.mkv'])}"
    content = valid.read_bytes()
    for _ in range(int(pick(rng, [1, 1, 3]))):
        content = damaged(content, rng)
    path.write_bytes(content)
    if rng.random() < 0.8:
        last = -1
        for found in shop.detector.stream(path, score_threshold=0, every=int(pick(rng, [1, 1, 2]))):
            shop.reached = True
            check_detections(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
            demand(found.frame is not None and found.frame > last, f"frame {found.frame} after {last}")
            last = found.frame or 0
        return
    options = {"ckpt": str(shop.folder / "d.ckpt"), "source": [str(shop.good), str(path)], "out": str(folder / "out"),
               "save": ["jsonl", "images"], "score_threshold": 0, "device": "cpu"}  # fmt: skip
    try:
        predict_command(PredictCommandOptions.parse(options))
    except SystemExit as stop:
        demand(stop.code == 1, f"exit code {stop.code}")
    rows = [json.loads(line) for line in (folder / "out/detections.jsonl").read_text().splitlines()]
    shop.reached = len(rows) > 1
    check_equal(rows[0], shop.expected["d.ckpt"])


def fuzz_service(shop: Workshop, rng: np.random.Generator, _: Path) -> None:
    """A request with something odd in it: an answer, or a message and the client's fault."""
    _, image = image_file(rng) if rng.random() < 0.5 else ("", shop.good.read_bytes())
    fields = {name: str(pick(rng, TEXTS + NUMBERS)) for name in ("score_threshold", "max_proposals", "classes", "x")}
    fields = {name: value for name, value in fields.items() if rng.random() < 0.15}
    query = "&".join(f"{name}={value}" for name, value in fields.items() if rng.random() < 0.3)
    boundary = "b0undary"
    parts = [f'name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items() if name not in query]
    parts.insert(0, b'name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n' + image)
    start = f"--{boundary}\r\nContent-Disposition: form-data; ".encode()
    body = b"\r\n".join([*(start + part for part in parts), f"--{boundary}--\r\n".encode()])
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    action = rng.integers(6)
    if action == 0:
        body, headers = image, {"content-type": pick(rng, ["image/png", "", "application/octet-stream", "text/plain"])}
    elif action == 1:  # what stands before the image
        body = damaged(body[:120], rng) + body[120:]
    elif action == 2:
        body = damaged(body, rng)
    elif action == 3:
        odd = ["", "; boundary=", f"; boundary={'b' * 9000}", "; boundary=other", "x" * 70_000]
        odd = [f"multipart/form-data{one}" for one in odd] + [headers["content-type"] + "; charset=utf-16"]
        headers = {"content-type": pick(rng, odd)}
    elif action == 4:
        names = ["x-odd", "accept", "cookie", "expect", "content-length", "origin", "host", "range", "content-encoding"]
        headers[pick(rng, names)] = pick(rng, ["", "0", "-1", "9" * 30, "x" * 100_000, "*/*", "null", "gzip", "\x7f"])
    path = f"/predict?{query}" if rng.random() < 0.95 else f"/{pick(rng, ['', 'predict/', '%00', '../x', 'health'])}"
    method = "POST" if rng.random() < 0.95 else pick(rng, ["GET", "PUT", "DELETE", "HEAD"])
    options = ServerOptions(limits=Limits(max_upload_mb=1, max_megapixels=1, queue=4, timeout=5))
    app = build_app(shop.detector, options)  # one that has ended does not begin again
    with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        response = client.request(method, path, content=body, headers=headers)
    shop.reached = response.status_code in (200, 413, 422)
    demand(response.status_code < 500, f"{response.status_code}: {response.text[:200]}")
    if response.status_code == 200 and method == "POST":
        check_detections(response.json())
    elif method == "POST":
        demand(response.json()["error"].strip(), f"{response.status_code} without a message")


def odd_text(text: str, rng: np.random.Generator) -> str:
    """JSON with a mutation, or any odd text."""
    if rng.random() < 0.2:
        return str(pick(rng, ODD)).encode("utf-8", "replace").decode()
    try:
        tree = [json.loads(text)]
    except ValueError:
        return str(pick(rng, ODD)).encode("utf-8", "replace").decode()
    mutate(tree, rng)
    return json.dumps(tree[0] if tree else None)


def fuzz_results(shop: Workshop, rng: np.random.Generator, folder: Path) -> None:
    """Anybody's detections: metrics by pycocotools, the report, and the comparison with others."""
    path = folder / "results.json"
    rows = write_mutant(path, shop.rows, odd_row, [1, 1, 2], rng)
    results = read_results(path, shop.index)
    shop.reached = True
    if isinstance(rows, list):
        lines = [repr(row) for row in rows]
        untouched = [row for row in shop.rows if repr(row) in lines]
        there = {(*box, score) for box, score in zip(results.boxes.tolist(), results.scores.tolist(), strict=True)}
        demand(all((*row["bbox"], row["score"]) in there for row in untouched), "a row that was not touched is gone")
    check_metrics(results, shop.index)
    other = read_results(shop.rows, shop.index)
    for row in compare(other, results, shop.index, draws=5)["figures"].values():
        values = [value for value in row.values() if value is not None]
        demand(all(-1 <= value <= 1 for value in values), f"a comparison gives {row}")
    if rng.random() < 0.3:
        options = {"results": str(path), "annotations": str(shop.root / "annotations/val.json"),
                   "images": str(shop.root / "images"), "out": str(folder / "eval")}  # fmt: skip
        evaluate_command(EvalOptions.parse(options))
        json.loads((folder / "eval/metrics.json").read_text())
        demand((folder / "eval/report.html").stat().st_size > 0, "no report")


def odd_row(rows: list[Any], rng: np.random.Generator) -> None:
    """A detection as some other tool may have written it."""
    row = pick(rng, rows) if rows else None
    if not isinstance(row, dict):
        return
    action = rng.integers(6)
    if action == 0:
        row["score"] = pick(rng, [0, 1, 1.0, 2, -3, 99.5, 1e10, -1e308, 1e308, 5e-324])
    elif action == 1 and isinstance(row.get("bbox"), list) and row["bbox"]:
        row["bbox"][int(rng.integers(len(row["bbox"])))] = pick(rng, [0, 0.0, 1e4, 1e9, 1e155, 1e308, 1e-300, -3])
    elif action == 2:
        rows[:] = [rows[i] for i in rng.permutation(len(rows))]
    elif action == 3:
        rows += copy.deepcopy(rows[: int(rng.integers(len(rows)))])
    elif action == 4:
        row[pick(rng, ["segmentation", "area", "id", "extra"])] = copy.deepcopy(pick(rng, ODD))
    else:
        del rows[int(rng.integers(len(rows))) :]


WORDS = {
    "predict": ("ckpt=d.ckpt", "source=data/images/0.png", "out=OUT", "score_threshold=0.3", "classes=[car]",
                "max_proposals=5", "tile=[40,40,8]", "flip=true", "batch_size=2", "every=1", "save=[json]",
                "device=cpu", "threads=1"),
    "eval": ("results=results.json", "annotations=data/annotations/val.json", "images=data/images", "out=OUT",
             "metrics=coco", "report=false", "report.images=2", "max_proposals=null", "ckpt=null"),
    "compare": ("a=results.json", "b=results.json", "annotations=data/annotations/val.json", "out=OUT", "draws=5",
                "seed=1", "score_threshold=0.3", "top=3"),
    "doctor": ("recipe=finetune", "data.root=data", "out=OUT", "input.short_side=48", "input.long_side=64", "workers=1",
               "rpn.scales=[16,32]", "rpn.ratios=[1.0]", "data.val.images=images"),
    "train": ("recipe=finetune", "backbone=v2_0.5x", "data.root=data", "run_dir=OUT", "input.short_side=48",
              "input.long_side=64", "light_head.thin_channels=2", "rpn.channels=16", "rpn.scales=[16,32]",
              "optimizer.lr=0.01", "augment.flip=0.5", "schedule.epochs=1", "backbone.weights=null", "neck.name=cem",
              "light_head.mid_channels=8", "augment.scale=[0.9,1.1]", "train.batch_size=2", "freeze.stages=0"),
    "export": ("ckpt=d.ckpt", "data.root=data", "check.images=2", "out=OUT", "format=onnx", "calibration_images=2",
               "size=64x64", "batch=1", "check.max_drop.float32=0.5", "accuracy_control=false", "check.threads=1",
               "calibration=data/images", "check=null"),
    "import_weights": ("source=w.pth", "out=OUT/w.pth", "backbone.stem_channels=8", "backbone.channels=[16,32,64]",
                       "backbone.repeats=[1,1,1]", "input=bgr255", "partial=true"),
}  # fmt: skip
# Without these a command has nothing to do; the first ones of each line.
NEEDED = {"predict": 3, "eval": 4, "compare": 5, "doctor": 5, "train": 6, "export": 4, "import_weights": 5}
TEXTS = (
    "", "null", "nan", "inf", "-1", "0", "1", "2", "0.5", "1e308", "true", "[]", "[1]", "{}", "[1,2]", "{a: 1}", "text",
    "é", "a b", "'a", '"a"', "[a", "it's.jpg", 'q"uo.jpg', "$x", "a=b", "1_000", "1e3", "99999999999999999999", "???",
    "${x}", "a,b", "[[1]]", "~", "!", "0x10", "[null]", "no_such.png", "-0", "1.", ".5", "[16,32]", "v2_1x", "voc",
)  # fmt: skip

NUMBERS = ("0", "1", "2", "3", "5", "16", "0.5", "0.01", "1.0", "1e-3", "1e1", "007", "+1", "-0.0", "1.5", "null")


def fuzz_command(shop: Workshop, rng: np.random.Generator, folder: Path) -> None:
    """A command line with some odd words, run to its end; of a training, its first step."""
    command = pick(rng, list(WORDS))
    words = list(WORDS[command][: NEEDED[command]])
    words += [word for word in WORDS[command][NEEDED[command] :] if rng.random() < 0.3]
    for _ in range(int(pick(rng, [1, 1, 2]))):
        at = int(rng.integers(len(words)))
        key, _, value = words[at].partition("=")
        action = rng.integers(7)
        if action < 4 and key not in ("ckpt", "workers"):
            chosen = pick(rng, [word for word in WORDS[command] if not word.startswith(("workers", "threads"))])
            key, _, value = chosen.partition("=")
            likely = NUMBERS if value.replace(".", "").isdecimal() and rng.random() < 0.6 else TEXTS
            words.append(f"{key}={pick(rng, likely)}")
        elif action == 4:
            words[at] = f"{key}{pick(rng, ['', '==', ' = ', ':'])}{value}"
        elif action == 5:
            words[at] = f"{pick(rng, ['+', '++', '~', '.', 'x'])}{words[at]}"
        else:
            words[at] = words[at].replace(pick(rng, list(words[at])), pick(rng, ["", "é", " ", "\x01", "'"]), 1)
    words = [word.replace("OUT", "out") for word in words]
    for name in ("data", "d.ckpt", "results.json", "w.pth"):
        (folder / name).symlink_to(shop.folder / name)
    composed = compose(command, words)
    options: Any = composed.options()
    shop.reached = True
    if command == "train":
        index = load_annotations(*options.data.files("train"))
        transform = TrainTransform(options.input, options.augment, seed=0)
        if max(options.input.short_side, options.input.long_side) > 200:
            return  # right, but minutes
        dataset = DetectionDataset(index, transform)
        network = build_network(options, len(index.class_names)).train()
        losses = network.losses(collate([dataset[i] for i in range(min(2, len(dataset)))]))
        demand(all(torch.isfinite(loss) for loss in losses.values()), f"losses {losses}")
        return
    try:
        with written_before(shop):
            composed.run(options)
    except SystemExit as stop:
        demand(stop.code in (0, 1) or str(stop.code).startswith("failed: "), f"exit code {stop.code}")
    for path in folder.glob("**/*.json"):
        if not path.is_symlink() and path.is_relative_to(folder) and "data" not in path.parts:
            tree = json.loads(path.read_text("utf-8"))
            if path.name == "detections.json" and command == "predict":
                for row in tree if isinstance(tree, list) else tree["images"]:
                    check_detections(row)
            if path.name == "metrics.json":
                demand(all(v is None or isinstance(v, dict) or 0 <= v <= 1 for v in tree.values()), f"metrics {tree}")


@contextmanager
def written_before(shop: Workshop) -> Iterator[None]:
    """Exports are copies of what was written once: a writer takes seconds."""

    def write(detector: Detector, path: Path, *, batch: int | None, canvas: tuple[int, int] | None, **_: Any) -> None:
        export_info(detector, batch=batch, canvas=canvas)  # refuses sizes
        path.parent.mkdir(exist_ok=True)
        for suffix in (".xml", ".bin") if path.suffix == ".xml" else (path.suffix,):
            shutil.copy(shop.folder / f"d{suffix}", path.with_suffix(suffix))

    before = dict(export_app.FORMATS)
    export_app.FORMATS.update({name: one._replace(write=write) for name, one in before.items()})
    try:
        yield
    finally:
        export_app.FORMATS.update(before)


KINDS: dict[str, Callable[[Workshop, np.random.Generator, Path], None]] = {
    "annotations": fuzz_annotations,
    "images": fuzz_images,
    "checkpoints": fuzz_checkpoints,
    "command": fuzz_command,
    "results": fuzz_results,
    "exports": fuzz_exports,
    "videos": fuzz_videos,
    "service": fuzz_service,
}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_one(shop: Workshop, seed: int) -> Outcome:
    """Make the mutant of a seed, and see how it ends; again where it was late: the machine may have been busy."""
    outcome = _run_once(shop, seed)
    return _run_once(shop, seed) if outcome.end == LATE else outcome


def _run_once(shop: Workshop, seed: int) -> Outcome:
    kind = list(KINDS)[seed % len(KINDS)]
    folder = shop.folder / "mutant"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    start, here, trace = time.perf_counter(), Path.cwd(), ""
    shop.reached = False
    torch.manual_seed(seed)
    os.chdir(folder)
    try:
        with time_limit(LIMIT), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            KINDS[kind](shop, np.random.default_rng(seed), folder)
        end = "used"
    except Late:
        end, trace = LATE, traceback.format_exc()
    except Exception as error:
        message = explain(error)
        end = "refused" if message else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if message and (len(message.splitlines()) > 2 or not message.strip()):
            end = f"a message of {len(message.splitlines())} lines: {message[:80]!r}"
        trace = traceback.format_exc()
    finally:
        os.chdir(here)
    return Outcome(kind, seed, end, shop.reached, time.perf_counter() - start, trace)


def run_many(seeds: Iterator[int], count: int, keep: Path | None = None) -> list[Outcome]:
    """Run `count` mutants; failures are added to the file `keep` as soon as they are found, a JSON object each.

    The file `current` in the workshop's folder, which stays when a mutant ends the process, has the seed at work.
    """
    logging.disable(logging.CRITICAL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    outcomes = []
    try:
        with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
            shop = Workshop(Path(folder))
            if keep:
                print(f"the seed at work is in {folder}/current", file=sys.stderr, flush=True)
            for number, seed in zip(range(count), seeds, strict=False):
                (shop.folder / "current").write_text(f"{seed}\n")
                outcome = run_one(shop, seed)
                outcomes.append(outcome)
                if outcome.failed and keep:
                    with keep.open("a") as file:
                        file.write(json.dumps(vars(outcome)) + "\n")
                if keep and (number + 1) % 100 == 0:
                    failed = sum(one.failed for one in outcomes)
                    print(f"{number + 1} of {count}, seed {seed}, {failed} failed", file=sys.stderr, flush=True)
    finally:
        torch.set_num_threads(threads)
        logging.disable(logging.NOTSET)
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """Counts of each kind, and each distinct failure with its first seed."""
    lines = [
        f"{'kind':12} {'mutants':>8} {'used':>7} {'refused':>8} {'failed':>7} {'reached a step':>15} {'s each':>7}"
    ]
    for kind in [*KINDS, "all"]:
        own = [one for one in outcomes if kind in (one.kind, "all")]
        ends = Counter("failed" if one.failed else one.end for one in own)
        if own:
            share, mean = sum(one.reached for one in own) / len(own), sum(one.seconds for one in own) / len(own)
            numbers = f"{len(own):8} {ends['used']:7} {ends['refused']:8} {ends['failed']:7} {share:15.0%} {mean:7.3f}"
            lines.append(f"{kind:12} {numbers}")
    for (kind, place), group in failures(outcomes).items():
        lines.append(f"{len(group):4} x {kind}, seed {group[0].seed}: {group[0].end[:160]}   [{place}]")
    return "\n".join(lines)


def failures(outcomes: list[Outcome]) -> dict[tuple[str, str], list[Outcome]]:
    """Failures by their kind and the place in the code."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for one in outcomes:
        if one.failed:
            places = [line.strip() for line in one.trace.splitlines() if "/detector/" in line]
            place = places[-1].split("/detector/")[-1] if places else one.end
            groups.setdefault((one.kind, place), []).append(one)
    return groups


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the first one; the mutants have seed, seed + 1 ...")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, separated by commas")
    parser.add_argument("--replay", type=int, help="the seed of a single mutant")
    parser.add_argument("--keep", type=Path, default=Path("fuzz_failures.jsonl"), help="where failures are written")
    given = parser.parse_args()
    only = given.only.split(",")
    if unknown := set(only) - set(KINDS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there is {', '.join(KINDS)}")
    if given.replay is not None:
        (outcome,) = run_many(iter([given.replay]), 1)
        print(f"{outcome.trace}{outcome.kind}, seed {outcome.seed}: {outcome.end}, {outcome.seconds:.2f} s")
        return int(outcome.failed)
    numbers = [list(KINDS).index(kind) for kind in only]
    seeds = (seed for seed in range(given.seed, sys.maxsize) if seed % len(KINDS) in numbers)
    outcomes = run_many(seeds, given.count, given.keep)
    print(table(outcomes))
    return int(any(one.failed for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
