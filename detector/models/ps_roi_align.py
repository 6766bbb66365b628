"""Position-sensitive RoI Align (Li et al. 2017, section 3.2): each bin of an RoI reads its own channels."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

SAMPLES = 2  # bilinear samples per bin and axis, as in the released code of Light-Head R-CNN


def ps_roi_align(
    thin_features: Tensor, rois: Tensor, *, spatial_scale: float, output_size: int = 7, reduce: str = "mean"
) -> Tensor:
    """Sample a grid of S x S bins from every RoI; bin (i, j) reads channel (c * S + i) * S + j of the map.

    All bins of all images go through one `grid_sample`, a standard operator of ONNX and OpenVINO.

    Args:
        thin_features: (N, C*S*S, h, w), S being `output_size`.
        rois: (N, P, 4) xyxy in pixels of the padded input; constants, no gradient reaches them. Degenerate and outside
            boxes are allowed.
        spatial_scale: map cells per input pixel, 1 / stride.
        output_size: bins per side, S.
        reduce: what a bin keeps of its 2x2 samples: "mean" (torchvision.ops.ps_roi_align with sampling_ratio=2) or
            "max" (the released code of Light-Head R-CNN).

    Returns:
        (N, P, C, S, S) float32, also under autocast.

    Raises:
        ValueError: when the number of channels is no multiple of S*S, or `reduce` is unknown.
    """
    n, channels, height, width = thin_features.shape
    num_rois, bins = rois.shape[1], output_size * output_size
    if channels % bins:
        raise ValueError(f"thin_features has {channels} channels, expected a multiple of {output_size}*{output_size}")
    if reduce not in ("mean", "max"):
        raise ValueError(f"reduce is {reduce!r}, expected 'mean' or 'max'")

    corners = rois.detach().float() * spatial_scale - 0.5  # cell centres lie at whole numbers
    x = _sample_positions(corners[..., 0], corners[..., 2], output_size, width)  # (N, S, 2, P)
    y = _sample_positions(corners[..., 1], corners[..., 3], output_size, height)
    shape = (n, output_size, output_size, SAMPLES, SAMPLES, num_rois)
    grid = torch.stack((x[:, None, :, None].expand(shape), y[:, :, None, :, None].expand(shape)), -1)
    grid = grid.view(n * bins, SAMPLES * SAMPLES, num_rois, 2)

    maps = thin_features.float().contiguous()  # from channels-last: grid_sample is faster on dense planes
    maps = maps.view(n, channels // bins, bins, height, width).transpose(1, 2)
    maps = maps.reshape(n * bins, channels // bins, height, width)  # one small map per bin
    # "zeros" drops the samples that lie outside; the others were clamped to the map already.
    samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    pooled = _pool(samples, reduce)  # (N*S*S, C, P)
    pooled = pooled.view(n, output_size, output_size, channels // bins, num_rois)
    return pooled.permute(0, 4, 3, 1, 2).contiguous()


def _pool(samples: Tensor, reduce: str) -> Tensor:
    """The mean or maximum over the third of four dimensions."""
    if samples.requires_grad:
        return samples.mean(2) if reduce == "mean" else samples.amax(2)
    # Pair by pair: over so short a dimension a reduction takes longer, in OpenVINO 14 times; but not its gradient.
    parts = samples.unbind(2)
    if reduce == "mean":
        return functools.reduce(torch.add, parts) / len(parts)
    return functools.reduce(torch.maximum, parts)


def _sample_positions(start: Tensor, end: Tensor, bins: int, size: int) -> Tensor:
    """Where the RoIs are sampled along one axis of `size` cells, in the [-1, 1] frame of grid_sample.

    start and end are (N, P) in cells; the result is (N, bins, 2, P). As in torchvision, a sample within one cell of the
    border is moved onto the map, and one further out counts as zero.
    """
    bin_size = (end - start)[:, None, None] / bins  # (N, 1, 1, P)
    bin_index = torch.arange(bins, device=start.device)[:, None, None]
    fraction = (torch.arange(SAMPLES, device=start.device)[:, None] + 0.5) / SAMPLES
    cells = bin_index * bin_size + start[:, None, None] + fraction * bin_size
    on_map = (cells >= -1) & (cells <= size)
    positions = (2 * cells.clamp(0, size - 1) + 1) / size - 1
    return torch.where(on_map, positions, -3.0)
