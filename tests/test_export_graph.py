"""The traceable graph against LightHeadRCNN.detect, which suppresses image by image with torchvision's operator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from detector.data.preprocess import Prepared
from detector.export.graph import DetectionGraph, suppress_at_once, suppress_in_onnx
from detector.models.build import NetworkOptions, build_network
from detector.models.fuse import fuse
from detector.models.postprocess import Suppress, suppress_eagerly

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "no neck": {"neck": {"name": "none", "width": None}},
    "objectness in the score": {"light_head": {"objectness": 0.5}},
    "a box per class": {"light_head": {"class_agnostic": False}},
    "max of samples": {"light_head": {"align_reduce": "max"}},
    "kernel 15": {"light_head": {"kernel_size": 15}},
    "V2*": {"backbone": {"extra_depthwise": True}},
    "paper's layout": {"backbone": {"layout": "paper"}},
    "dense RPN, dilated": {"rpn": {"separable": False}, "backbone": {"dilate_c5": True}},
    "more proposals than candidates": {"rpn": {"test_limits": {"before_nms": 15, "after_nms": 40}}},
    "nothing found": {"light_head": {"score_threshold": 1.0}},
    "fewer candidates than detections": {"light_head": {"max_detections": 500}},
}


def changed(spec: dict[str, Any], changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A spec with single values replaced; None takes one away."""
    result = copy.deepcopy(spec)
    for part, values in changes.items():
        merged = result[part] | values
        result[part] = {key: value for key, value in merged.items() if value is not None}
    return result


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (count, 3, height // 8, width // 8), generator=generator, dtype=torch.uint8)
    return noise.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def prepared(images: Tensor, sizes: Tensor) -> Prepared:
    """As `prepare` would give them, of images that need no resize."""
    count = len(images)
    return Prepared(images.numpy(), sizes.numpy(), np.ones((count, 2)), sizes.numpy(), np.arange(count))


def check_equal(outputs: Any, expected: list[tuple[Tensor, Tensor, Tensor]], *, atol: float = 1e-5) -> int:
    """Outputs of a graph against those of the network; returns how many detections were compared."""
    boxes, scores, labels, counts = (torch.as_tensor(output) for output in outputs)
    assert counts.dtype == labels.dtype == torch.int64
    assert counts.tolist() == [len(image[1]) for image in expected]
    for i, (image_boxes, image_scores, image_labels) in enumerate(expected):
        n = int(counts[i])
        assert labels[i, :n].tolist() == image_labels.tolist()
        torch.testing.assert_close(scores[i, :n], image_scores, rtol=0, atol=atol)
        torch.testing.assert_close(boxes[i, :n], image_boxes, rtol=0, atol=100 * atol)
        assert (labels[i, n:] == -1).all()
        assert not scores[i, n:].any()
        assert not boxes[i, n:].any()
    return int(counts.sum())


@pytest.mark.parametrize("suppress", [suppress_at_once, suppress_in_onnx])
@pytest.mark.parametrize("name", VARIANTS)
def test_graph_equals_detect(
    small_spec: dict[str, Any], excite: Callable[[nn.Module], nn.Module], name: str, suppress: Any
) -> None:
    torch.manual_seed(0)
    network = excite(build_network(NetworkOptions.parse(changed(small_spec, VARIANTS[name])), 3))
    # Both fused: torch's own rounding is not the subject.
    network = fuse(network)
    compared = 0
    with torch.no_grad():
        for count, height, width in ((1, 64, 96), (3, 128, 64), (2, 96, 96)):
            images, sizes = pictures(count, height, width), torch.tensor([[height - 5, width - 9]] * count)
            expected = network.detect(images, sizes).per_image()
            outputs = DetectionGraph(network, suppress)(images.permute(0, 2, 3, 1), sizes)
            limit = min(network.head.options.max_detections, 3 * network.rpn.options.test_limits.after_nms)
            assert outputs[0].shape[:2] == (count, limit)
            compared += check_equal(outputs, expected)
    assert (compared == 0) == (name == "nothing found")
    assert name == "nothing found" or compared > 100


@pytest.mark.parametrize("suppress", [suppress_at_once, suppress_in_onnx, suppress_eagerly])
def test_suppression_is_greedy_by_image_and_class(suppress: Suppress) -> None:
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(2, 60, 2, generator=generator) * 40
    boxes = torch.cat((corners, corners + 5 + torch.rand(2, 60, 2, generator=generator) * 20), dim=-1)
    scores = torch.rand(2, 3, 60, generator=generator)
    scores[scores < 0.2] = 0
    kept = suppress(boxes[:, :, None], scores.transpose(1, 2), 0.4, 180).transpose(1, 2)
    kept &= scores > 0
    for row in range(2):
        for label in range(3):
            mine = scores[row, label].nonzero()[:, 0]
            # One class at a time, so that batched_nms moves nothing.
            expected = mine[batched_nms(boxes[row, mine], scores[row, label, mine], torch.zeros_like(mine), 0.4)]
            assert kept[row, label].nonzero()[:, 0].tolist() == sorted(expected.tolist())
    assert 20 < int(kept.sum()) < int((scores > 0).sum())


@pytest.mark.parametrize("suppress", [suppress_at_once, suppress_in_onnx, suppress_eagerly])
def test_suppression_is_exact_for_many_rows_of_large_boxes(suppress: Suppress) -> None:
    # IoU of 0.5 exactly is kept, a hair more is not: an offset in float32 would lose the hair.
    row = torch.tensor([[0.0, 0.0, 1300.0, 1000.0], [0.0, 0.0, 1300.0, 500.0], [0.0, 0.0, 1300.0, 500.01]])
    scores = torch.tensor([0.9, 0.8, 0.0, 0.9, 0.0, 0.8]).view(1, 2, 3).repeat(8, 40, 1)
    kept = suppress(row.expand(8, 3, 4)[:, :, None], scores.transpose(1, 2), 0.5, 300).transpose(1, 2)
    kept &= scores > 0
    assert kept.view(8, 40, 2, 3)[:, :, 0].tolist() == [[[True, True, False]] * 40] * 8
    assert kept.view(8, 40, 2, 3)[:, :, 1].tolist() == [[[True, False, False]] * 40] * 8
