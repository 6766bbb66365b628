"""Try the four guidelines of the ShuffleNet V2 paper on this machine, by the paper's own experiments.

python tools/guidelines.py                            all four, tables and a verdict each, one thread of the CPU
python tools/guidelines.py g1 g3 threads=2            two of them, with two threads
python tools/guidelines.py backend=openvino out=DIR   in another runtime; guidelines.{md,json,png} in DIR
python tools/guidelines.py device=cuda                on a GPU, with the widths that the paper used there
python tools/guidelines.py networks=false             without figures 1 and 2 of the paper, drawn for this machine

Each table holds networks of equal multiply-adds that follow a guideline (first row) or break it. They take turns, in
several processes one after the other. A guideline holds where breaking it costs more than 5% of time on average.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from pydantic import model_validator

from detector.data.progress import progress
from detector.errors import InputError, require
from detector.export.formats import OPSET, quiet
from detector.files import check_writable, replacing, write_json
from detector.inference.openvino_core import openvino_core
from detector.inference.runtime import openvino_options
from detector.lab.controlled import BATCH, COLUMNS, ROWS, SIDE, Cell, Device, Guideline, cells
from detector.lab.guidelines_report import plot, report
from detector.lab.latency import Call, machine, take_cores, take_turns
from detector.lab.networks import DECOMPOSED, Network, decompose, measure_networks, network_tables, plot_networks
from detector.lab.verdict import Effect, effect
from detector.options import Count, Flag, Options

log = logging.getLogger(__name__)

Backend: TypeAlias = Literal["torch", "onnxruntime", "openvino"]
WIDTHS = ("paper", "equal")
Key: TypeAlias = tuple[Guideline, str]


class GuidelinesOptions(Options):
    """What to measure, and where."""

    what: tuple[Guideline, ...] = tuple(ROWS)
    """Guidelines; the words alone will do: g1 g3."""
    device: Device = "cpu"
    """cpu or cuda."""
    threads: Count = 1
    """Of the CPU; the process is pinned to as many cores. The paper measured one."""
    backend: Backend = "torch"
    """What runs the networks."""
    turns: Count = 12
    """Of each network in each process, after three that are not counted."""
    processes: Count = 5
    """One after the other, each with networks of its own: where memory lies differs between them."""
    networks: Flag = True
    """Also whole classifiers: error against speed, and time by kind of operation; with backend=torch."""
    out: str = "guidelines"
    """A folder for guidelines.{md,json,png} and networks.png."""

    @model_validator(mode="after")
    def _check(self) -> GuidelinesOptions:
        if self.device == "cuda" and self.backend != "torch":
            raise ValueError(f"device=cuda takes backend=torch; backend={self.backend} is measured on the CPU.")
        return self


@dataclass(frozen=True)
class Table:
    """What was measured of one guideline.

    Attributes:
        guideline: which.
        widths: the paper's, or changed to equal multiply-adds.
        cells: its networks, row by row.
        seconds: (processes, turns, cells), of one batch.
        effect: of breaking the guideline.
        control: the same of networks that differ in nothing.
        by_row: of each row but the first.
    """

    guideline: Guideline
    widths: str
    cells: Sequence[Cell]
    seconds: np.ndarray
    effect: Effect
    control: Effect
    by_row: Mapping[str, Effect]

    @property
    def milliseconds(self) -> np.ndarray:
        """(cells,), medians over processes and turns."""
        return 1000 * np.median(self.seconds.reshape(-1, len(self.cells)), axis=0)

    @property
    def speed(self) -> np.ndarray:
        """(cells,), batches a second over those of the first row in the same column: 1 and less where it holds."""
        times = self.milliseconds.reshape(-1, len(COLUMNS))
        return (times[0] / times).ravel()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        rows = [
            {
                "row": cell.stack.name,
                "column": cell.column,
                "widths": cell.widths,
                "multiply_adds": cell.multiply_adds,
                "memory_access": cell.memory_access,
                "memory_access_bound": cell.memory_access_bound,
                "ms": ms,
                "relative_speed": speed,
                "published": dict(cell.published),
                "seconds": self.seconds[..., at],
            }
            for at, (cell, ms, speed) in enumerate(zip(self.cells, self.milliseconds, self.speed, strict=True))
        ]
        effects = {"effect": self.effect, "control": self.control} | dict(self.by_row)
        return {
            "guideline": self.guideline,
            "widths": self.widths,
            "verdict": self.effect.verdict,
            "effects": {name: vars(one) for name, one in effects.items()},
            "cells": rows,
        }


def guidelines(options: GuidelinesOptions) -> None:
    """Measure, log the tables and the verdicts, and write guidelines.{md,json,png} into `out`.

    Raises:
        InputError: the device, the backend or so many cores are not there, or `out` cannot be written.
    """
    _check_machine(options)
    check_writable(options.out)
    plan = {
        (guideline, widths): cells(guideline, options.device, equal=widths == "equal")
        for guideline in dict.fromkeys(options.what)
        for widths in WIDTHS
        if guideline != "g4" or widths == "paper"  # the rows of table 4 have equal widths
    }
    context, whole = multiprocessing.get_context("spawn"), options.networks and options.backend == "torch"
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        if options.backend != "torch":
            write_onnx(plan, folder)
        for seed in progress(range(options.processes), "all networks", unit="process"):
            with ProcessPoolExecutor(1, context) as process:
                runs.append(process.submit(measure, options, plan, folder, seed).result())
        with ProcessPoolExecutor(1, context) as process:
            where = process.submit(machine_line, options).result()
            classifiers = process.submit(measure_classifiers, options).result() if whole else None
    tables = [_table(key, plan[key], np.array([run[key] for run in runs])) for key in plan]
    _write(tables, classifiers, where, options)


def _write(
    tables: Sequence[Table],
    classifiers: tuple[list[Network], dict[str, dict[str, float]]] | None,
    where: str,
    options: GuidelinesOptions,
) -> None:
    out = Path(options.out)
    content = {"machine": where, "options": options.to_dict(), "tables": [table.to_dict() for table in tables]}
    parts = [report(tables, where, options.device), "![Relative speed](guidelines.png)"]
    plot(tables, out / "guidelines.png")
    if classifiers is not None:
        networks, spent = classifiers
        content |= {"networks": [vars(one) for one in networks], "ms_by_kind": spent}
        parts += [network_tables(networks, spent), "![Networks](networks.png)"]
        plot_networks(networks, spent, out / "networks.png")
    text = "\n\n".join(parts)
    log.info("%s", text)
    write_json(out / "guidelines.json", content)
    with replacing(out / "guidelines.md") as partial:
        partial.write_text(f"{text}\n", encoding="utf-8")
    log.info("%s", out / "guidelines.md")


def measure(
    options: GuidelinesOptions, plan: Mapping[Key, Sequence[Cell]], folder: str, seed: int
) -> dict[Key, np.ndarray]:
    """Seconds of a batch by table, (turns, cells and the first row once more); for a process of its own.

    Args:
        options: what runs the networks.
        plan: the tables.
        folder: with the files of `write_onnx`.
        seed: of the order in which networks are made and take turns. Where the buffers of a network come to lie may
            double its time (OpenVINO), and follows from that order.
    """
    _take_cores(options)
    rng, found = np.random.default_rng(seed), {}
    for key, table in plan.items():
        contestants = [*enumerate(table), *enumerate(table[: len(COLUMNS)])]
        calls = {}
        for place in rng.permutation(len(contestants)).tolist():
            at, cell = contestants[place]
            calls[str(place)] = runner(cell, options, onnx_file(folder, key, at))
        seconds = take_turns(calls, options.turns, " ".join(key))
        found[key] = np.array([seconds[str(place)] for place in range(len(contestants))]).T
    return found


def measure_classifiers(options: GuidelinesOptions) -> tuple[list[Network], dict[str, dict[str, float]]]:
    """Whole classifiers, and milliseconds by kind of operation of some; for a process of its own."""
    _take_cores(options)
    batch, device, turns = BATCH[options.device], options.device, options.turns
    return measure_networks(batch, device, turns), {name: decompose(name, batch, device, turns) for name in DECOMPOSED}


def _take_cores(options: GuidelinesOptions) -> None:
    if options.device == "cpu":
        take_cores(options.threads)
    torch.backends.cudnn.benchmark = True


def runner(cell: Cell, options: GuidelinesOptions, file: Path) -> Call:
    """What runs a network once on one batch of noise."""
    shape = (BATCH[options.device], cell.widths[0], SIDE, SIDE)
    if options.backend == "torch":
        network = cell.stack.build(cell.widths).to(memory_format=torch.channels_last).to(options.device)
        images = torch.randn(shape).contiguous(memory_format=torch.channels_last).to(options.device)

        @torch.inference_mode()
        def run() -> object:
            return network(images)

        return run
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    if options.backend == "onnxruntime":
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"x": noise})
    import openvino

    compiled = openvino_core().compile_model(file, "CPU", openvino_options(options.threads))
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(noise, shared_memory=True))
    return lambda: request.infer()


def write_onnx(plan: Mapping[Key, Sequence[Cell]], folder: str) -> None:
    """Every network as a file: the other backends read it."""
    total = sum(map(len, plan.values()))
    networks = ((key, at, cell) for key, table in plan.items() for at, cell in enumerate(table))
    for key, at, cell in progress(networks, "writing ONNX", total, unit="network"):
        images = torch.zeros(BATCH["cpu"], cell.widths[0], SIDE, SIDE)
        with quiet():
            torch.onnx.export(
                cell.stack.build(cell.widths),
                (images,),
                onnx_file(folder, key, at),
                dynamo=True,
                opset_version=OPSET,
                input_names=["x"],
                external_data=False,
                verbose=False,
            )


def onnx_file(folder: str, key: Key, at: int) -> Path:
    """Where `write_onnx` puts a network: its table and its place there."""
    return Path(folder) / f"{'_'.join(key)}_{at}.onnx"


def machine_line(options: GuidelinesOptions) -> str:
    """What was measured on and with; for a process of its own."""
    _take_cores(options)
    if options.device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batches of {BATCH['cuda']}"
    runtime = "" if options.backend == "torch" else f", {options.backend} {version(options.backend)}"
    return f"{machine()}{runtime}, one image at a time"


def _check_machine(options: GuidelinesOptions) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: torch sees no GPU here; device=cpu measures the CPU.")
    if options.threads > (cores := os.cpu_count() or 1):
        raise InputError(f"threads={options.threads}: this machine has {cores} cores.")
    if options.backend != "torch":
        extra = "[onnx,openvino]" if options.backend == "openvino" else "[onnx]"
        require("onnx", "onnxscript", options.backend, package=extra, what=f"backend={options.backend}")


def _table(key: Key, table: Sequence[Cell], seconds: np.ndarray) -> Table:
    columns = len(COLUMNS)
    base, others, again = seconds[..., :columns], seconds[..., columns : len(table)], seconds[..., len(table) :]
    rows = {
        table[at].stack.name: effect(seconds[..., at : at + columns], base)
        for at in range(columns, len(table), columns)
    }
    repeated = np.tile(base, others.shape[-1] // columns)
    return Table(*key, table, seconds[..., : len(table)], effect(others, repeated), effect(again, base), rows)
