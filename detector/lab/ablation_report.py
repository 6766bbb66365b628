"""From top-1 errors by seed to intervals and verdicts, for people: Markdown tables, a sentence for each, one plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from detector.evaluation.tables import markdown_table
from detector.files import replacing
from detector.lab.ablation_networks import NETWORKS, PUBLISHED_SIZES, TABLES, Table, What, cost
from detector.lab.verdict import Verdict

Errors: TypeAlias = Mapping[str, Sequence[float]]
"""Network -> top-1 error in percent, by seed."""

# Student's t for a 95% interval of the mean of 2, 3, ... 10 values.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds.

    Attributes:
        mean: in points of top-1 error.
        low, high: of its 95% interval, Student's t over the seeds.
    """

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """What it says of a claim that foretells a positive value."""
        if self.low > 0:
            return "holds"
        return "does not hold" if self.high < 0 else "undecided"

    def __str__(self) -> str:
        return f"{self.mean:.1f} ({self.low:.1f} to {self.high:.1f})"


def interval(values: np.ndarray) -> Interval:
    """The mean of 2 to 10 values (seeds,), and where it lies with 95% confidence if they are normally distributed."""
    half = T_95[len(values) - 2] * float(values.std(ddof=1)) / len(values) ** 0.5
    mean = float(values.mean())
    return Interval(mean, mean - half, mean + half)


def differences(table: Table, errors: Errors) -> dict[str, np.ndarray]:
    """Row -> its error minus that of the network that it is compared with, seed by seed, in points."""
    return {row.name: np.subtract(errors[row.network], errors[row.base]) for row in table.rows if row.base}


def gain(table: Table, errors: Errors) -> Interval:
    """By how many points the claim is right: the mean over the compared rows, then the interval over the seeds."""
    return interval(table.sign * np.mean(list(differences(table, errors).values()), axis=0))


def published_gains(table: Table) -> list[float]:
    """The same of the paper's own errors, at each of PUBLISHED_SIZES; of the rows that it gives there."""
    given = {row.network: row.published for row in table.rows}
    pairs = [(row.published, given[row.base]) for row in table.rows if row.base]
    columns = [[(a[at], b[at]) for a, b in pairs] for at in range(len(PUBLISHED_SIZES))]
    return [table.sign * float(np.mean([a - b for a, b in one if a is not None and b is not None])) for one in columns]


def to_dict(what: Iterable[What], errors: Errors) -> dict[str, Any]:
    """Plain values of every table."""
    found: dict[str, Any] = {}
    for name in what:
        table, effect = TABLES[name], gain(TABLES[name], errors)
        found[name] = {
            "claim": table.claim,
            "gain": vars(effect),
            "published_gains": dict(zip(PUBLISHED_SIZES, published_gains(table), strict=True)),
            "verdict": effect.verdict,
            "differences": {row: vars(interval(one)) for row, one in differences(table, errors).items()},
        }
    return found


def section(table: Table, errors: Errors) -> str:
    """One table and what it says, as Markdown."""
    heads = ("", "width", "multiply-adds, M", "top-1 error, %", "difference", *PUBLISHED_SIZES)
    compared = {name: str(interval(values)) for name, values in differences(table, errors).items()}
    rows = [
        [
            row.name,
            NETWORKS[row.network][1],
            f"{cost(row.network) / 1e6:.2f}",
            interval(np.array(errors[row.network])),
            compared.get(row.name),
            *row.published,
        ]
        for row in table.rows
    ]
    costs, effect = [cost(row.network) for row in table.rows], gain(table, errors)
    theirs = ", ".join(f"{one:.1f} ({size})" for one, size in zip(published_gains(table), PUBLISHED_SIZES, strict=True))
    sentence = (
        f"The paper: {table.claim}, on average by {theirs} points. Here by {effect} points: **{effect.verdict}**"
        f"{' here' if effect.verdict == 'undecided' else ''}. Multiply-adds differ by up to "
        f"{1 - min(costs) / max(costs):.1%}."
    )
    return "\n\n".join((f"## {table.title}", sentence, markdown_table(heads, rows, width=None)))


def plot(what: Sequence[What], errors: Errors, path: Path) -> None:
    """A panel for each table: error of every seed, mean and interval of every row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(what), 4.2), layout="constrained")
    panels = figure.subplots(1, len(what), squeeze=False, sharey=True)[0]
    for name, axes in zip(what, panels, strict=True):
        rows = TABLES[name].rows
        for at, row in enumerate(rows):
            values = np.array(errors[row.network])
            found = interval(values)
            axes.errorbar(at, found.mean, found.high - found.mean, fmt="o", capsize=4, color=f"C{at}")
            axes.plot([at + 0.15] * len(values), values, ".", color="0.5")
        axes.set_xticks(range(len(rows)), [row.name for row in rows], rotation=30, ha="right")
        axes.set_title(f"{TABLES[name].title}: {gain(TABLES[name], errors).verdict}")
    panels[0].set_ylabel("top-1 error on drawn crops, %")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)
