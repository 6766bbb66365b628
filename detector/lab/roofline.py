"""A model of latency: what an operation computes at a peak, what it moves at a bandwidth, and a fixed cost.

    seconds = factor * sum over operations of (multiply-adds / peak + bytes / bandwidth + fixed)

Peak, bandwidth and fixed cost of each kind of operation follow from single layers timed on this machine, the factor
from whole networks. The two parts of a roofline (Williams et al. 2009) are added here, where it takes the larger one:
on the CPU measured, their sum came nearer (docs/cost_model.md). Fitted to batches of one image; a larger batch costs
what its operations cost.

    from detector.lab.roofline import LatencyModel
    LatencyModel.load("cost/model.json").predict(fuse(network), 224, 224)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from detector.errors import InputError
from detector.files import write_json
from detector.lab.cost import KINDS, Kind, Operation, operations
from detector.models.backbones.shufflenet_v2 import interleave
from detector.models.fuse import Pointwise

# Layers that are timed: side of the map -> channels, from the first layers of a network to its last. Chosen by this
# project: what backbones at 224 x 224 have, at round numbers.
SAMPLED = {112: (16, 32), 56: (24, 64, 128), 28: (48, 128, 256), 14: (64, 192, 512), 7: (96, 384, 1024)}


@dataclass(frozen=True)
class Rates:
    """What one kind of operation costs.

    Attributes:
        multiply_add, value: seconds for each; a value read or written is four bytes.
        fixed: seconds for each operation.
    """

    multiply_add: float
    value: float
    fixed: float


@dataclass(frozen=True)
class Measured:
    """A layer or a network with its time.

    Attributes:
        name: what it is called in tables.
        family: networks that are left out together; of a layer its kind.
        operations: what it runs.
        seconds: the median.
    """

    name: str
    family: str
    operations: Sequence[Operation]
    seconds: float


@dataclass(frozen=True)
class LatencyModel:
    """Predicts how long networks take on one machine.

    Attributes:
        machine: the processor, threads and version of torch that it was fitted on.
        threads: how many.
        rates: of each kind of operation.
        factor: what a whole network takes over the sum of its operations alone.
        median_error, worst_error: relative, of networks whose family was left out of the fit.
    """

    machine: str
    threads: int
    rates: Mapping[Kind, Rates]
    factor: float
    median_error: float
    worst_error: float

    def predict(self, module: nn.Module, height: int, width: int, batch: int = 1) -> float:
        """Seconds of a batch of images (batch, 3, height, width) in channels_last memory.

        Nothing is run: see `cost.operations` for what that takes, and for what cannot be predicted.

        Args:
            module: as it runs for prediction: `models.fuse.fuse(network)`.
        """
        images = torch.empty(batch, 3, height, width, device="meta", memory_format=torch.channels_last)
        return self.seconds(operations(module, images))

    def seconds(self, found: Sequence[Operation]) -> float:
        """What these operations take."""
        rates = [value for kind in KINDS for value in vars(self.rates[kind]).values()]
        return float(self.factor * (features(found) @ rates))

    def save(self, path: str | Path) -> None:
        """As JSON of plain values."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """From a file of `save`.

        Raises:
            InputError: it is none.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**values | {"rates": {kind: Rates(**values["rates"][kind]) for kind in KINDS}})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: no model of latency ({error}); tools/benchmark.py cost writes one.") from error


def features(found: Sequence[Operation]) -> np.ndarray:
    """(3 * kinds,): multiply-adds, values and number of the operations of each kind, as `Rates` has them."""
    sums = np.zeros((len(KINDS), 3))
    for one in found:
        sums[KINDS.index(one.kind)] += one.multiply_adds, one.memory_access, 1
    return sums.ravel()


def fit(samples: Sequence[Measured], networks: Sequence[Measured], *, machine: str, threads: int) -> LatencyModel:
    """The model with the least squares of relative errors, without negative costs.

    Args:
        samples: layers, for the rates.
        networks: for the factor and the errors; of at least two families.
        machine, threads: where they were measured.
    """
    rates = fit_costs(np.array([features(one.operations) for one in samples]), _seconds(samples))
    by_kind = {kind: Rates(*row) for kind, row in zip(KINDS, rates.reshape(-1, 3).tolist(), strict=True)}
    model = LatencyModel(machine, threads, by_kind, 1.0, 0.0, 0.0)
    alone, measured = np.array([model.seconds(one.operations) for one in networks]), _seconds(networks)
    errors = np.abs(left_out(model, networks) / measured - 1)
    factor = _factor(alone, measured)
    return replace(model, factor=factor, median_error=float(np.median(errors)), worst_error=float(errors.max()))


def left_out(model: LatencyModel, networks: Sequence[Measured]) -> np.ndarray:
    """Predicted seconds (N,) of networks, each by a factor fitted without its family."""
    alone = np.array([replace(model, factor=1.0).seconds(one.operations) for one in networks])
    families, measured, predicted = np.array([one.family for one in networks]), _seconds(networks), np.zeros_like(alone)
    for family in np.unique(families):
        out = families == family
        predicted[out] = alone[out] * _factor(alone[~out], measured[~out])
    return predicted


def _factor(alone: np.ndarray, measured: np.ndarray) -> float:
    return float(fit_costs(alone[:, None], measured)[0])


def fit_costs(design: ArrayLike, seconds: ArrayLike) -> np.ndarray:
    """Seconds (T,) that each term costs: least squares of the relative error, no cost below zero.

    Args:
        design: (N, T), how much of each term every one of N has.
        seconds: (N,), how long each takes.
    """
    from scipy.optimize import nnls

    relative = np.array(design) / np.array(seconds)[:, None]
    scale = np.maximum(relative.max(axis=0), 1e-30)  # counts of multiply-adds beside numbers of operations
    return nnls(relative / scale, np.ones(len(relative)))[0] / scale


def _seconds(rows: Sequence[Measured]) -> np.ndarray:
    return np.array([one.seconds for one in rows])


def sample_layers() -> Iterator[tuple[str, Kind, nn.Module, Tensor]]:
    """(name, kind, layers, image) of what is timed.

    Four layers that hand on their maps, as in a network, where a map keeps its size; there and back where channels
    change, as in the ShuffleNet V2 paper's table 1.
    """
    for c in (16, 32, 64):
        yield f"stem {c}", "dense", nn.Conv2d(3, c, 3, 2, 1), _image(3, 224)
    for side, c in ((side, channels) for side, widths in SAMPLED.items() for channels in widths):
        means = partial(torch.mean, dim=(2, 3), keepdim=True)
        chains: dict[Kind, list[list[nn.Module]]] = {
            "dense 1x1": [_there_and_back(c, c), _there_and_back(c, 4 * c)],
            "dense": [_there_and_back(c, c, 3)],
            "grouped": [_there_and_back(c, c, 1, groups) for groups in (2, 4, 8)] + [_there_and_back(c, c, 3, c // 8)],
            "depthwise": [_there_and_back(c, c, k, c) for k in (3, 5)] + [[nn.Conv2d(c, c, 3, 2, 1, groups=c)]],
            "matrix product": [[Pointwise(nn.Conv2d(c, c, 1))], [_Apply(means), nn.Flatten(), nn.Linear(c, 1000)]],
            "element-wise": [[_Apply(function)] * 4 for function in (torch.relu, torch.relu_, lambda x: x + x)],
            "copy": [[_Apply(function)] * 4 for function in (_swap, lambda x: interleave(*x.chunk(2, 1)))],
            "pooling": [[layer] for layer in (nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1), _Apply(means))],
        }
        for kind, several in chains.items():
            for place, layers in enumerate(several):
                yield f"{kind} {place}, {c} channels, {side}", kind, nn.Sequential(*layers), _image(c, side)


def _there_and_back(inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> list[nn.Module]:
    ways = ((inputs, outputs), (outputs, inputs)) * 2
    return [nn.Conv2d(*way, kernel, padding=kernel // 2, groups=groups) for way in ways]


def _swap(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2, 1)[::-1], 1)


def _image(channels: int, side: int) -> Tensor:
    return torch.randn(1, channels, side, side).contiguous(memory_format=torch.channels_last)


class _Apply(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.forward = function
