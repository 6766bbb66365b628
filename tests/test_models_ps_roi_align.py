"""PS-RoI Align against torchvision's operator (mean) and against a loop in float64 from the definition (both)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import ps_roi_align as torchvision_ps_roi_align

from detector.models.ps_roi_align import ps_roi_align

STRIDE = 16


def make_rois(n: int, p: int, height: int, width: int, seed: int = 0) -> Tensor:
    """(N, P, 4) RoIs for a map of height x width cells; the first ten are one of each awkward kind."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height, width, height]) * float(STRIDE)
    rois = (torch.rand(n, p, 4, generator=generator) * 1.6 - 0.3) * size  # many reversed or partly outside
    w, h = float(width * STRIDE), float(height * STRIDE)
    rois[:, :10] = torch.tensor(
        [
            [0, 0, 0, 0],  # padding
            [0, 0, w, h],  # the whole input
            [-5 * w, -5 * h, 6 * w, 6 * h],  # much larger than the input
            [3.3, 2.1, 3.9, 2.2],  # far below one cell
            [w - 4, h - 4, w + 9, h + 9],  # across the lower right corner
            [-30, -30, 20, 20],  # across the upper left corner
            [w + 100, h + 100, w + 200, h + 150],  # outside
            [-300, 5, -200, 60],  # outside
            [0.9 * w, 0.8 * h, 0.1 * w, 0.2 * h],  # reversed
            [0.5 * w, 0.2 * h, 0.5 * w, 0.7 * h],  # no width
        ]
    )
    return rois


def oracle(features: Tensor, rois: Tensor, scale: float, size: int = 7) -> Tensor:
    """torchvision's operator with our shapes."""
    n, p = rois.shape[:2]
    index = torch.arange(n, dtype=rois.dtype).repeat_interleave(p)[:, None]
    pooled = torchvision_ps_roi_align(features, torch.cat((index, rois.reshape(-1, 4)), 1), size, scale, 2)
    return pooled.view(n, p, -1, size, size)


def bilinear(plane: Tensor, y: float, x: float) -> Tensor:
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return plane.new_zeros(())
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = plane[top, left] * (1 - (x - left)) + plane[top, right] * (x - left)
    lower = plane[bottom, left] * (1 - (x - left)) + plane[bottom, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)


def naive(features: Tensor, rois: Tensor, scale: float, size: int, reduce: str) -> Tensor:
    """One bin at a time, in float64."""
    n, p, c = rois.shape[0], rois.shape[1], features.shape[1] // size**2
    bins = []
    for image in range(n):
        for roi in rois[image].double():
            x1, y1, x2, y2 = (roi * scale - 0.5).tolist()
            bin_w, bin_h = (x2 - x1) / size, (y2 - y1) / size
            for channel in range(c * size * size):
                i, j = channel // size % size, channel % size
                plane = features[image, channel]
                samples = torch.stack(
                    [
                        bilinear(plane, y1 + (i + dy) * bin_h, x1 + (j + dx) * bin_w)
                        for dy in (0.25, 0.75)
                        for dx in (0.25, 0.75)
                    ]
                )
                bins.append(samples.mean() if reduce == "mean" else samples.amax())
    return torch.stack(bins).view(n, p, c, size, size)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(25, 38), (13, 7), (1, 1)])
def test_mean_equals_torchvision_in_value_and_gradient(n: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    features = torch.randn(n, 2 * 49, height, width, requires_grad=True)
    rois = make_rois(n, 60, height, width)
    ours, theirs = ps_roi_align(features, rois, spatial_scale=1 / STRIDE), oracle(features, rois, 1 / STRIDE)
    assert ours.shape == (n, 60, 2, 7, 7)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)

    upstream = torch.randn_like(theirs)
    (our_gradient,) = torch.autograd.grad(ours, features, upstream)
    (their_gradient,) = torch.autograd.grad(theirs, features, upstream)
    torch.testing.assert_close(our_gradient, their_gradient, atol=1e-4, rtol=0)


def rois_with_a_sample_on(limits: list[float], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Starts and ends (pixels) of `count` RoIs along one axis, each with one sample exactly on one of the limits."""
    place = torch.tensor(limits)[torch.randint(len(limits), (count,), generator=generator)]
    bin_size = torch.randint(-12, 13, (count,), generator=generator) / 4  # dyadic: no rounding on the way
    sample = torch.randint(14, (count,), generator=generator) / 2 + 0.25
    start = (place - sample * bin_size + 0.5) * STRIDE
    return start, start + 7 * bin_size * STRIDE


def test_samples_exactly_on_the_limits_equal_torchvision() -> None:
    """-1 and the size of the map are the last coordinates that count; one ulp further the value is zero."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 49, 5, 9, generator=generator)
    x1, x2 = rois_with_a_sample_on([-1.0, 0.0, 8.0, 9.0], 5000, generator)
    y1, y2 = rois_with_a_sample_on([-1.0, 0.0, 4.0, 5.0], 5000, generator)
    rois = torch.stack((x1, y1, x2, y2), -1)[None]
    ours, theirs = ps_roi_align(features, rois, spatial_scale=1 / STRIDE), oracle(features, rois, 1 / STRIDE)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_other_bin_counts_and_scales_equal_torchvision() -> None:
    features, rois = torch.randn(2, 3 * 25, 11, 6), make_rois(2, 40, 11, 6)
    ours = ps_roi_align(features, rois, spatial_scale=0.09, output_size=5)
    torch.testing.assert_close(ours, oracle(features, rois, 0.09, size=5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_equals_a_naive_loop_in_value_and_gradient(reduce: str) -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 2 * 9, 6, 5, requires_grad=True)
    exact = features.detach().double().requires_grad_()
    rois = make_rois(2, 14, 6, 5)
    ours = ps_roi_align(features, rois, spatial_scale=1 / STRIDE, output_size=3, reduce=reduce)
    expected = naive(exact, rois, 1 / STRIDE, 3, reduce)
    torch.testing.assert_close(ours, expected.float(), atol=1e-4, rtol=0)
    # Without a gradient the samples are pooled in another way.
    plain = ps_roi_align(features.detach(), rois, spatial_scale=1 / STRIDE, output_size=3, reduce=reduce)
    torch.testing.assert_close(plain, ours.detach(), atol=1e-6, rtol=1e-6)

    # The four samples of an empty RoI are equal but for rounding: which of them is the largest is arbitrary, the place
    # is not, so that the gradients agree as well.
    upstream = torch.randn_like(expected)
    (our_gradient,) = torch.autograd.grad(ours, features, upstream.float())
    (exact_gradient,) = torch.autograd.grad(expected, exact, upstream)
    torch.testing.assert_close(our_gradient, exact_gradient.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_every_bin_reads_its_own_channel_of_its_own_image(reduce: str) -> None:
    channels = torch.arange(98.0)[:, None, None].expand(98, 8, 8)
    features = torch.stack((channels, channels + 1000))
    rois = torch.tensor([[[8.0, 8, 100, 120]], [[20.0, 20, 90, 60]]])
    pooled = ps_roi_align(features, rois, spatial_scale=1 / STRIDE, reduce=reduce)
    expected = torch.arange(98.0).view(2, 7, 7)
    torch.testing.assert_close(pooled[:, 0], torch.stack((expected, expected + 1000)))


def test_an_image_does_not_depend_on_its_batch_mates() -> None:
    features, rois = torch.randn(3, 98, 9, 12), make_rois(3, 20, 9, 12)
    together = ps_roi_align(features, rois, spatial_scale=1 / STRIDE)
    alone = [ps_roi_align(features[i : i + 1], rois[i : i + 1], spatial_scale=1 / STRIDE) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_no_rois_give_an_empty_result_and_a_zero_gradient(reduce: str) -> None:
    features = torch.randn(2, 490, 4, 6, requires_grad=True)
    pooled = ps_roi_align(features, torch.zeros(2, 0, 4), spatial_scale=1 / STRIDE, reduce=reduce)
    assert pooled.shape == (2, 0, 10, 7, 7)
    pooled.sum().backward()
    assert features.grad is not None
    assert not features.grad.any()


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_features_are_pooled_in_float32(autocast: bool) -> None:
    features = torch.randn(2, 98, 9, 12).bfloat16().requires_grad_()
    rois = make_rois(2, 20, 9, 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        pooled = ps_roi_align(features, rois, spatial_scale=1 / STRIDE)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, oracle(features.float(), rois, 1 / STRIDE), atol=1e-4, rtol=0)
    pooled.sum().backward()
    assert features.grad is not None
    assert features.grad.dtype == torch.bfloat16


def test_channels_last_features_give_the_same() -> None:
    rois = make_rois(1, 20, 9, 12)
    features = torch.randn(1, 98, 9, 12)
    strided = features.contiguous(memory_format=torch.channels_last)
    ours, theirs = ps_roi_align(strided, rois, spatial_scale=1 / STRIDE), oracle(features, rois, 1 / STRIDE)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_degenerate_rois_stay_finite(reduce: str) -> None:
    features = torch.randn(1, 98, 9, 12, requires_grad=True)
    rois = torch.tensor(
        [[[0, 0, 0, 0], [9, 9, 9, 9], [50, 60, -50, -60], [-1e30, -1e30, 1e30, 1e30], [1e38, 1e38, 1e38, 1e38]]]
    )
    pooled = ps_roi_align(features, rois, spatial_scale=1 / STRIDE, reduce=reduce)
    assert pooled.isfinite().all()
    assert pooled[0, 0].any()  # the padding RoI reads the corner of the map ...
    assert not pooled[0, 4].any()  # ... and what lies outside reads zeros
    pooled.sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_rois_are_constants() -> None:
    features = torch.randn(1, 98, 9, 12, requires_grad=True)
    rois = make_rois(1, 20, 9, 12).requires_grad_()
    ps_roi_align(features, rois, spatial_scale=1 / STRIDE).sum().backward()
    assert rois.grad is None


def test_wrong_arguments_are_named() -> None:
    rois = torch.zeros(1, 1, 4)
    with pytest.raises(ValueError, match=r"50 channels.*7\*7"):
        ps_roi_align(torch.zeros(1, 50, 4, 4), rois, spatial_scale=1 / STRIDE)
    with pytest.raises(ValueError, match="'sum'"):
        ps_roi_align(torch.zeros(1, 49, 4, 4), rois, spatial_scale=1 / STRIDE, reduce="sum")
