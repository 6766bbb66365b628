"""What `Detector.load` makes of a network for prediction finds what the training network finds, on real images."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from detector.data.images import read_image
from detector.data.preprocess import Preprocessing, resize
from detector.export.parity import difference
from detector.inference.detector import Detector
from detector.models.backbones.pretrained import load_weights
from detector.models.build import NetworkOptions

PICTURES = 200


def real_images(shared: Path) -> list[np.ndarray]:
    folders = (shared / "data" / name / "images" for name in ("coco-permissive-320", "bccd-320"))
    paths = list(chain.from_iterable(sorted(folder.rglob("*.jpg")) for folder in folders))
    return [read_image(path) for path in paths[:: len(paths) // PICTURES][:PICTURES]]


@pytest.mark.slow
@pytest.mark.parametrize("extra_depthwise", [False, True])
def test_folded_network_equals_the_training_one_on_real_images(
    shared: Path, tmp_path: Path, small_spec: dict[str, Any], extra_depthwise: bool
) -> None:
    spec = small_spec | {
        "backbone": {
            "name": "shufflenet_v2", "stem_channels": 24, "channels": [48, 96, 192], "repeats": [4, 8, 4],
            "extra_depthwise": extra_depthwise, "layout": "torchvision", "dilate_c5": False,
        }
    }  # fmt: skip
    torch.manual_seed(0)
    detector = Detector(NetworkOptions.parse(spec), ["a", "b", "c"], Preprocessing(short_side=320, long_side=640))
    load_weights(detector.network.backbone, shared / "weights" / "shufflenet_v2_x0_5_backbone.pth")
    pictures = real_images(shared)
    assert len(pictures) == PICTURES
    settle(detector, pictures[:8])
    detector.save(tmp_path / "d.ckpt")
    plain, fast = (Detector.load(tmp_path / "d.ckpt", "cpu", fused=fused) for fused in (False, True))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fast.network.modules())
    expected, found = (it.predict(pictures, score_threshold=0.05) for it in (plain, fast))
    boxes, scores, count = [], [], 0
    for one, other in zip(expected, found, strict=True):
        gap = difference(one, other)
        assert gap.partners == gap.total == len(other)
        boxes.append(gap.box / max(one.image_size))
        scores.append(gap.score)
        count += gap.total
    assert count > PICTURES  # there is something to compare
    assert max(boxes) < 1e-4  # of the image's longer side
    assert max(scores) < 1e-4


def settle(detector: Detector, pictures: list[np.ndarray]) -> None:
    """A neck and heads with statistics that fit, and outputs that differ from place to place, as after training."""
    network = detector.network
    for part in (network.neck, network.rpn.hidden):
        for layer in part.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None
                layer.train()
    detector.network.backbone.eval()
    sizes = [detector.preprocessing.target_size(*picture.shape[:2]) for picture in pictures]
    resized = [resize(picture, *size) for picture, size in zip(pictures, sizes, strict=True)]
    with torch.no_grad():
        for image in resized:
            pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
            height, width = (side // 32 * 32 for side in image.shape[:2])
            maps = network.features(pixels[:, :, :height, :width])
            network.rpn.hidden(maps[0])
        nn.init.normal_(network.rpn.objectness.weight, std=0.3)
        nn.init.normal_(network.rpn.deltas.weight, std=0.03)
        nn.init.normal_(network.head.class_logits.weight, std=0.3)
        nn.init.normal_(network.head.box_deltas.weight, std=0.05)
