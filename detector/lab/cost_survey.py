"""What predicts latency: every backbone timed, predicted by a model fitted without its family, and ranked by its costs.

Ma et al. 2018 (ShuffleNet V2), section 1: FLOPs are an indirect metric. Here they are compared with memory access cost
(section 2, G1) and with a roofline (`roofline`) on the machine at hand.
"""

from __future__ import annotations

import logging
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detector.data.progress import progress
from detector.errors import InputError
from detector.evaluation.tables import markdown_table
from detector.files import check_writable, replacing, write_json
from detector.lab.cost import KINDS, Operation, operations
from detector.lab.latency import machine, take_cores, take_turns
from detector.lab.networks import CLASSES, FAMILIES, backbone_options
from detector.lab.roofline import LatencyModel, Measured, fit, left_out, sample_layers
from detector.models.backbones.classifier import build_classifier
from detector.models.fuse import fuse

log = logging.getLogger(__name__)
SIDE = 224
PROCESSES = 3  # one after the other: where memory lies differs between them
DRAWS = 2000
# What may rank networks, by their operations; beside them the roofline, without a network's own family.
COSTS: Mapping[str, Callable[[Sequence[Operation]], float]] = {
    "multiply-adds, M": lambda found: sum(one.multiply_adds for one in found) / 1e6,
    "MAC of convolutions, M": lambda found: sum(one.memory_access for one in found if one.weights) / 1e6,
    "MAC, M": lambda found: sum(one.memory_access for one in found) / 1e6,
    "operations": len,
}
ROOF = ("multiply-adds, M", "MAC, M")
UNITS = {"ms / G multiply-adds": 1e12, "ms / GB": 2.5e11, "us each": 1e6}  # in a table, of `Rates`
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
    runs: list[Any] = []
    for seed in progress(range(PROCESSES), "all networks", unit="process"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            runs.append(process.submit(measure, names, threads, turns, seed).result())
    found = _merged([run[1] for run in runs])
    samples, networks = ([one for one in found if (one.name in names) == wanted] for wanted in (False, True))
    model = fit(samples, networks, machine=runs[0][0], threads=threads)
    rows = table(model, networks)
    ranks, text = ranking(rows), report(model, rows, samples)
    log.info("%s", text)
    model.save(folder / "model.json")
    content = {"turns": turns, "processes": PROCESSES, "model": asdict(model), "rank_correlation": ranks}
    write_json(folder / "cost_model.json", content | {"networks": rows})
    plot(rows, samples, folder / "cost_model.png")
    with replacing(folder / "cost_model.md") as file:
        file.write_text(f"{text}\n\n![Predicted against measured; roofline](cost_model.png)\n", encoding="utf-8")
    log.info("%s", folder / "cost_model.md")


def measure(names: Sequence[str], threads: int, turns: int, seed: int) -> tuple[str, list[Measured]]:
    """The machine, layers and networks, made in an order of its own; for a process of its own.

    Layers and networks take turns with each other: caches are as cold, and the machine as busy, for both.
    """
    take_cores(threads)
    rng = np.random.default_rng(seed)
    made = [*sample_layers(), *_classifiers(rng.permutation(names).tolist())]
    return machine(), _timed([made[place] for place in rng.permutation(len(made))], turns)


def _classifiers(names: Sequence[str]) -> Iterator[tuple[str, str, nn.Module, Tensor]]:
    images = torch.randn(1, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    for name in names:
        yield name, family_of(name), fuse(build_classifier(backbone_options(name), CLASSES)), images


def _timed(made: Iterable[tuple[str, str, nn.Module, Tensor]], turns: int) -> list[Measured]:
    """What is (name, family, module, image), with its operations and the median of its turns; by name."""
    ready = {name: (family, module, image) for name, family, module, image in made}
    with torch.inference_mode():
        times = take_turns({name: partial(module, image) for name, (_, module, image) in ready.items()}, turns, "all")
    return [
        Measured(name, ready[name][0], operations(*ready[name][1:]), statistics.median(seconds))
        for name, seconds in sorted(times.items())
    ]


def _merged(runs: Sequence[Sequence[Measured]]) -> list[Measured]:
    """One list of those of several processes, with the medians of their times."""
    return [
        replace(rows[0], seconds=statistics.median(one.seconds for one in rows)) for rows in zip(*runs, strict=True)
    ]


def table(model: LatencyModel, networks: Sequence[Measured]) -> list[dict[str, Any]]:
    """A row for each network: its costs, `roofline`, predicted without its family, and `ms`, measured."""
    return [
        {"name": one.name, "family": one.family}
        | {cost: count(one.operations) for cost, count in COSTS.items()}
        | {"roofline": 1000 * float(predicted), "ms": 1000 * one.seconds, "error": float(predicted) / one.seconds - 1}
        for one, predicted in zip(networks, left_out(model, networks), strict=True)
    ]


def rank_correlation(values: np.ndarray) -> np.ndarray:
    """Spearman's, of each column but the last with the last: (networks, C) -> (C - 1,). Equal values share a rank."""
    from scipy.stats import rankdata

    with np.errstate(invalid="ignore"):  # NaN where all are equal, as a bootstrap of few networks draws them
        return np.corrcoef(rankdata(values, axis=0), rowvar=False)[-1, :-1]


def ranking(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, dict[str, float]]:
    """Rank correlation of each cost with measured time, and how far it lies below the roofline's.

    Args:
        rows: of `table`.
        seed: of a bootstrap over networks; the intervals hold 95% of its draws.
    """
    names = (*COSTS, "roofline")
    values = np.array([[row[name] for name in (*names, "ms")] for row in rows], np.float64)
    draws = np.random.default_rng(seed).integers(len(rows), size=(DRAWS, len(rows)))
    drawn = np.array([rank_correlation(values[draw]) for draw in draws])
    found = [rank_correlation(values)]
    for samples in (drawn, drawn[:, -1:] - drawn):
        found += [*np.nanquantile(samples, (0.025, 0.975), axis=0)]
    keys = ("rho", "low", "high", "behind_low", "behind_high")
    return {
        name: dict(zip(keys, row, strict=True)) for name, row in zip(names, np.array(found).T.tolist(), strict=True)
    }


def report(model: LatencyModel, rows: Sequence[Mapping[str, Any]], samples: Sequence[Measured]) -> str:
    """Tables as Markdown: errors by family, what ranks best, what operations cost, every network."""
    errors = [
        {"family": family, "backbones": len(own), "median": np.median(own), "worst": max(own)}
        for family in (*_families(rows), "")
        for own in [[abs(row["error"]) for row in rows if family in ("", row["family"])]]
    ]
    ranks = [{"cost": name} | row for name, row in ranking(rows).items()]
    rates = [
        {"kind": kind} | dict(zip(UNITS, np.multiply([*vars(one).values()], [*UNITS.values()]).tolist(), strict=True))
        for kind, one in model.rates.items()
    ]
    peak, bandwidth = roof(samples)
    return "\n\n".join(
        (
            f"# What predicts latency\n\n{model.machine}, one image of {SIDE} x {SIDE}, folded.",
            f"## Predicted without the family\n\n{_table(errors, '.1%')}",
            f"## What ranks the backbones as their times do\n\n{_table(ranks, '.3f')}",
            f"## What operations cost\n\nMost that a layer reached: {peak / 1e9:.0f} G multiply-adds/s, "
            f"{bandwidth / 1e9:.0f} GB/s. Whole networks take {model.factor:.2f} times the sum of their operations.",
            _table(rates, ".1f"),
            f"## Every backbone\n\n{_table(rows, '.2f')}",
        )
    )


def _table(rows: Sequence[Mapping[str, Any]], spec: str) -> str:
    """All keys of the rows; numbers with a fraction in this format."""
    cells = [[format(value, spec) if isinstance(value, float) else value for value in row.values()] for row in rows]
    return markdown_table([*rows[0]], cells, width=None)


def _families(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({row["family"] for row in rows})


def roof(samples: Sequence[Measured]) -> tuple[float, float]:
    """Most multiply-adds, and most bytes read and written, that a layer had a second."""
    peak, access = (max(COSTS[cost](one.operations) / one.seconds for one in samples) for cost in ROOF)
    return 1e6 * peak, 4e6 * access


def plot(rows: Sequence[Mapping[str, Any]], samples: Sequence[Measured], path: str | Path) -> None:
    """Predicted against measured time by family; the timed layers below the roof of this machine."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    times, layers = figure.subplots(1, 2)
    for family in _families(rows):
        own = [row for row in rows if row["family"] == family]
        times.loglog([row["ms"] for row in own], [row["roofline"] for row in own], "o", label=family)
    for share, style in ((0.8, ":"), (1, "-"), (1.2, ":")):
        times.axline((1, share), (10, 10 * share), linestyle=style, color="0.5", zorder=0)
    times.set(xlabel="measured, ms", ylabel="predicted without the family, ms (dotted: 20% off)")
    for kind in KINDS:
        timed = [one for one in samples if one.family == kind]
        computed, access = (np.array([COSTS[cost](one.operations) / one.seconds for one in timed]) for cost in ROOF)
        if computed.any():
            layers.loglog(computed / (4 * access), computed / 1e3, ".", label=kind)
    (peak, bandwidth), steps = roof(samples), np.geomspace(0.1, 1000)
    layers.loglog(steps, np.minimum(peak, bandwidth * steps) / 1e9, color="0.3")
    layers.set(xlabel="multiply-adds for each byte read or written", ylabel="multiply-adds, G/s", ylim=0.1)
    for axes in (times, layers):
        axes.legend(fontsize="small")
    with replacing(path) as partial_file:
        figure.savefig(partial_file, dpi=120)
