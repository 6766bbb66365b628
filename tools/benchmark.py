"""Measure on this machine: our parts and predictions beside named peers, every backbone beside its published figures.

python tools/benchmark.py peers                       our parts and torchvision's, in turns; ratios are medians
python tools/benchmark.py peers out=peers.json        and write the figures down
python tools/benchmark.py backbones                   cost, receptive field and speed of every file of conf/backbone/
python tools/benchmark.py backbones only=[v2_1x,v2star_1x] out=DIR    a table, JSON and a picture in DIR
python tools/benchmark.py predict ckpt=best.ckpt exports=[best.onnx,best.xml]   one picture to its boxes, part by part,
                                                      beside torchvision's detectors, with 1 .. all threads
"""

from __future__ import annotations

import itertools
import logging
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launch import CONF, launch, options, plain

import numpy as np
import torch
import torchvision
import yaml
from omegaconf import DictConfig

from detector.data.annotations import load_annotations
from detector.data.images import read_image
from detector.data.progress import progress
from detector.data.scenes import render_scene
from detector.data.shapes import ensure_shapes
from detector.errors import InputError
from detector.evaluation.tables import markdown_table
from detector.export.formats import import_openvino
from detector.export.quantize import import_nncf
from detector.files import replacing, write_json
from detector.inference.detector import Detector
from detector.inference.runtime import ExportedDetector
from detector.lab.backbones import CLASSES, Row, alexnet_row, describe, time_classifiers
from detector.lab.latency import Contest, machine
from detector.lab.peers import align_contests, backbone_contests, training_contest
from detector.lab.prediction import (
    PEERS,
    Timing,
    contest_networks,
    contest_predictions,
    exported_peer_names,
    memory_of,
    network_multiply_adds,
    parts,
    peer_multiply_adds,
)
from detector.lab.receptive_field import plot_receptive_fields
from detector.models.backbones import parse_backbone
from detector.models.backbones.classifier import build_classifier
from detector.models.build import NetworkOptions

log = logging.getLogger(__name__)
# Of each contestant, where the command line does not say: a 99th percentile needs a hundred.
TURNS = {"peers": 15, "backbones": 15, "predict": 100}
RUNTIMES = {".onnx": "onnxruntime", ".xml": "openvino"}


def main(config: DictConfig) -> None:
    if config.what not in SUBJECTS:
        raise InputError(f"what={config.what}; there is: {', '.join(SUBJECTS)}.")
    SUBJECTS[config.what](config)


def benchmark_peers(config: DictConfig) -> None:
    turns = config.turns or TURNS["peers"]
    results = list(progress(peers(config, turns), "contests", total=6, unit="contest"))
    log.info("%s\n%s", machine(), render_peers(results))
    if config.out:
        rows = [result.to_dict() for result in results]
        write_json(config.out, {"machine": machine(), "turns": turns, "contests": rows})
        log.info("%s", config.out)


def peers(config: DictConfig, turns: int) -> Iterator[Contest]:
    yield from align_contests(turns)
    yield from backbone_contests(turns)
    values = plain(config)
    options = NetworkOptions.parse({part: values[part] for part in NetworkOptions.model_fields})
    with tempfile.TemporaryDirectory() as folder:
        # Other pictures than the training ones, at the size that both sides take in without shrinking.
        root = ensure_shapes(Path(folder) / "shapes", seed=1, train=32, val=1, size=320)
        index = load_annotations(root / "annotations/train.json", root / "images")
        yield training_contest(options, values["augment"], index, turns)


def render_peers(results: list[Contest]) -> str:
    rows = [
        (row["name"], f"{row['ours_ms']:.1f}", f"{row['peer_ms']:.1f}", f"{row['ratio']:.2f}")
        for row in (result.to_dict() for result in results)
    ]
    return markdown_table(("what", "ours, ms", "torchvision, ms", "times faster"), rows)


def benchmark_backbones(config: DictConfig) -> None:
    entries = {
        name: parse_backbone(yaml.safe_load((CONF / "backbone" / f"{name}.yaml").read_text()))
        for name in chosen(config.only)
    }
    rows = [
        describe(name, entry, with_field=config.receptive_field)
        for name, entry in progress(entries.items(), "cost and receptive field", unit="backbone")
    ]
    networks: dict[str, Any] = {
        row.name: (build_classifier(entries[row.name], CLASSES), row.image_size) for row in rows
    }
    if not config.only:  # for its speed alone: it is no backbone
        rows.append(alexnet_row())
        networks["alexnet"] = (torchvision.models.alexnet(weights=None), 224)
    times = time_classifiers(networks, config.turns or TURNS["backbones"], bar)
    for row in rows:
        row.milliseconds = times[row.name]
    log.info("%s\n%s\n%s", machine(), render_backbones(rows), render_deviations(rows))
    if config.out:
        write_survey(rows, Path(str(config.out)))


def chosen(only: Iterable[str] | None) -> list[str]:
    """Names of files of conf/backbone/; all where none are given, but those that only take a model's name."""
    known = options(CONF, "backbone")
    unknown = [name for name in only or () if name not in known]
    if unknown:
        raise InputError(f"only={unknown}: no such backbone; there is {', '.join(known)}.")
    return list(only) if only else [name for name in known if name not in ("timm", "torchvision")]


def benchmark_predict(config: DictConfig) -> None:
    if not config.ckpt:
        raise InputError("ckpt is missing: python tools/benchmark.py predict ckpt=RUN_DIR/best.ckpt")
    exports, turns = by_name(config.exports), config.turns or TURNS["predict"]
    if config.peers_exported:  # before the minutes of the first contest
        import_openvino()
        import_nncf()
    image = read_image(config.source) if config.source else generated_picture()
    threads = list(config.threads or range(1, (os.cpu_count() or 1) + 1))
    timings = contest_predictions(
        config.ckpt, image, threads=threads, turns=turns, exports=list(exports.values()), budgets=list(config.budgets),
        progress=bar,
    )  # fmt: skip
    torch.set_num_threads(threads[-1])
    detector = Detector.load(config.ckpt, "cpu")
    spent = parts(detector, image, turns)
    memory = memory_of({"torch": Path(config.ckpt)} | exports, image.shape[:2], threads[-1])
    efficiency = per_multiply_add(detector, exports, image, threads, turns) if config.peers_exported else []
    size = f"one picture of {image.shape[1]} x {image.shape[0]}, short side {detector.preprocessing.short_side}"
    used = {RUNTIMES[path.suffix] for path in exports.values() if path.suffix in RUNTIMES}
    where = ", ".join([machine(), *(f"{name} {version(name)}" for name in sorted(used))])
    log.info("%s; %s\n%s", where, size, render_predictions(timings, spent, memory, efficiency, threads[-1]))
    if config.out:
        rows = [timing.to_dict() for timing in timings]
        content = {"machine": where, "picture": size, "turns": turns, "contestants": rows}
        write_json(config.out, content | {"parts_ms": spent, "peak_memory_mb": memory, "per_multiply_add": efficiency})
        log.info("%s", config.out)


def by_name(paths: Iterable[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.name in found:
            raise InputError(
                f"exports: {found[path.name]} and {path} have one name, and the table tells by it; copy one."
            )
        found[path.name] = path
    return found


def generated_picture() -> np.ndarray:
    """The first drawn scene of 640 x 480."""
    scenes = (render_scene(seed, size=640).image for seed in itertools.count())
    return next(image for image in scenes if image.shape[:2] == (480, 640))


def per_multiply_add(
    detector: Detector, exports: dict[str, Path], image: np.ndarray, threads: list[int], turns: int
) -> list[dict[str, Any]]:
    """Milliseconds per thousand million multiply-adds, of our exports and of torchvision's detectors in OpenVINO."""
    costs: dict[str, int] = {}
    for name in PEERS:
        costs |= dict.fromkeys(exported_peer_names(name), peer_multiply_adds(name, image))
    for name, path in exports.items():
        costs[name] = network_multiply_adds(detector, image, ExportedDetector.load(path).info.canvas)
    times = contest_networks(image, list(exports.values()), threads=threads, turns=turns, progress=bar)
    return [
        {"name": name, "threads": number, "ms": 1000 * statistics.median(seconds), "multiply_adds": costs[name]}
        for number, contest in times.items()
        for name, seconds in contest.items()
    ]


def bar(turns: Iterable[int], title: str) -> Iterable[int]:
    return progress(turns, title, unit="turn")


def render_predictions(
    timings: list[Timing],
    spent: dict[str, float],
    memory: dict[str, float],
    efficiency: list[dict[str, Any]],
    threads: int,
) -> str:
    times = [
        (t.name, t.threads, *(f"{t.percentile(share):.1f}" for share in (0.5, 0.9, 0.99)), f"{t.share:.2f}")
        for t in timings
    ]
    tables = [
        markdown_table(("what", "threads", "p50, ms", "p90, ms", "p99, ms", "times torch"), times, width=None),
        markdown_table((f"part (torch, {threads} threads)", "ms"), [(part, f"{ms:.2f}") for part, ms in spent.items()]),
        markdown_table(("peak memory of a process", "MB"), [(name, f"{size:.0f}") for name, size in memory.items()]),
    ]
    if efficiency:
        costs = [(row, row["multiply_adds"] / 1e9) for row in efficiency]
        rates = [(r["name"], r["threads"], f"{r['ms']:.1f}", f"{c:.3f}", f"{r['ms'] / c:.1f}") for r, c in costs]
        heads = ("network alone", "threads", "ms", "multiply-adds, G", "ms per G")
        tables.append(markdown_table(heads, rates, width=None))
    return "\n\n".join(tables)


HEADS = (
    "backbone", "input", "parameters, M", "multiply-adds, M", "published, M", "deviation", "MAC, M",
    "multiply-adds at 800x1200, G", "field of a block", "field of c5, px", "effective, px",
    "batch 1, ms", "batch 8, ms",
)  # fmt: skip


def render_backbones(rows: list[Row]) -> str:
    """A Markdown table."""
    lines = []
    for row in rows:
        block = max(row.field.blocks.values(), default=None) if row.field else None
        line = (
            row.name, row.image_size, number(row.parameters, 2), number(row.multiply_adds, 1),
            number(row.published, 0 if (row.published or 0) >= 10 else 1), percent(row.deviation),
            number(row.memory_access, 1), number(row.detection_multiply_adds, 2), number(block, 0),
            number(row.field.stages["c5"] if row.field else None, 0), number(row.effective, 0),
            number(row.milliseconds.get(1), 1), number(row.milliseconds.get(8), 1),
        )  # fmt: skip
        lines.append(line)
    return markdown_table(HEADS, lines, width=None)


def render_deviations(rows: list[Row]) -> str:
    """A line for every figure that is more than 0.5% from the published one."""
    lines = [
        f"- {row.name}: {percent(row.deviation)} ({row.source}). {row.note or 'Not explained.'}"
        for row in rows
        if row.deviation is not None and abs(row.deviation) > 0.005
    ]
    return "\n".join(["More than 0.5% from the published figure:", "", *lines]) if lines else ""


def write_survey(rows: list[Row], out: Path) -> None:
    """backbones.md, backbones.json and, where fields were measured, receptive_fields.png."""
    write_json(out / "backbones.json", {"machine": machine(), "backbones": [row.to_dict() for row in rows]})
    fields = {
        row.name: (row.effective_map, row.field.stages["c5"], row.effective)
        for row in rows
        if row.field and row.effective and row.effective_map is not None and row.name in PICTURED
    }
    if fields:
        plot_receptive_fields(fields, out / "receptive_fields.png")
    picture = "![Receptive fields](receptive_fields.png)" if fields else ""
    parts = (PREFACE.format(machine=machine()), render_backbones(rows), render_deviations(rows), picture)
    with replacing(out / "backbones.md") as partial:
        partial.write_text("\n\n".join(part.strip("\n") for part in parts if part) + "\n")
    log.info("backbones.md and backbones.json in %s", out)


# The backbones of table 7 at 140 M, and what they are compared with.
PICTURED = (
    "v2_1x",
    "v2star_1x",
    "xception_1x",
    "v1_1x",
    "mobilenet_v2_0.6x",
    "mobilenet_v1_0.5x",
    "resnet50",
    "v2_0.5x",
)
PREFACE = """# Backbones

Written by `python tools/benchmark.py backbones out=docs` on {machine}.

Each row is the ImageNet classifier (1000 classes) on a backbone of `conf/backbone/` with random weights, at its input
size: parameters, multiply-adds (convolutions and matrix products), the published multiply-adds and our deviation from
them, memory access cost (MAC: values that convolutions and fully connected layers read and write), the multiply-adds of
the backbone alone at 800x1200, receptive fields, and the median time of one batch, folded for inference, all networks
taking turns. Absolute times belong to this machine: compare rows. The theoretical field is that of a block of stride 1,
in cells of its own map, and of c5, in pixels of the image. The effective field is the side of a square as large as the
area whose gradient exceeds 4.55% of the largest (Luo et al. 2016), with random weights at 768x768.
"""


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f}%"


SUBJECTS = {"peers": benchmark_peers, "backbones": benchmark_backbones, "predict": benchmark_predict}

if __name__ == "__main__":
    # `benchmark.py peers` reads better than `benchmark.py what=peers`.
    sys.argv[1:] = [f"what={word}" if word in SUBJECTS else word for word in sys.argv[1:]]
    launch(main, config_name="benchmark")
