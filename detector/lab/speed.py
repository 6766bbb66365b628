"""Measure the paper's speed tables on this machine, contest by contest, so that a run that was stopped goes on."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from detector.data.json_file import read_json
from detector.data.progress import progress
from detector.errors import InputError
from detector.evaluation.tables import markdown_table
from detector.files import check_writable, replacing, write_json
from detector.lab.cost import detection_multiply_adds, multiply_adds
from detector.lab.cost_survey import rank_correlation
from detector.lab.latency import WARM_UP, Call, machine, median_ratio, milliseconds, take_cores, take_turns
from detector.lab.networks import folded_classifier
from detector.lab.speed_tables import SECTIONS, WIDTHS, Section, SpeedTable, build_units
from detector.models.backbones import BackboneOptions
from detector.models.build import NetworkOptions, build_network
from detector.models.fuse import fuse

log = logging.getLogger(__name__)

Backbones: TypeAlias = Mapping[str, BackboneOptions]  # by the names of their files in conf/backbone/
Row: TypeAlias = dict[str, Any]
BUDGET, LEAST = 45.0, 3  # seconds of a contest; the turns that it has in any case
COCO = 80  # classes of table 7's detectors
CLASSIFIERS = ("table8", "appendix")  # tables that any backbone has a place in, also where the paper has no speed of it

ABOUT = """# The paper's speed tables on this machine

Measured on {machine}, by `python tools/benchmark.py speed`: networks with random
weights, folded for inference, which take turns; medians. In brackets: speed over v2_1x's, of units over that of V2's of
the same width; here it is the median over the turns. The columns of two devices are the paper's (Ma et al. 2018)."""


def speed_tables(tables: Sequence[SpeedTable], backbones: Backbones, out: str, *, threads: int, turns: int) -> None:
    """Measure, and write speed.{json,md,png} into `out`. What speed.json holds already is not measured again.

    Args:
        tables: which.
        backbones: to measure; of table 7 in so far as it has them.
        out: a folder.
        threads: of the CPU; the process is pinned to as many cores.
        turns: of each network at most; a slow contest has fewer.

    Raises:
        InputError: there is nothing to measure; `out` cannot be written, or its speed.json is of something else.
    """
    check_writable(out)
    take_cores(threads)
    names = list(backbones)
    plan = {
        f"{section.title}, batch {batch}": (section, batch, chosen)
        for section in SECTIONS
        if (chosen := _chosen(section, names))
        for batch in section.batches
    }
    wanted = [title for title, (section, *_) in plan.items() if section.table in tables]
    if not wanted:
        raise InputError(f"only={names}: none of them is in tables={[*tables]}; name others, or tables=table8.")
    path, content = Path(out) / "speed.json", {"machine": machine(), "turns": turns, "networks": names}
    contests = _resume(path, content)
    for title in progress([title for title in wanted if title not in contests], "speed tables", unit="contest"):
        section, batch, chosen = plan[title]
        contests[title] = _contest(title, {name: _call(section, batch, name, backbones) for name in chosen}, turns)
        write_json(path, content | {"contests": contests})
    found = {section: rows for section, *_ in plan.values() if (rows := rows_of(section, contests))}
    write_json(path, content | {"contests": contests, "tables": {one.title: rows for one, rows in found.items()}})
    plot(found, path.with_suffix(".png"))
    parts = [ABOUT.format(**content), *(text_of(*item) for item in found.items()), "![Speeds](speed.png)"]
    log.info("%s\n\n%s", text := "\n\n".join(parts), path.with_suffix(".md"))
    with replacing(path.with_suffix(".md")) as partial:
        partial.write_text(f"{text}\n", encoding="utf-8")


def _chosen(section: Section, names: Sequence[str]) -> list[str]:
    if section.table in CLASSIFIERS:
        return [*names]
    return [name for name in section.levels() if section.table == "units" or name in names]


def _resume(path: Path, content: Row) -> dict[str, Row]:
    """The contests of an earlier run on this machine with these options."""
    found = read_json(path, "speed.json") if path.exists() else content | {"contests": {}}
    if not isinstance(found, dict) or not isinstance(found.get("contests"), dict):
        raise InputError(f"{path} holds no contests of this command; choose another out=.")
    if changed := [key for key, value in content.items() if found.get(key) != value]:
        log.info("%s has other values of %s: all is measured anew.", path, ", ".join(changed))
        return {}
    return found["contests"]


def _contest(title: str, made: Mapping[str, tuple[Call, int]], turns: int) -> Row:
    """{"turns", "seconds": of a batch by network, "multiply_adds": of an image by network}."""
    calls = {name: call for name, (call, _) in made.items()}
    with torch.inference_mode():
        first = take_turns(calls, 1, f"{title}, first turn", warm_up=0)  # it warms up, too
        fitting = max(LEAST, int(BUDGET / sum(map(sum, first.values()))))
        seconds = take_turns(calls, min(turns, fitting), title, warm_up=WARM_UP - 1 if fitting > turns else 0)
    costs = {name: cost for name, (_, cost) in made.items()}
    return {"turns": min(turns, fitting), "seconds": seconds, "multiply_adds": costs}


def _call(section: Section, batch: int, name: str, backbones: Backbones) -> tuple[Call, int]:
    """What runs a network once on a batch of noise, and its multiply-adds for one image."""
    network: nn.Module
    height, width = section.size or (0, 0)
    if section.table == "table7":  # the defaults of the network's options are recipe=paper
        detector = fuse(build_network(NetworkOptions(backbone=backbones[name]), COCO))
        pixels = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        call = functools.partial(detector.detect, pixels, torch.tensor([[height, width]] * batch))
        return call, detection_multiply_adds(detector, height, width)
    if section.table == "units":
        units, channels = build_units(name)
        network, images = fuse(units), _noise(batch, channels, height, width)
    else:
        network, images = folded_classifier(backbones[name], batch, "cpu")
        images = _noise(batch, 3, height, width) if section.size else images
    return functools.partial(network, images), multiply_adds(network, images[:1])


@functools.lru_cache(maxsize=1)
def _noise(*shape: int) -> Tensor:
    """The same for all networks of a contest: it has up to 75 MB."""
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def rows_of(section: Section, contests: Mapping[str, Row]) -> list[Row]:
    """A row for each network of what was measured of a section, those of about equal cost beside each other.

    Returns:
        Plain values: "network", "multiply_adds"; "here": by batch size {"ms", "speed": batches a second, "relative"};
        "paper": for each column {"speed", "relative"}. Relative speeds are over those of the network named in ABOUT,
        None where that is missing; a column without the network has None.
    """
    batches = {batch: contests.get(f"{section.title}, batch {batch}") for batch in section.batches}
    measured = {batch: contest for batch, contest in batches.items() if contest}
    costs = {name: cost for contest in measured.values() for name, cost in contest["multiply_adds"].items()}
    levels, rows = section.levels() if section.table not in CLASSIFIERS else {}, []
    for name in sorted(costs, key=lambda name: (levels.get(name, 0), costs[name])):
        base, here = f"v2_{name.rpartition('_')[2]}" if section.table == "units" else "v2_1x", {}
        for batch, contest in measured.items():
            own, other = contest["seconds"][name], contest["seconds"].get(base)
            relative = median_ratio(other, own) if other else None
            here[batch] = {"ms": milliseconds(own), "speed": 1000 / milliseconds(own), "relative": relative}
        paper = []
        for speeds in (column.speeds for column in section.columns()):
            relative = speeds[name] / speeds[base] if name in speeds and base in speeds else None
            paper.append({"speed": speeds[name], "relative": relative} if name in speeds else None)
        rows.append({"network": name, "multiply_adds": costs[name], "here": here, "paper": paper})
    return rows


def text_of(section: Section, rows: Sequence[Row]) -> str:
    """A Markdown table, and how far the order of the networks is that of the paper."""

    def cell(values: Row | None, key: str) -> str:
        brackets = f" ({values['relative']:.2f})" if values and values["relative"] else ""
        return f"{values[key]:.4g}{brackets}" if values else ""

    heads = ["", "multiply-adds, M", *(f"batch {batch}, ms" for batch in rows[0]["here"])]
    heads += [f"{column.device}, batch {column.batch}, {column.unit}" for column in section.columns()]
    cells = [
        [row["network"], f"{row['multiply_adds'] / 1e6:.0f}"]
        + [cell(one, "ms") for one in row["here"].values()]
        + [cell(one, "speed") for one in row["paper"]]
        for row in rows
    ]
    ranks = "\n".join(agreement(section, at, rows) for at in range(len(section.columns())))
    return "\n\n".join([f"## {section.title}", markdown_table(heads, cells, width=None), ranks.strip()]).strip()


def agreement(section: Section, at: int, rows: Sequence[Row]) -> str:
    """A line: rank correlation of the speeds with a column of the paper, over all and among those of equal cost."""
    found, levels = points(section, at, rows), section.levels()
    column = section.columns()[at]
    groups = [[one for one in found if levels[one[0]] == level] for level in range(4)]
    within = [_correlation(group) for group in groups if len(group) > 2]
    if not within:
        return ""
    head = f"- Rank correlation with {column.device}, batch {column.batch}: {_correlation(found):.2f}"
    return f"{head} over {len(found)} networks; {np.mean(within):.2f} among those of about equal cost, on average."


def points(section: Section, at: int, rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """(network, batches a second here, speed in a column of the paper), with batches of one size."""
    batch = section.columns()[at].batch
    shown = [row for row in rows if row["paper"][at] and batch in row["here"]]
    return [(row["network"], row["here"][batch]["speed"], row["paper"][at]["speed"]) for row in shown]


def _correlation(found: Sequence[tuple[str, float, float]]) -> float:
    return float(rank_correlation(np.array([speeds for _, *speeds in found]))[0])


def plot(found: Mapping[Section, Sequence[Row]], path: str | Path) -> None:
    """A panel for each column of the paper: speed here against speed there, a line for each family."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    panels = [(one, at, points(one, at, rows)) for one, rows in found.items() for at in range(len(one.columns()))]
    panels = [panel for panel in panels if panel[2]]
    down = max(1, -(-len(panels) // 4))
    figure = Figure(figsize=(16, 3.8 * down), layout="constrained")
    for place, (section, at, shown) in enumerate(panels, 1):
        axes, column = figure.add_subplot(down, 4, place), section.columns()[at]
        for colour, family in enumerate(WIDTHS):
            line = [(there, here) for name, here, there in shown if name.rpartition("_")[0] == family]
            if line:
                axes.loglog(*zip(*sorted(line), strict=True), "o-", color=f"C{colour}", label=family)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        axes.set_title(section.title.replace(": ", ":\n"), fontsize="small")
        axes.set(xlabel=f"{column.device}, batch {column.batch}, {column.unit}", ylabel="batches/s here")
        axes.legend(fontsize="x-small")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)
