"""Boxes in numpy against torchvision and pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision

from detector.data.boxes import box_area, box_iou, intersection


def boxes(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-20, 80, (count, 2))
    return np.concatenate((corner, corner + rng.uniform(0, 60, (count, 2))), axis=1)


def test_iou_and_area_are_torchvisions() -> None:
    a, b = boxes(40, 0), boxes(30, 1)
    expected = torchvision.ops.box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    np.testing.assert_allclose(box_iou(a, b), expected, atol=1e-12)
    np.testing.assert_allclose(box_area(a), torchvision.ops.box_area(torch.from_numpy(a)).numpy(), rtol=1e-12)


def test_overlap_with_crowds_is_pycocotools() -> None:
    mask = pytest.importorskip("pycocotools.mask")
    a, b = boxes(40, 2), boxes(30, 3)
    crowd = np.arange(30) % 3 == 0
    xywh = [np.concatenate((one[:, :2], one[:, 2:] - one[:, :2]), axis=1) for one in (a, b)]
    np.testing.assert_allclose(box_iou(a, b, crowd), mask.iou(*xywh, crowd.astype(np.uint8)), atol=1e-12)


def test_empty_reversed_and_no_boxes() -> None:
    empty = np.array([[3.0, 3.0, 3.0, 3.0], [9.0, 9.0, 1.0, 1.0]])
    assert not box_iou(empty, empty).any()
    assert not box_iou(empty, empty, np.array([True, True])).any()
    assert intersection(empty[:0], empty).shape == (0, 2)
    assert box_iou(empty, empty[:0]).shape == (2, 0)
