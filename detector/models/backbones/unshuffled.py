"""ShuffleNet V2 without shuffling, for inference: a branch reads pieces of what earlier branches made.

A shuffle copies every channel in every unit, though half of them only pass through. But which unit reads a channel is
known beforehand, and by the way two halves interleave, the channels of one tensor that meet the same reader lie side by
side. So a reader concatenates a few pieces, and whoever comes next has its weights reordered to that order. This
copies half as much, and nothing is interleaved, which some runtimes do channel by channel (OpenVINO 2026.4: 12 of
27 ms). A channel has one reader, so each tensor is split once, into the pieces for its readers: one operation in place
of several, and one that NNCF lets int8 through, as it does not with slices. A measure of this project.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from detector.models.backbones.channel_order import reads_here


class Piece(NamedTuple):
    """Channels start to stop of the tensor that was made as number `source`."""

    source: int
    start: int
    stop: int


class UnshuffledStage(nn.Module):
    """A Stage whose branches read pieces of earlier tensors: the same map with its channels in another order.

    Attributes:
        order: (C,) int64; channel p of the result is channel order[p] of the Stage's.
    """

    def __init__(self, stage: nn.Sequential, channels: int) -> None:
        """
        Args:
            stage: its normalisation folded; shuffling, and without residuals, whose two terms need one order. Its
                parts become parts of this, their weights reordered.
            channels: C, of its result.
        """
        super().__init__()
        first, *units = stage
        self.first = first
        self.branches = nn.ModuleList(_branch(unit) for unit in units)
        self.reads, orders = plan(channels // 2, len(units))
        every = sorted(piece for pieces in self.reads for piece in pieces)
        self.pieces = [[piece for piece in every if piece.source == source] for source in range(2 + len(units))]
        self.order = orders[-1]
        for branch, order in zip(self.branches, orders[:-1], strict=True):
            reorder_inputs(branch, order)

    def forward(self, x: Tensor) -> Tensor:
        made: dict[Piece, Tensor] = {}
        for pieces, tensor in zip(self.pieces, self.first(x), strict=False):
            made |= _split(tensor, pieces)
        for branch, slices, pieces in zip(self.branches, self.reads, self.pieces[2:], strict=False):
            made |= _split(branch(torch.cat([made[piece] for piece in slices], dim=1)), pieces)
        return torch.cat([made[piece] for piece in self.reads[-1]], dim=1)


def _split(tensor: Tensor, pieces: Sequence[Piece]) -> dict[Piece, Tensor]:
    if len(pieces) == 1:
        return {pieces[0]: tensor}
    return dict(zip(pieces, tensor.split([piece.stop - piece.start for piece in pieces], dim=1), strict=True))


def _branch(unit: nn.Module) -> nn.Sequential:
    """The layers of a unit's main branch, one after the other: of a small map, every call of a module counts."""
    layers = _flat((unit.get_submodule("extra"), unit.get_submodule("branch2")))
    return nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Identity)))


def plan(half: int, units: int) -> tuple[list[list[Piece]], list[Tensor]]:
    """Who reads what (`channel_order.reads_here`), as pieces of tensors.

    Args:
        half: channels of each of the two tensors that the first unit makes, and of each branch's.
        units: how many follow.

    Returns:
        For each unit, and last for the stage's result: the pieces, and the order (channels,) that they come in: channel
        p of the concatenation is channel order[p] of what the Stage would have had there.
    """
    reads = reads_here(np.arange(2 * half), units)
    return [_runs(read, half) for read in reads], [torch.from_numpy(np.argsort(read)) for read in reads]


def _runs(channels: np.ndarray, half: int) -> list[Piece]:
    """Channels (numbered through all tensors) in ascending order, as pieces of the tensors of `half` channels."""
    channels = np.sort(channels)
    ends = np.flatnonzero((np.diff(channels) > 1) | (channels[1:] % half == 0)) + 1
    return [Piece(int(run[0] // half), int(run[0] % half), int(run[-1] % half) + 1) for run in np.split(channels, ends)]


@torch.no_grad()
def reorder_inputs(layers: nn.Module | Iterable[nn.Module], order: Tensor) -> None:
    """Let a chain of layers take its channels in this order: channel p of the new input is channel order[p].

    Reaches through depthwise convolutions and identities down to the first convolution that mixes channels, and changes
    their weights in place.

    Raises:
        TypeError: some other layer comes before.
    """
    for layer in _flat(layers):
        if not isinstance(layer, nn.Conv2d):
            if not isinstance(layer, nn.Identity):
                raise TypeError(f"cannot reorder the inputs of {type(layer).__name__}")
        elif layer.groups == 1:
            layer.weight.copy_(layer.weight[:, order])
            return
        elif layer.groups == layer.in_channels == layer.out_channels:
            layer.weight.copy_(layer.weight[order])
            if layer.bias is not None:
                layer.bias.copy_(layer.bias[order])
        else:
            raise TypeError("cannot reorder the inputs of a grouped convolution")


def _flat(layers: nn.Module | Iterable[nn.Module]) -> Iterable[nn.Module]:
    if isinstance(layers, nn.Module) and not isinstance(layers, nn.Sequential):
        yield layers
        return
    for layer in layers:
        yield from _flat(layer)
