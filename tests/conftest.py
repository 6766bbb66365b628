"""Fixtures that more than one test file uses."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detector.data.collate import Batch
from detector.data.preprocess import Preprocessing
from detector.inference.detector import Detector
from detector.models.build import NetworkOptions


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and weights beside the repository; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder of real data (../shared), which is not on this machine")
    return folder


@pytest.fixture
def tiny_coco(tmp_path: Path) -> Path:
    """A generated COCO-style folder: images/, annotations/train.json and the same as annotations/val.json.

    Four images (ids 10, 7, 42, 99), categories 90, 3 and 17 in this order, five boxes of which one is a crowd region,
    one image without a box, one in a sub-folder.
    """
    root = tmp_path / "tiny"
    (root / "images" / "sub").mkdir(parents=True)
    (root / "annotations").mkdir()
    pictures = [(10, "a.png", 64, 48), (7, "b.jpg", 40, 60), (42, "empty.jpg", 50, 50), (99, "sub/c.jpg", 80, 40)]
    rng = np.random.default_rng(0)
    for _, name, width, height in pictures:
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        coarse.resize((width, height)).save(root / "images" / name)
    objects: list[tuple[int, int, int, list[float], int]] = [
        (1, 99, 17, [10, 5, 30, 20], 0),
        (2, 10, 3, [4, 6, 20, 10], 0),
        (3, 7, 90, [1, 2, 30, 40], 1),
        (4, 10, 17, [30.5, 20.25, 10, 12], 0),
        (5, 7, 3, [5, 30, 8, 9], 0),
    ]
    content = {
        "images": [{"id": i, "file_name": n, "width": w, "height": h} for i, n, w, h in pictures],
        "annotations": [
            {"id": k, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3] * 0.5, "iscrowd": crowd}
            for k, i, c, b, crowd in objects
        ],
        "categories": [{"id": 90, "name": "kite"}, {"id": 3, "name": "car"}, {"id": 17, "name": "cat"}],
    }
    for split in ("train", "val"):
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def small_spec() -> dict[str, Any]:
    """What `build_network` takes, for a network that runs in milliseconds; tests change single values of it."""
    return {
        "backbone": {
            "name": "shufflenet_v2",
            "stem_channels": 8,
            "channels": [16, 32, 64],
            "repeats": [2, 2, 2],
            "extra_depthwise": False,
            "layout": "torchvision",
            "dilate_c5": False,
        },
        "neck": {"name": "cem", "width": 16},
        "rpn": {
            "channels": 16,
            "separable": True,
            "scales": [16, 32, 64],
            "ratios": [0.5, 1.0, 2.0],
            "foreground_iou": 0.7,
            "background_iou": 0.3,
            "inside_only": False,
            "sample_count": 32,
            "foreground_share": 0.5,
            "smooth_l1_beta": 1 / 9,
            "nms_threshold": 0.7,
            "train_limits": {"before_nms": 100, "after_nms": 40},
            "test_limits": {"before_nms": 80, "after_nms": 20},
        },
        "light_head": {
            "mid_channels": 8,
            "kernel_size": 5,
            "thin_channels": 2,
            "hidden_channels": 64,
            "align_reduce": "mean",
            "class_agnostic": True,
            "sampling": "ohem",
            "sample_count": 16,
            "foreground_share": 0.25,
            "foreground_iou": 0.5,
            "box_weight": 2.0,
            "smooth_l1_beta": 1.0,
            "score_threshold": 0.001,
            "nms_threshold": 0.5,
            "max_detections": 30,
        },
    }


@pytest.fixture
def excite() -> Callable[[nn.Module], nn.Module]:
    """Give a fresh network the statistics of a trained one, in evaluation mode.

    Its normalisation fits its activations, and its outputs differ from place to place: objectness and class logits by
    about 2, deltas by about 0.2 of a side.
    """

    def change(network: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randint(0, 256, (4, 3, 8, 12), generator=generator, dtype=torch.uint8)
        images = noise.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        outputs = {
            network.rpn.objectness: 2.0,
            network.rpn.deltas: 0.2,
            network.head.class_logits: 2.0,
            network.head.box_deltas: 1.0,
        }

        def scale(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
            dims = [d for d in range(output.ndim) if d != (1 if isinstance(layer, nn.Conv2d) else output.ndim - 1)]
            factor = outputs[layer] / output.std(dim=dims).clamp(min=1e-6)
            layer.weight.mul_(factor.view(-1, *[1] * (layer.weight.ndim - 1)))
            layer.bias.copy_(-output.mean(dim=dims) * factor)

        with torch.no_grad():
            for norm in norms:
                norm.momentum = 1.0
            network.train().features(images)
            for norm in norms:
                norm.momentum = 0.1
            handles = [layer.register_forward_hook(scale) for layer in outputs]
            network.eval().detect(images, torch.tensor([[64, 96]] * 4))
            for handle in handles:
                handle.remove()
        return network

    return change


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Make a Batch of coarse noise, given a list of (x1, y1, x2, y2, label) or (..., label, crowd) per image."""

    def make(objects: list[list[tuple]], *, size: tuple[int, int] = (64, 96), seed: int = 0) -> Batch:
        count, places = len(objects), max(1, *map(len, objects))
        boxes, labels = torch.zeros(count, places, 4), torch.full((count, places), -1)
        crowd = torch.zeros(count, places, dtype=torch.bool)
        for i, rows in enumerate(objects):
            for j, row in enumerate(rows):
                boxes[i, j], labels[i, j] = torch.tensor(row[:4]), int(row[4])
                crowd[i, j] = bool(row[5]) if len(row) > 5 else False
        height, width = size
        canvas = (-(-height // 32) * 32, -(-width // 32) * 32)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randint(
            0, 256, (count, 3, canvas[0] // 8, canvas[1] // 8), generator=generator, dtype=torch.uint8
        )
        images = noise.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
        sizes = torch.tensor([size] * count)
        scales = torch.ones(count, 2, dtype=torch.float64)
        return Batch(images, sizes, boxes, labels, crowd, scales, sizes.clone(), tuple(range(count)))

    return make


@pytest.fixture
def small_detector(small_spec: dict[str, Any], excite: Callable[[nn.Module], nn.Module]) -> Detector:
    """A detector of three classes that runs in milliseconds and finds something everywhere."""
    torch.manual_seed(0)
    detector = Detector(
        NetworkOptions.parse(small_spec),
        ("cat", "dog", "bird"),
        Preprocessing(short_side=64, long_side=96),
        {"epoch": 3},
    )
    excite(detector.network)
    return detector


@pytest.fixture
def small_onnx(small_detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives the small detector as ONNX with these inputs, written once for all tests: that takes seconds. Read only."""
    from detector.export.formats import export_onnx

    def written(**inputs: Any) -> Path:
        made_of = small_detector.options.spec(), small_detector.network.head.calibration, sorted(inputs.items())
        digest = hashlib.sha256(repr(made_of).encode())
        for values in small_detector.network.state_dict().values():
            digest.update(values.numpy().tobytes())
        folder = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:  # each process has a folder in that of the run
            folder = folder.parent
        path = folder / f"{digest.hexdigest()}.onnx"
        if not path.exists():
            export_onnx(small_detector, path, **inputs)
        return path

    return written
