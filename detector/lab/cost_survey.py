"""What predicts latency: every backbone timed, predicted by a model fitted without its family, and ranked by its costs.

Ma et al. 2018 (ShuffleNet V2), section 1: FLOPs are an indirect metric. Here they are compared with memory access cost
(section 2, G1) and with a roofline (`roofline`) on the machine at hand.
"""

from __future__ import annotations

import logging
import multiprocessing
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from detector.data.progress import progress
from detector.errors import InputError
from detector.evaluation.tables import markdown_table
from detector.files import CONF, check_writable, replacing, write_json
from detector.lab.cost import KINDS, operations
from detector.lab.latency import machine, take_cores, take_turns
from detector.lab.networks import CLASSES, FAMILIES
from detector.lab.roofline import LatencyModel, Measured, fit, left_out, sample_layers
from detector.models.backbones import parse_backbone
from detector.models.backbones.classifier import build_classifier
from detector.models.fuse import fuse

log = logging.getLogger(__name__)
SIDE = 224
PROCESSES = 3  # one after the other: where memory lies differs between them
DRAWS = 2000
COSTS = ("multiply_adds", "memory_access")
# Beside those of FAMILIES; one network each would be left out alone, though it resembles others.
OTHER_FAMILIES = {
    "v2star": "ShuffleNet V2*",
    "se_v2": FAMILIES["v2"],
    "mobilenet_v3": "MobileNet V3",
    "": "ResNet, ResNeXt, DenseNet",
}


def family_of(name: str) -> str:
    """The family of a file of conf/backbone/; of one that is not known the first part of its name."""
    stem = name.rpartition("_")[0]
    return (FAMILIES | OTHER_FAMILIES).get(stem, stem)


@dataclass(frozen=True)
class Survey:
    """What was measured and predicted.

    Attributes:
        model: fitted on all networks.
        samples: single layers.
        networks: folded classifiers, batches of one image at 224 x 224.
        predicted: seconds of each network by the model without its family.
    """

    model: LatencyModel
    samples: Sequence[Measured]
    networks: Sequence[Measured]
    predicted: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        """(networks,), predicted over measured, minus one."""
        return self.predicted / self.seconds - 1

    @property
    def seconds(self) -> np.ndarray:
        """(networks,), measured."""
        return np.array([one.seconds for one in self.networks])

    @property
    def roof(self) -> tuple[float, float]:
        """Most multiply-adds, and most bytes of memory access, that a layer had a second."""
        peak, access = (max(_sum(one, cost) / one.seconds for one in self.samples) for cost in COSTS)
        return peak, 4 * access

    @property
    def costs(self) -> dict[str, np.ndarray]:
        """What may rank networks: name -> (networks,)."""
        rows = [one.operations for one in self.networks]
        return {
            "multiply-adds": np.array([sum(one.multiply_adds for one in row) for row in rows]),
            "MAC of convolutions": np.array([sum(one.memory_access for one in row if one.weights) for row in rows]),
            "MAC of all operations": np.array([sum(one.memory_access for one in row) for row in rows]),
            "number of operations": np.array([len(row) for row in rows]),
            "roofline": self.predicted,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        columns = {"ms": 1000 * self.seconds, "predicted_ms": 1000 * self.predicted, "error": self.errors} | self.costs
        rows = [
            {"name": one.name, "family": one.family} | {key: values[at] for key, values in columns.items()}
            for at, one in enumerate(self.networks)
        ]
        peak, bandwidth = self.roof
        roof = {"peak_multiply_adds": peak, "peak_bytes": bandwidth}
        ranks = ranking(self.costs, self.seconds)
        return {"model": asdict(self.model)} | roof | {"rank_correlation": ranks, "networks": rows}


def cost_survey(names: Sequence[str], threads: int, turns: int, out: str) -> None:
    """Measure, fit, log the tables, and write cost_model.{md,json,png} and model.json into `out`.

    Args:
        names: of files of conf/backbone/, of at least two families.
        threads: of the CPU; each process is pinned to as many cores.
        turns: of each network in each process.
        out: a folder.

    Raises:
        InputError: one family alone is named, or `out` cannot be written.
    """
    if len({family_of(name) for name in names}) < 2:
        raise InputError(f"only={list(names)}: one family. Each is left out of the fit: name one of another, too.")
    folder = Path(out)
    check_writable(folder)
    runs = []
    for seed in progress(range(PROCESSES), "all networks", unit="process"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            runs.append(process.submit(measure, names, threads, turns, seed).result())
    found = survey(_merged([run[1] for run in runs]), _merged([run[2] for run in runs]), runs[0][0], threads)
    text = report(found)
    log.info("%s", text)
    found.model.save(folder / "model.json")
    write_json(folder / "cost_model.json", {"turns": turns, "processes": PROCESSES} | found.to_dict())
    plot(found, folder / "cost_model.png")
    with replacing(folder / "cost_model.md") as file:
        file.write_text(f"{text}\n\n![Predicted against measured; roofline](cost_model.png)\n", encoding="utf-8")
    log.info("%s", folder / "cost_model.md")


def measure(names: Sequence[str], threads: int, turns: int, seed: int) -> tuple[str, list[Measured], list[Measured]]:
    """The machine, layers and networks, each made and timed in an order of its own; for a process of its own."""
    take_cores(threads)
    rng = np.random.default_rng(seed)
    layers = list(sample_layers())
    shuffled = [layers[place] for place in rng.permutation(len(layers))]
    return (
        machine(),
        _timed(shuffled, turns, "layers"),
        _timed(_classifiers(rng.permutation(names).tolist()), turns, "networks"),
    )


def _classifiers(names: Sequence[str]) -> Iterator[tuple[str, str, nn.Module, Tensor]]:
    images = torch.randn(1, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    for name in names:
        values = yaml.safe_load((CONF / "backbone" / f"{name}.yaml").read_text())
        yield name, family_of(name), fuse(build_classifier(parse_backbone(values), CLASSES)), images


def _timed(made: Iterable[tuple[str, str, nn.Module, Tensor]], turns: int, title: str) -> list[Measured]:
    """What is (name, family, module, image), with its operations and the median of its turns; by name."""
    ready = {name: (family, module, image) for name, family, module, image in made}
    with torch.inference_mode():
        times = take_turns({name: partial(module, image) for name, (_, module, image) in ready.items()}, turns, title)
    return [
        Measured(name, ready[name][0], operations(*ready[name][1:]), statistics.median(seconds))
        for name, seconds in sorted(times.items())
    ]


def _merged(runs: Sequence[Sequence[Measured]]) -> list[Measured]:
    """One list of those of several processes, with the medians of their times."""
    return [
        replace(rows[0], seconds=statistics.median(one.seconds for one in rows)) for rows in zip(*runs, strict=True)
    ]


def survey(samples: Sequence[Measured], networks: Sequence[Measured], where: str, threads: int) -> Survey:
    """Fit the model, and predict each network without its family."""
    model = fit(samples, networks, machine=where, threads=threads)
    return Survey(model, samples, networks, left_out(model, networks))


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's, of the last axis: the correlation of ranks, equal values sharing theirs."""
    from scipy.stats import rankdata

    ranks = [rankdata(values, axis=-1) for values in (first, second)]
    a, b = (values - values.mean(axis=-1, keepdims=True) for values in ranks)
    with np.errstate(invalid="ignore"):  # NaN where all are equal, as a bootstrap of few networks draws them
        return (a * b).sum(axis=-1) / np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))


def ranking(costs: Mapping[str, np.ndarray], seconds: np.ndarray, seed: int = 0) -> dict[str, dict[str, float]]:
    """Rank correlation of each cost with measured time, and how far it lies below that of the last cost.

    Args:
        costs: name -> (networks,).
        seconds: (networks,), measured.
        seed: of the bootstrap over networks, which the 95% intervals are of.
    """
    drawn = np.random.default_rng(seed).integers(len(seconds), size=(DRAWS, len(seconds)))
    samples = {name: rank_correlation(values[drawn], seconds[drawn]) for name, values in costs.items()}
    best, found = samples[list(costs)[-1]], {}
    for name, values in costs.items():
        low, high = np.nanquantile(samples[name], (0.025, 0.975))
        behind_low, behind_high = np.nanquantile(best - samples[name], (0.025, 0.975))
        found[name] = {"rho": rank_correlation(values, seconds), "low": low, "high": high}
        found[name] |= {"behind_low": behind_low, "behind_high": behind_high}
    return {name: {key: float(value) for key, value in row.items()} for name, row in found.items()}


def report(found: Survey) -> str:
    """Tables as Markdown: errors by family, what ranks best, the rates, every network."""
    errors, model = found.errors, found.model
    rows = []
    for family in dict.fromkeys(one.family for one in found.networks):
        own = errors[[one.family == family for one in found.networks]]
        rows.append([family, len(own), f"{np.median(abs(own)):.1%}", f"{abs(own).max():.1%}", f"{own.mean():+.1%}"])
    rows.append(["all", len(errors), f"{model.median_error:.1%}", f"{model.worst_error:.1%}", f"{errors.mean():+.1%}"])
    ranks = [[name, *(f"{row[key]:.3f}" for key in row)] for name, row in ranking(found.costs, found.seconds).items()]
    peak, bandwidth = found.roof
    rates = [
        [kind, _rate(1e-9, one.multiply_add), _rate(4e-9, one.value), f"{1e6 * one.fixed:.1f}"]
        for kind, one in model.rates.items()
    ]
    millions = [[f"{values[at] / 1e6:.1f}" for values in list(found.costs.values())[:3]] for at in range(len(errors))]
    times = [
        [one.name, one.family, *costs, f"{1e3 * one.seconds:.2f}", f"{1e3 * predicted:.2f}", f"{error:+.1%}"]
        for one, costs, predicted, error in zip(found.networks, millions, found.predicted, errors, strict=True)
    ]
    heads = ["backbone", "family", *(f"{name}, M" for name in list(found.costs)[:3]), "ms", "predicted", "error"]
    return "\n\n".join(
        (
            f"# What predicts latency\n\n{model.machine}, one image of {SIDE} x {SIDE}, folded.",
            "## Predicted without the family",
            markdown_table(("family left out", "backbones", "median error", "worst", "mean, signed"), rows, width=None),
            "## What ranks the backbones as their times do",
            markdown_table(
                ("cost", "rank correlation", "low", "high", "behind the roofline: low", "high"), ranks, width=None
            ),
            f"## What operations cost\n\nMost that a layer reached: {peak / 1e9:.0f} G multiply-adds/s, "
            f"{bandwidth / 1e9:.0f} GB/s. Whole networks take {model.factor:.2f} times the sum of their operations.",
            markdown_table(("kind", "multiply-adds, G/s", "bandwidth, GB/s", "fixed, us"), rates, width=None),
            "## Every backbone",
            markdown_table(heads, times, align="ll", width=None),
        )
    )


def _rate(unit: float, seconds: float) -> str | None:
    return f"{unit / seconds:.1f}" if seconds > 0 else None


def plot(found: Survey, path: str | Path) -> None:
    """Predicted against measured time by family; the timed layers below the roof of this machine."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    times, roof = figure.subplots(1, 2)
    families = np.array([one.family for one in found.networks])
    for family in dict.fromkeys(families):
        own = families == family
        times.loglog(1e3 * found.seconds[own], 1e3 * found.predicted[own], "o", label=family)
    ends = 1e3 * np.array([found.seconds.min(), found.seconds.max()])
    for share, style in ((0.8, ":"), (1, "-"), (1.2, ":")):
        times.loglog(ends, share * ends, style, color="0.5", zorder=0)
    times.set(xlabel="measured, ms", ylabel="predicted without the family, ms (dotted: 20% off)")
    peak, bandwidth = found.roof
    for kind in KINDS:
        own_kind = [one for one in found.samples if one.family == kind and one.operations[0].multiply_adds]
        intensity = [_sum(one, "multiply_adds") / (4 * _sum(one, "memory_access")) for one in own_kind]
        if own_kind:
            roof.loglog(
                intensity, [_sum(one, "multiply_adds") / one.seconds / 1e9 for one in own_kind], ".", label=kind
            )
    steps = np.geomspace(0.1, 1000, 50)
    roof.loglog(steps, np.minimum(peak, bandwidth * steps) / 1e9, color="0.3")
    roof.set(xlabel="multiply-adds for each byte read or written", ylabel="multiply-adds, G/s", ylim=(0.1, None))
    for axes in (times, roof):
        axes.legend(fontsize="small")
    with replacing(path) as partial_file:
        figure.savefig(partial_file, dpi=120)


def _sum(one: Measured, cost: str) -> int:
    return sum(getattr(operation, cost) for operation in one.operations)
