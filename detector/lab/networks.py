"""Whole classifiers as the ShuffleNet V2 paper shows them: error against cost and speed, time by kind of operation.

Source: Ma et al. 2018, figures 1 and 2. The errors are those of its table 8, the times are of this machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from detector.evaluation.tables import markdown_table
from detector.files import CONF, replacing
from detector.lab.cost import multiply_adds
from detector.lab.latency import milliseconds, take_turns
from detector.models.backbones import BackboneOptions, parse_backbone
from detector.models.backbones.classifier import build_classifier
from detector.models.fuse import fuse

CLASSES = 1000
DECOMPOSED = ("v1_1x", "v2_1x", "mobilenet_v2_1.0")  # figure 2 shows the first and the last
FAMILIES = {
    "v2": "ShuffleNet V2",
    "v1": "ShuffleNet V1",
    "mobilenet_v2": "MobileNet V2",
    "mobilenet_v1": "MobileNet V1",
    "xception": "Xception",
}
# Parts of the names of torch's operators. What is in none, pooling and the last layer for instance, is `other`.
KINDS = {
    "convolution": ("conv", "linear", "addmm"),  # a 1x1 convolution runs as a product of matrices
    "element-wise": ("relu", "add", "mul", "hardtanh", "clamp", "batch_norm", "sigmoid"),
    "data": ("copy", "cat", "clone", "pad", "stack", "contiguous", "fill", "empty"),
}
PROFILED = 20  # runs


@dataclass(frozen=True)
class Network:
    """A classifier and what was measured of it.

    Attributes:
        name: of its file in conf/backbone/.
        error: published, in percent.
        multiply_adds: in millions, at its input size.
        ms: median time of one batch, folded.
    """

    name: str
    error: float
    multiply_adds: float
    ms: float

    @property
    def family(self) -> str:
        """In the paper's words."""
        return FAMILIES[self.name.rpartition("_")[0]]


def backbone_names() -> list[str]:
    """The files of conf/backbone/, without their suffix, in alphabetical order."""
    return sorted(path.stem for path in (CONF / "backbone").glob("*.yaml"))


def backbone_values(name: str) -> dict[str, Any]:
    """What a file of conf/backbone/ holds: differences from the defaults of its options."""
    return yaml.safe_load((CONF / "backbone" / f"{name}.yaml").read_text())


def backbone_options(name: str) -> BackboneOptions:
    """The options that a file of conf/backbone/ gives."""
    return parse_backbone(backbone_values(name))


def published_networks() -> dict[str, BackboneOptions]:
    """The files of conf/backbone/ whose error table 8 gives, smallest first."""
    found = {name: backbone_options(name) for name in backbone_names()}
    shown = {name: one for name, one in found.items() if one.published and one.published.top1_error}
    return dict(sorted(shown.items(), key=lambda item: item[1].published.multiply_adds))  # type: ignore[union-attr]


def measure_networks(batch: int, device: str, turns: int) -> list[Network]:
    """Every network of `published_networks`, taking turns.

    Args:
        batch: images at once.
        device: where.
        turns: of each.
    """
    options = published_networks()
    calls, costs = {}, {}
    for name, one in options.items():
        assert one.published is not None
        network, images = folded_classifier(one, batch, device)
        costs[name] = multiply_adds(network, images[:1]) / 1e6
        calls[name] = partial(network, images)
    with torch.inference_mode():
        times = take_turns(calls, turns, "error and speed")
    return [
        Network(name, one.published.top1_error, costs[name], milliseconds(times[name]))  # type: ignore[union-attr, arg-type]
        for name, one in options.items()
    ]


def folded_classifier(options: BackboneOptions, batch: int, device: str) -> tuple[nn.Module, Tensor]:
    """A folded classifier with random weights, and noise of the size that it is published for."""
    side = options.published.image_size if options.published else 224
    network = fuse(build_classifier(options, CLASSES)).to(device)
    images = torch.randn(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    return network, images.to(device)


def decompose(name: str, batch: int, device: str, turns: int) -> dict[str, float]:
    """Milliseconds of a batch by kind of operation, those of KINDS, `other` and `shuffle`.

    The shuffle is measured, not attributed: what the network takes longer than one without it (Zhang et al. 2018,
    table 3). The rest is divided as torch's profiler divides it.

    Args:
        name: of a file of conf/backbone/.
        batch, device, turns: as for `measure_networks`.
    """
    values = backbone_values(name)
    forms = {"whole": values}
    if name.startswith("v"):  # a ShuffleNet
        forms["unshuffled"] = values | {"shuffle": False}
    calls = {}
    for form, options in forms.items():
        network, images = folded_classifier(parse_backbone(options), batch, device)
        calls[form] = partial(network, images)
    with torch.inference_mode():
        times = [milliseconds(seconds) for seconds in take_turns(calls, turns, name).values()]
        spent = _profile(calls["unshuffled" if "unshuffled" in calls else "whole"], device)
    whole, rest = times[0], min(times)
    scale = rest / sum(spent.values())
    return {kind: scale * value for kind, value in spent.items()} | {"shuffle": whole - rest}


def _profile(call: Callable[[], object], device: str) -> dict[str, float]:
    """Time by kind, in no particular unit."""
    activity = torch.profiler.ProfilerActivity
    call()
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if device == "cuda" else [])]) as profiler:
        for _ in range(PROFILED):
            call()
    spent: Counter[str] = Counter(dict.fromkeys((*KINDS, "other"), 0.0))
    for row in profiler.key_averages():
        time = row.self_device_time_total if device == "cuda" else row.self_cpu_time_total
        spent[kind_of(row.key)] += time
    return dict(spent)


def kind_of(operator: str) -> str:
    """The kind of an operator of torch, by its name."""
    return next((kind for kind, parts in KINDS.items() if any(part in operator for part in parts)), "other")


def plot_networks(networks: Sequence[Network], spent: Mapping[str, Mapping[str, float]], path: str | Path) -> None:
    """Error against multiply-adds, error against speed, and the time of `decompose` by kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), layout="constrained")
    by_cost, by_speed, bars = figure.subplots(1, 3)
    for family in FAMILIES.values():
        members = sorted((one for one in networks if one.family == family), key=lambda one: -one.error)
        errors = [one.error for one in members]
        by_cost.plot([one.multiply_adds for one in members], errors, "o-", label=family)
        by_speed.plot([1000 / one.ms for one in members], errors, "o-", label=family)
    by_cost.set(xlabel="multiply-adds, M", ylabel="top-1 error, % (published)", xlim=0)
    by_speed.set(xlabel="batches a second, here", xlim=0)
    by_cost.legend()
    left = dict.fromkeys(spent, 0.0)
    for kind in (*KINDS, "shuffle", "other"):
        widths = [parts[kind] / sum(parts.values()) for parts in spent.values()]
        bars.barh(list(spent), widths, left=list(left.values()), label=kind)
        left = {name: start + width for (name, start), width in zip(left.items(), widths, strict=True)}
    bars.set(xlabel="share of the time", xlim=(0, 1))
    bars.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    with replacing(path) as partial_file:
        figure.savefig(partial_file, dpi=120)


def network_tables(networks: Sequence[Network], spent: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: every network, then milliseconds by kind of operation."""
    rows = [[one.family, one.name, f"{one.error:.1f}", f"{one.multiply_adds:.0f}", f"{one.ms:.2f}"] for one in networks]
    heads = ("", "backbone", "published error, %", "multiply-adds, M", "ms")
    kinds = (*KINDS, "shuffle", "other")
    by_kind = [[name, *(f"{parts[kind]:.2f}" for kind in kinds)] for name, parts in spent.items()]
    return "\n\n".join(
        (
            "## Error against cost and speed, time by kind of operation (figures 1 and 2)",
            markdown_table(heads, rows, align="ll", width=None),
            markdown_table(("ms of a batch", *kinds), by_kind, width=None),
        )
    )
