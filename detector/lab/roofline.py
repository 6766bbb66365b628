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
from torch import Tensor, nn

from detector.errors import InputError
from detector.files import write_json
from detector.lab.cost import KINDS, Kind, Operation, operations
from detector.models.backbones.shufflenet_v2 import interleave

# Layers that are timed: side of the map -> channels, from the first layers of a network to its last. Chosen by this
# project: what backbones at 224 x 224 have, at round numbers.
SAMPLED = {112: (16, 32), 56: (24, 64, 128), 28: (48, 128, 256), 14: (64, 192, 512), 7: (96, 384, 1024)}
LARGEST = 3e8  # multiply-adds of a layer that is timed


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
    rates = _least_squares(np.array([features(one.operations) for one in samples]), _seconds(samples))
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
    return float(_least_squares(alone[:, None], measured)[0])


def _least_squares(design: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    from scipy.optimize import nnls

    return nnls(design / seconds[:, None], np.ones(len(seconds)))[0]


def _seconds(rows: Sequence[Measured]) -> np.ndarray:
    return np.array([one.seconds for one in rows])


class _Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def sample_layers() -> Iterator[tuple[str, str, nn.Module, Tensor]]:
    """(name, kind, layers, image) of what is timed.

    Four layers that hand on their maps, as in a network, where a map keeps its size; there and back where channels
    change, as in the ShuffleNet V2 paper's table 1.
    """
    for kind, inputs, outputs, side, kernel, groups, stride in _convolutions():
        ways = ((inputs, outputs), (outputs, inputs)) * 2 if stride == 1 else ((inputs, outputs),)
        padding = kernel // 2
        layers = [nn.Conv2d(*way, kernel, stride, padding, groups=groups) for way in ways]
        yield (
            f"{kernel}x{kernel} {inputs}-{outputs}, g={groups}, {side}",
            kind,
            nn.Sequential(*layers),
            _image(inputs, side),
        )
    others: dict[Kind, tuple[Any, ...]] = {
        "element-wise": (torch.relu, torch.relu_, lambda x: x + x),
        "copy": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), lambda x: interleave(*x.chunk(2, 1))),
        "pooling": (nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1), partial(torch.mean, dim=(2, 3), keepdim=True)),
    }
    for side, widths in SAMPLED.items():
        for channels in widths:
            for kind, functions in others.items():
                for place, function in enumerate(functions):
                    applied = [_Apply(function) for _ in range(1 if kind == "pooling" else 4)]
                    yield f"{kind} {place}, {channels}, {side}", kind, nn.Sequential(*applied), _image(channels, side)
    for pixels, inputs, outputs in ((1, 256, 1000), (1, 1024, 1000), (1, 2048, 1000), (49, 512, 512), (784, 128, 128)):
        yield (
            f"product {pixels}x{inputs}-{outputs}",
            "matrix product",
            nn.Linear(inputs, outputs),
            torch.randn(pixels, inputs),
        )


def _convolutions() -> Iterator[tuple[Kind, int, int, int, int, int, int]]:
    """(kind, inputs, outputs, side, kernel, groups, stride), but those that take long."""
    for outputs in (16, 32, 64):  # stems
        yield "dense", 3, outputs, 224, 3, 1, 2
    for side, widths in SAMPLED.items():
        for c in widths:
            found: list[tuple[Kind, int, int, int, int]] = [
                ("dense 1x1", c, 1, 1, 1),
                ("dense 1x1", 4 * c, 1, 1, 1),
                ("dense", c, 3, 1, 1),
            ]
            found += [("grouped", c, 1, groups, 1) for groups in (2, 4, 8)] + [("grouped", c, 3, c // 8, 1)]
            found += [("depthwise", c, 3, c, 1), ("depthwise", c, 5, c, 1), ("depthwise", c, 3, c, 2)]
            for kind, outputs, kernel, groups, stride in found:
                if c * outputs * kernel**2 * side**2 / groups < LARGEST:
                    yield kind, c, outputs, side, kernel, groups, stride


def _image(channels: int, side: int) -> Tensor:
    return torch.randn(1, channels, side, side).contiguous(memory_format=torch.channels_last)
