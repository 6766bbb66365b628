"""Box geometry against torchvision and against arithmetic by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, clip_boxes_to_image

from detector.models.boxes import (
    MAX_LOG_RATIO,
    box_area,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    pairwise_coverage,
    pairwise_iou,
)


def random_boxes(*shape: int, seed: int = 0, size: float = 100.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * size
    return torch.cat((corner, corner + torch.rand(*shape, 2, generator=generator) * size / 2 + 0.5), dim=-1)


def test_area_of_reversed_and_empty_boxes_is_zero() -> None:
    boxes = torch.tensor([[1.0, 2.0, 4.0, 4.0], [4.0, 4.0, 1.0, 2.0], [3.0, 3.0, 3.0, 9.0], [0.0, 5.0, 9.0, 2.0]])
    assert box_area(boxes).tolist() == [6.0, 0.0, 0.0, 0.0]


def test_iou_equals_torchvision_per_image() -> None:
    a, b = random_boxes(3, 20, seed=1), random_boxes(3, 7, seed=2)
    expected = torch.stack([box_iou(x, y) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(pairwise_iou(a, b), expected)


def test_iou_of_one_anchor_set_with_a_batch() -> None:
    anchors, gt = random_boxes(20, seed=1), random_boxes(3, 7, seed=2)
    expected = torch.stack([box_iou(anchors, boxes) for boxes in gt])
    torch.testing.assert_close(pairwise_iou(anchors, gt), expected)


def test_iou_of_empty_boxes_is_zero_and_never_nan() -> None:
    point = torch.tensor([[5.0, 5.0, 5.0, 5.0]])
    around = torch.tensor([[0.0, 0.0, 9.0, 9.0], [5.0, 5.0, 5.0, 5.0], [9.0, 9.0, 0.0, 0.0]])
    assert pairwise_iou(point, around).tolist() == [[0.0, 0.0, 0.0]]
    assert pairwise_coverage(point, around).tolist() == [[0.0, 0.0, 0.0]]
    assert pairwise_iou(point[:0], around).shape == (0, 3)


def test_coverage_equals_pycocotools_for_crowds() -> None:
    mask = pytest.importorskip("pycocotools.mask")
    a, b = random_boxes(12, seed=3), random_boxes(4, seed=4)

    def xywh(boxes: torch.Tensor) -> list[list[float]]:
        return torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1).double().numpy()

    expected = torch.from_numpy(mask.iou(xywh(a), xywh(b), [1] * len(b))).float()
    torch.testing.assert_close(pairwise_coverage(a, b), expected)


def test_encode_and_decode_equal_torchvision() -> None:
    coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
    boxes, anchors = random_boxes(40, seed=5), random_boxes(40, seed=6)
    deltas = encode_boxes(boxes, anchors)
    torch.testing.assert_close(deltas, coder.encode_single(boxes, anchors), rtol=1e-5, atol=1e-5)
    wild = torch.randn(40, 4, generator=torch.Generator().manual_seed(7)) * 3
    torch.testing.assert_close(decode_boxes(wild, anchors), coder.decode_single(wild, anchors), rtol=1e-5, atol=1e-3)


def test_decode_is_the_inverse_of_encode() -> None:
    boxes, anchors = random_boxes(2, 30, seed=8), random_boxes(2, 30, seed=9)
    torch.testing.assert_close(decode_boxes(encode_boxes(boxes, anchors), anchors), boxes, rtol=1e-5, atol=1e-3)


def test_decode_by_hand() -> None:
    anchor = torch.tensor([[10.0, 20.0, 30.0, 60.0]])  # centre (20, 40), 20 x 40
    deltas = torch.tensor([[0.5, -0.25, math.log(2.0), 0.0]])  # centre (30, 30), 40 x 40
    torch.testing.assert_close(decode_boxes(deltas, anchor), torch.tensor([[10.0, 10.0, 50.0, 50.0]]))


def test_decode_bounds_the_growth_of_a_box() -> None:
    anchor = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    huge = decode_boxes(torch.tensor([[0.0, 0.0, 1e4, float("inf")]]), anchor)
    torch.testing.assert_close(huge[:, 2:] - huge[:, :2], torch.full((1, 2), 1000.0))
    assert math.isclose(math.exp(MAX_LOG_RATIO), 62.5)


def test_encode_is_finite_for_boxes_without_size() -> None:
    empty = torch.tensor([[3.0, 3.0, 3.0, 3.0]])
    real = torch.tensor([[0.0, 0.0, 1000.0, 1000.0]])
    for boxes, anchors in ((empty, real), (real, empty), (empty, empty)):
        assert encode_boxes(boxes, anchors).isfinite().all()


def test_clip_equals_torchvision_per_image() -> None:
    boxes = random_boxes(2, 25, seed=10) * 2 - 60
    sizes = torch.tensor([[70, 50], [30, 110]])
    expected = torch.stack([clip_boxes_to_image(b, tuple(s)) for b, s in zip(boxes, sizes.tolist(), strict=True)])
    assert torch.equal(clip_boxes(boxes, sizes), expected)


def test_geometry_stays_float32_under_autocast() -> None:
    boxes, anchors = random_boxes(4, seed=1), random_boxes(4, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = (pairwise_iou(boxes, anchors), encode_boxes(boxes, anchors), decode_boxes(boxes * 0.01, anchors))
    assert [result.dtype for result in results] == [torch.float32] * 3
    assert torch.equal(results[0], pairwise_iou(boxes, anchors))
