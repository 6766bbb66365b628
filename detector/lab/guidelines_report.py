"""What the controlled experiments said, for people: Markdown tables, a verdict for each guideline, one picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from detector.evaluation.tables import markdown_table
from detector.files import replacing
from detector.lab.controlled import COLUMNS, PUBLISHED, PUBLISHED_UNITS, TITLES, Device, spread
from detector.lab.verdict import MARGIN

if TYPE_CHECKING:
    from detector.lab.guidelines import Table


ABOUT = """# The guidelines on this machine

Measured on {where}. A guideline holds where networks that break it take more than {margin:.0%} longer than the first
row of its table at equal multiply-adds: the geometric mean over rows and columns, with a 95% interval (a bootstrap over
processes and turns). It is undecided where the interval holds that bound."""

WIDTHS = {
    "paper": "the paper's widths: multiply-adds of a column differ by up to {:.1%}",
    "equal": "equalised widths: multiply-adds of a column differ by up to {:.1%}",
}


def report(tables: Sequence[Table], where: str, device: Device) -> str:
    """All tables and verdicts as Markdown."""
    heads = ("guideline", "widths", "time of breaking it", "the same networks twice", "verdict")
    rows = [(TITLES[one.guideline], one.widths, one.effect, one.control, f"**{one.effect.verdict}**") for one in tables]
    summary = markdown_table(heads, rows, align="llrrl", width=None)
    about = ABOUT.format(where=where, margin=MARGIN - 1)
    return "\n\n".join([about, summary, *(_section(one, device) for one in tables)])


def _section(table: Table, device: Device) -> str:
    worst = max(spread([cell for cell in table.cells if cell.column == column]) for column in COLUMNS)
    head = f"## {TITLES[table.guideline]}, {WIDTHS[table.widths].format(worst)}"
    rows = "; ".join(f"{name} {one}" for name, one in table.by_row.items())
    sentence = f"Breaking it takes {table.effect} times as long: **{table.effect.verdict}**. By row: {rows}."
    return "\n\n".join([head, sentence, _speeds(table, device), _costs(table)])


def _speeds(table: Table, device: Device) -> str:
    """Speeds of this machine and of the paper's two, a line for each row; in brackets the share of the first row's."""
    # Batches on both; those of a CPU are of one image.
    units = {"here": "images/s" if device == "cpu" else "batches/s"} | PUBLISHED_UNITS
    speeds = {"here": 1000 / table.milliseconds}
    for name in PUBLISHED:
        speeds[name] = np.array([cell.published[name] for cell in table.cells])
    columns = len(COLUMNS)
    rows = []
    for name, values in speeds.items():
        by_row = values.reshape(-1, columns)
        for cell, row in zip(table.cells[::columns], by_row, strict=True):
            shown = [f"{value:.4g} ({value / first:.2f})" for value, first in zip(row, by_row[0], strict=True)]
            rows.append([f"{name}, {units[name]}", cell.stack.name, *shown])
    return markdown_table(["", "", *COLUMNS], rows, align="ll", width=None)


def _costs(table: Table) -> str:
    """Where the time may come from: what each network computes, reads and writes."""
    heads = ("", "column", "widths", "multiply-adds, M", "MAC, M", "least MAC, M", "MAC / least", "ms")
    rows = []
    for cell, ms in zip(table.cells, table.milliseconds, strict=True):
        row = [cell.stack.name, cell.column, ":".join(map(str, cell.widths)), f"{cell.multiply_adds / 1e6:.1f}"]
        if not cell.stack.bottleneck:
            mac, least = cell.memory_access, cell.memory_access_bound
            row += [f"{mac / 1e6:.2f}", f"{least / 1e6:.2f}", f"{mac / least:.2f}"]
        else:
            row += ["", "", ""]
        rows.append([*row, f"{ms:.2f}"])
    return markdown_table(heads, rows, align="ll", width=None)


def plot(tables: Sequence[Table], path: str | Path) -> None:
    """A panel for each table: speed of each row over the first row's, here and in the paper, a line for each column."""
    from matplotlib.figure import Figure

    shown = [one for one in tables if one.widths == "paper"]
    figure = Figure(figsize=(4.2 * len(shown), 4.2), layout="constrained")
    for place, (table, axes) in enumerate(zip(shown, np.atleast_1d(figure.subplots(1, len(shown))), strict=True)):
        names = [cell.stack.name for cell in table.cells[:: len(COLUMNS)]]
        for label, speeds, style in _lines(table):
            axes.plot(range(len(names)), speeds, label=label, **style)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.axhline(1 / MARGIN, color="0.6", linewidth=0.8)
        axes.set_title(f"{table.guideline.upper()}: {table.effect.verdict}")
        axes.set_ylim(bottom=0)
        if not place:
            axes.set_ylabel("speed over the first row's, equal multiply-adds")
            axes.legend(fontsize="small")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)


def _lines(table: Table) -> Iterator[tuple[str, np.ndarray, dict[str, object]]]:
    """(label, speeds over the first row's, style); of the paper the mean of its columns."""
    columns = len(COLUMNS)
    here = table.speed.reshape(-1, columns)
    for at, name in enumerate(COLUMNS):
        yield f"here, {name}", here[:, at], {"marker": "o", "color": f"C{at}"}
    for (device, published), style in zip(PUBLISHED.items(), (":", "--"), strict=True):
        speeds = np.array(published[table.guideline])
        yield f"{device}, mean", (speeds / speeds[0]).mean(axis=1), {"linestyle": style, "color": "0.3"}
