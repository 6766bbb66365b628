"""Which earlier units a unit reads, and with what weights: feature reuse in ShuffleNet V2 and in DenseNet.

Source: Ma et al. 2018 (ShuffleNet V2), section 3.3 and figure 4; Huang et al. 2017 (DenseNet), section 5 and figure 5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from detector.errors import InputError
from detector.evaluation.tables import markdown_table
from detector.files import replacing
from detector.inference.detector import read_torch_file
from detector.models.backbones.channel_order import reads_here

V2 = re.compile(r"(?:^|\.)(stage\d)\.(\d+)\.branch2\.0\.weight$")
MEASURES = {"average": "mean absolute weight", "share": "share of a unit's weights (L1)"}
DENSENET = re.compile(r"(?:^|\.)(denseblock\d)\.denselayer(\d+)\.conv1\.weight$")


@dataclass(frozen=True)
class Reuse:
    """How the units of one stage read those before them; unit 0 is what makes its first channels.

    Attributes:
        stage: its name in the network.
        channels: (targets, sources) int, how many channels of a source the first 1x1 convolution of a target reads.
        norms: (targets, sources), the sum over these channels of the mean absolute weight. Target t is unit t + 1.
    """

    stage: str
    channels: np.ndarray
    norms: np.ndarray

    @property
    def average(self) -> np.ndarray:
        """Mean absolute weight of a connection (DenseNet, figure 5); NaN where there is none."""
        return self.norms / np.where(self.channels, self.channels, np.nan)

    @property
    def share(self) -> np.ndarray:
        """What a source has of the L1 norm of all weights of a target; 1 for each target."""
        return self.norms / self.norms.sum(axis=1, keepdims=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        average = [[None if np.isnan(one) else one for one in row] for row in self.average]
        return {"stage": self.stage, "channels": self.channels, "average": average, "share": self.share}


def read_reuse(path: str | Path) -> list[Reuse]:
    """Of a checkpoint of training or pre-training, or of a .pth file with this project's or torchvision's names.

    Raises:
        InputError: it cannot be read, or holds no ShuffleNet V2 with shuffles, and no DenseNet.
    """
    content = read_torch_file(path)
    content = content if isinstance(content, dict) else {}
    about = content.get("detector") or content.get("classifier") or {}
    options = about.get("spec", {}).get("backbone", {}) if isinstance(about, dict) else {}
    found = reuse(content.get("state_dict", content))
    if not found or not options.get("shuffle", True):
        raise InputError(
            f"ckpt={path}: no ShuffleNet V2 whose units are shuffled. Give a checkpoint of one (backbone=v2_...), or a "
            ".pth file with torchvision's names."
        )
    return found


def reuse(state: Mapping[str, Any]) -> list[Reuse]:
    """Stage by stage; none where the names of the weights are of another family."""
    stages: dict[str, list[tuple[Tensor, np.ndarray]]] = {}
    for name, weight in state.items():
        if (match := V2.search(name)) and (unit := int(match[2])):
            stages.setdefault(match[1], []).append((weight, v2_sources(2 * weight.shape[1], unit)))
        elif match := DENSENET.search(name):
            growth = state[name.replace("conv1", "conv2")].shape[0]
            earlier = (int(match[2]) - 1) * growth
            sources = np.repeat(np.arange(int(match[2])), [weight.shape[1] - earlier, *[growth] * (int(match[2]) - 1)])
            stages.setdefault(match[1], []).append((weight, sources))
    return [_stage(name, targets) for name, targets in stages.items()]


def v2_sources(channels: int, unit: int) -> np.ndarray:
    """Which unit has made each channel (channels / 2,) that the main branch of a unit reads.

    Args:
        channels: of the stage.
        unit: its number; 0 is the downsampling unit, which reads another stage.
    """
    read = reads_here(np.arange(channels), unit)[unit - 1]
    return np.where(read < channels, 0, 1 + (read - channels) // (channels // 2))


def _stage(name: str, targets: Sequence[tuple[Tensor, np.ndarray]]) -> Reuse:
    channels, norms = np.zeros((2, len(targets), len(targets)))
    for at, (weight, sources) in enumerate(targets):
        each = weight.detach().abs().double().mean((0, 2, 3)).numpy()
        channels[at] = np.bincount(sources, minlength=len(targets))
        norms[at] = np.bincount(sources, each, minlength=len(targets))
    return Reuse(name, channels.astype(int), norms)


def by_distance(stages: Sequence[Reuse]) -> list[dict[str, float]]:
    """Means over all pairs of units that are 1, 2, ... apart; unit 0, whose width is another, is left out.

    Each has the share of the target's channels and of its weights, and the mean absolute weight.
    """
    found = []
    for distance in range(1, max(len(one.channels) for one in stages)):
        picked: dict[str, list[np.ndarray]] = {"channels": [], "share": [], "average": []}
        for one in stages:
            parts = one.channels / one.channels.sum(axis=1, keepdims=True)
            for name, values in (("channels", parts), ("share", one.share), ("average", one.average)):
                # Target t is unit t + 1: its distance to source s is t + 1 - s.
                picked[name].append(np.diagonal(values[:, 1:], -distance))
        means = {name: np.concatenate(values) for name, values in picked.items()}
        if not means["channels"].any():  # so few channels are halved to none
            break
        found.append({name: float(np.nanmean(values)) for name, values in means.items()})
    return found


def reuse_section(networks: Mapping[str, Sequence[Reuse]]) -> str:
    """Markdown: how what is read falls with the distance."""
    rows = [
        [name, distance, *(f"{one[key]:.3f}" for key in ("channels", "share", "average"))]
        for name, stages in networks.items()
        for distance, one in enumerate(by_distance(stages), 1)
    ]
    heads = ("", "units apart", "share of channels", "share of weights (L1)", "mean weight")
    about = "Means over all pairs of units within a stage, without what the first unit of a stage brings."
    return "\n\n".join(("## Feature reuse (ShuffleNet V2, figure 4)", about, markdown_table(heads, rows, width=None)))


def plot_reuse(networks: Mapping[str, Sequence[Reuse]], path: Path) -> None:
    """A column for each network; above the average weight, below the share of a target's weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(networks), 9), layout="constrained")
    panels = figure.subplots(2, len(networks), squeeze=False)
    for column, (name, stages) in zip(panels.T, networks.items(), strict=True):
        for axes, (kind, title) in zip(column, MEASURES.items(), strict=True):
            side = sum(len(one.channels) for one in stages)
            shown, at = np.full((side, side), np.nan), 0
            for one in stages:
                values = getattr(one, kind)
                shown[at : at + len(values), at : at + len(values)] = values
                at += len(values)
            image = axes.imshow(np.where(shown > 0, shown, np.nan), vmin=0)
            figure.colorbar(image, shrink=0.7)
            axes.set(title=f"{name}\n{title}", xlabel="from unit, stage after stage", ylabel="to unit")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)
