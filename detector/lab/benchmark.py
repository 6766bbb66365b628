"""Measure on this machine: parts and predictions beside named peers, every backbone beside its published cost.

python tools/benchmark.py peers                       parts of this package and torchvision's, in turns; median ratios
python tools/benchmark.py peers out=peers.json        and write the results down
python tools/benchmark.py backbones                   cost, receptive field and speed of every file of conf/backbone/
python tools/benchmark.py backbones only=[v2_1x,v2star_1x] out=DIR    a table, JSON and a plot in DIR
python tools/benchmark.py speed out=DIR               the paper's speed tables: table8, units, appendix and table7; a
                                                      run that was stopped goes on
python tools/benchmark.py speed tables=table8 only=[v2_1x,v1_1x]      one of them, these backbones alone
python tools/benchmark.py predict ckpt=best.ckpt exports=[best.onnx,best.xml]   one image to its boxes, part by part,
                                                      beside torchvision's detectors, with 1 .. all threads
python tools/benchmark.py gpu backbone=v2_1x          training steps and predictions on a GPU, beside torchvision's
python tools/benchmark.py cost out=DIR                what predicts the time of every backbone: multiply-adds, memory
                                                      access or a roofline fitted without its family
"""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import torchvision
from pydantic import BeforeValidator, ConfigDict

from detector.data.annotations import load_annotations
from detector.data.images import read_image
from detector.data.progress import progress
from detector.data.scenes import render_scene
from detector.data.shapes import ensure_shapes
from detector.data.transforms import AugmentOptions
from detector.errors import InputError
from detector.evaluation.tables import markdown_table
from detector.export.formats import import_packages
from detector.files import check_writable, replacing, write_json
from detector.inference.detector import Detector
from detector.inference.runtime import ExportedDetector
from detector.lab import gpu
from detector.lab.backbones import CLASSES, BackboneProfile, alexnet_profile, profile, time_classifiers
from detector.lab.cost_survey import cost_survey
from detector.lab.latency import machine, milliseconds
from detector.lab.networks import backbone_names, backbone_options
from detector.lab.peers import align_contests, backbone_contests, training_contest
from detector.lab.prediction import (
    PEERS,
    PERCENTILES,
    contest_networks,
    contest_predictions,
    exported_peer_names,
    memory_of,
    network_multiply_adds,
    parts,
    peer_multiply_adds,
)
from detector.lab.receptive_field import plot_receptive_fields
from detector.lab.speed import speed_tables
from detector.lab.speed_tables import SpeedTable
from detector.models.backbones import BackboneOptions
from detector.models.backbones.classifier import build_classifier
from detector.models.build import NetworkOptions
from detector.options import Count, Flag

log = logging.getLogger(__name__)
# Turns of each contestant where the command line does not say: a 99th percentile needs a hundred.
TURNS = {"peers": 15, "backbones": 15, "predict": 100, "cost": 15, "speed": 15, "gpu": 15}
RUNTIMES = {".onnx": "onnxruntime", ".xml": "openvino"}
# Shown in receptive_fields.png: the backbones of table 7 at 140 M, and what they are compared with.
PLOTTED = (
    "v2_1x",
    "v2star_1x",
    "xception_1x",
    "v1_1x",
    "mobilenet_v2_0.6",
    "mobilenet_v1_0.5",
    "resnet50",
    "v2_0.5x",
)
EXPLAINED = 0.005  # a larger deviation from the published multiply-adds is listed below the table, with its reason


def _listed(value: Any) -> Any:
    """A list of one may come without brackets."""
    return (value,) if isinstance(value, int | str) else value


class BenchmarkOptions(NetworkOptions):
    """What to measure. The training step of `peers` is that of a network and a recipe; what else a recipe says is not
    used here."""

    model_config = ConfigDict(extra="ignore")

    what: Literal["peers", "backbones", "predict", "cost", "speed", "gpu"] = "peers"
    """Peers, backbones, predict, gpu, cost or speed; the word alone will do."""
    turns: Count | None = None
    """Turns of each contestant, after three that are not counted; null: 15, for predict 100. Speed: at most."""
    out: str | None = None
    """Peers, predict, gpu: a JSON file; backbones: a folder; cost, speed: a folder, null: cost, speed."""
    only: tuple[str, ...] | None = None
    """Backbones, cost, speed: their names, [v2_1x,v2star_1x]; null: all of conf/backbone/ but timm, torchvision."""
    tables: Annotated[tuple[SpeedTable, ...], BeforeValidator(_listed)] = get_args(SpeedTable)
    """Speed: which of the paper's tables."""
    receptive_field: Flag = True
    """Backbones: measure it too, minutes for all of them."""
    ckpt: str | None = None
    """Predict: best.ckpt or last.ckpt of a run."""
    source: str | None = None
    """Predict: an image; null: a drawn one of 640 x 480."""
    exports: tuple[str, ...] = ()
    """Predict: files of tools/export.py to run beside the checkpoint."""
    threads: Annotated[tuple[Count, ...], BeforeValidator(_listed)] | None = None
    """Predict: numbers of threads, [1,2]; null: 1 to all cores. Cost, speed: one number; null: 1."""
    budgets: tuple[Count, ...] = (50, 100)
    """Predict: numbers of proposals that the checkpoint is run with too."""
    peers_exported: Flag = False
    """Predict: also networks alone, beside torchvision's in OpenVINO and int8, per multiply-add."""
    augment: AugmentOptions = AugmentOptions()
    """Peers: how the images of the training step are changed."""


def benchmark(options: BenchmarkOptions) -> None:
    """Measure, log the tables, and write them where `out` is given.

    Raises:
        InputError: an option, or a file that it names, is wrong; a contestant fails.
    """
    if options.out:
        check_writable(options.out, file=options.what in ("peers", "predict", "gpu"))
    commands = {"peers": benchmark_peers, "backbones": benchmark_backbones, "predict": benchmark_predict}
    (commands | {"cost": benchmark_cost, "speed": benchmark_speed, "gpu": benchmark_gpu})[options.what](
        options, options.turns or TURNS[options.what]
    )


def benchmark_peers(options: BenchmarkOptions, turns: int) -> None:
    """Parts of this package beside torchvision's."""
    rows = list(progress(_peer_contests(options, turns), "contests", total=6, unit="contest"))
    columns = {
        "what": ("name", ""),
        "this package, ms": ("ours_ms", ".1f"),
        "torchvision, ms": ("peer_ms", ".1f"),
        "times faster": ("ratio", ".2f"),
    }
    log.info("%s\n%s", machine(), _table(rows, columns))
    _write(options.out, {"machine": machine(), "turns": turns, "contests": rows})


def _peer_contests(options: BenchmarkOptions, turns: int) -> Iterator[dict[str, Any]]:
    yield from align_contests(turns)
    yield from backbone_contests(turns)
    with tempfile.TemporaryDirectory() as folder:
        # Other images than the training ones, at the size that both sides take in without shrinking.
        root = ensure_shapes(Path(folder) / "shapes", seed=1, train=32, val=1, size=320)
        index = load_annotations(root / "annotations/train.json", root / "images")
        yield training_contest(options, options.augment, index, turns)


def benchmark_backbones(options: BenchmarkOptions, turns: int) -> None:
    """Every backbone: its cost, what it sees, its speed as a classifier."""
    entries = _entries(options)
    profiles = [
        profile(name, entry, with_field=options.receptive_field)
        for name, entry in progress(entries.items(), "cost and receptive field", unit="backbone")
    ]
    networks: dict[str, Any] = {
        one.name: (build_classifier(entries[one.name], CLASSES), one.image_size) for one in profiles
    }
    if not options.only:  # for its speed alone: it is no backbone
        profiles.append(alexnet_profile())
        networks["alexnet"] = (torchvision.models.alexnet(weights=None), profiles[-1].image_size)
    times = time_classifiers(networks, turns)
    for one in profiles:
        one.milliseconds = times[one.name]
    log.info("%s\n%s\n%s", machine(), backbone_table(profiles), deviations(profiles))
    if options.out:
        write_survey(profiles, Path(options.out))


def _entries(options: BenchmarkOptions) -> dict[str, BackboneOptions]:
    return {name: backbone_options(name) for name in chosen(options.only)}


def chosen(only: Sequence[str] | None) -> list[str]:
    """Names of files of conf/backbone/; all where none are given, but those that only take a model's name."""
    known = backbone_names()
    if unknown := [name for name in only or () if name not in known]:
        raise InputError(f"only={unknown}: no such backbone; there is {', '.join(known)}.")
    return list(only) if only else [name for name in known if name not in ("timm", "torchvision")]


_COLUMNS = {
    "backbone": ("name", ""),
    "input": ("image_size", ""),
    "parameters, M": ("parameters", ".2f"),
    "multiply-adds, M": ("multiply_adds", ".1f"),
    "published, M": ("published", ".4g"),
    "deviation": ("deviation", "+.1%"),
    "MAC, M": ("memory_access", ".1f"),
    "multiply-adds at 800x1200, G": ("detection_multiply_adds", ".2f"),
    "field of a block": ("block", ""),
    "field of c5, px": ("c5", ""),
    "effective, px": ("effective", ".0f"),
    "batch 1, ms": (1, ".1f"),
    "batch 8, ms": (8, ".1f"),
}


def backbone_table(profiles: Sequence[BackboneProfile]) -> str:
    """A Markdown table, a line for each backbone."""
    rows: list[dict[Any, Any]] = [{**vars(one), **one.milliseconds, "deviation": one.deviation} for one in profiles]
    for row in rows:
        if field := row["field"]:
            row |= {"block": max(field.blocks.values(), default=None), "c5": field.stages["c5"]}
    return _table(rows, _COLUMNS)


def _table(rows: Iterable[Mapping[Any, Any]], columns: Mapping[str, tuple[Any, str]]) -> str:
    """A Markdown table; columns: head -> (key of a row, format). What a row lacks is left empty."""
    cells = [["" if row.get(key) is None else format(row[key], spec) for key, spec in columns.values()] for row in rows]
    return markdown_table([*columns], cells, width=None)


def deviations(profiles: Sequence[BackboneProfile]) -> str:
    """A line for each backbone whose multiply-adds differ from the published ones by more than EXPLAINED."""
    lines = [
        f"- {one.name}: {one.deviation:+.1%} ({one.source}). {one.note or 'Not explained.'}"
        for one in profiles
        if one.deviation is not None and abs(one.deviation) > EXPLAINED
    ]
    head = f"More than {EXPLAINED:.1%} from the published multiply-adds:"
    return "\n".join([head, "", *lines]) if lines else ""


PREFACE = """# Backbones

Written by `python tools/benchmark.py backbones out=docs` on {machine}.

Each row is the ImageNet classifier (1000 classes) on a backbone of `conf/backbone/` with random weights, at its input
size: parameters, multiply-adds (convolutions and matrix products), the published multiply-adds and the deviation from
them, memory access cost (MAC: values that convolutions and fully connected layers read and write), the multiply-adds of
the backbone alone at 800x1200, receptive fields, and the median time of one batch, folded for inference, all networks
taking turns. Absolute times belong to this machine: compare rows. The theoretical field is that of a block of stride 1,
in cells of its own map, and of c5, in pixels of the image. The effective field is the side of a square as large as the
area whose gradient exceeds 4.55% of the largest (Luo et al. 2016), with random weights at 768x768.
"""


def write_survey(profiles: Sequence[BackboneProfile], out: Path) -> None:
    """backbones.md, backbones.json and, where fields were measured, receptive_fields.png."""
    _write(out / "backbones.json", {"machine": machine(), "backbones": [one.to_dict() for one in profiles]})
    fields = {
        one.name: (one.effective_map, one.field.stages["c5"], one.effective)
        for one in profiles
        if one.field and one.effective and one.effective_map is not None and one.name in PLOTTED
    }
    if fields:
        plot_receptive_fields(fields, out / "receptive_fields.png")
    plot = "![Receptive fields](receptive_fields.png)" if fields else ""
    sections = (PREFACE.format(machine=machine()), backbone_table(profiles), deviations(profiles), plot)
    with replacing(out / "backbones.md") as partial:
        partial.write_text("\n\n".join(section.strip("\n") for section in sections if section) + "\n")
    log.info("%s", out / "backbones.md")


def benchmark_predict(options: BenchmarkOptions, turns: int) -> None:
    """One image to its boxes: a checkpoint, its exports and torchvision's detectors."""
    if not options.ckpt:
        raise InputError("ckpt is missing: python tools/benchmark.py predict ckpt=RUN_DIR/best.ckpt")
    exports = by_name(options.exports)
    if options.peers_exported:  # before the minutes of the first contest
        import_packages("openvino", "nncf")
    image = read_image(options.source) if options.source else drawn_image()
    threads = options.threads or range(1, (os.cpu_count() or 1) + 1)
    timings = contest_predictions(
        options.ckpt, image, threads=threads, turns=turns, exports=list(exports.values()), budgets=options.budgets
    )
    torch.set_num_threads(threads[-1])
    detector = Detector.load(options.ckpt, "cpu")
    spent = parts(detector, image, turns)
    memory = memory_of({"torch": Path(options.ckpt)} | exports, image.shape[:2], threads[-1])
    efficiency = per_multiply_add(detector, exports, image, threads, turns) if options.peers_exported else []
    size = f"one image of {image.shape[1]} x {image.shape[0]}, short side {detector.preprocessing.short_side}"
    used = {RUNTIMES[path.suffix] for path in exports.values() if path.suffix in RUNTIMES}
    where = ", ".join([machine(), *(f"{name} {version(name)}" for name in sorted(used))])
    log.info("%s; %s\n%s", where, size, prediction_tables(timings, spent, memory, efficiency, threads[-1]))
    content = {"machine": where, "picture": size, "turns": turns, "contestants": timings}
    _write(options.out, content | {"parts_ms": spent, "peak_memory_mb": memory, "per_multiply_add": efficiency})


def benchmark_gpu(options: BenchmarkOptions, turns: int) -> None:
    """Training steps and predictions on a GPU.

    Raises:
        InputError: torch sees no GPU.
    """
    if not torch.cuda.is_available():
        raise InputError("benchmark.py gpu: torch sees no GPU here; `peers` and `predict` measure on the CPU.")
    where = f"{torch.cuda.get_device_name()}, {machine()}"
    with tempfile.TemporaryDirectory() as folder:
        root = ensure_shapes(Path(folder) / "shapes", seed=1, train=max(gpu.BATCHES), val=1, size=gpu.SIZE)
        index = load_annotations(root / "annotations/train.json", root / "images")
        rows = gpu.measure(options, index, torch.device("cuda"), turns)
    columns = {key: (key, "") for key in ("what", "batch", *gpu.Contestant._fields)}
    columns |= {"ms": ("ms", ".1f"), "images/s": ("images_per_second", ".0f")}
    log.info("%s; images of %d x %d\n%s", where, gpu.SIZE, gpu.SIZE, _table(rows, columns))
    _write(options.out, {"machine": where, "turns": turns, "contestants": rows})


def benchmark_cost(options: BenchmarkOptions, turns: int) -> None:
    """What predicts the time of the backbones."""
    cost_survey(chosen(options.only), _threads(options), turns, options.out or "cost")


def benchmark_speed(options: BenchmarkOptions, turns: int) -> None:
    """The paper's speed tables."""
    out, threads = options.out or "speed", _threads(options)
    speed_tables(options.tables, _entries(options), out, threads=threads, turns=turns)


def _threads(options: BenchmarkOptions) -> int:
    threads = options.threads or (1,)
    if len(threads) > 1 or threads[0] > (os.cpu_count() or 1):
        raise InputError(f"threads={list(threads)}: one number for {options.what}, of at most {os.cpu_count()} cores.")
    return threads[0]


def by_name(paths: Iterable[str]) -> dict[str, Path]:
    """Files by their names, by which the tables tell them apart."""
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.name in found:
            raise InputError(
                f"exports: {found[path.name]} and {path} have one name, and the table tells by it; copy one."
            )
        found[path.name] = path
    return found


def drawn_image() -> np.ndarray:
    """The first drawn scene of 640 x 480."""
    scenes = (render_scene(seed, size=640).image for seed in itertools.count())
    return next(image for image in scenes if image.shape[:2] == (480, 640))


def per_multiply_add(
    detector: Detector, exports: dict[str, Path], image: np.ndarray, threads: Sequence[int], turns: int
) -> list[dict[str, Any]]:
    """Milliseconds and multiply-adds of the exports, and of torchvision's detectors in OpenVINO."""
    costs: dict[str, int] = {}
    for name in PEERS:
        costs |= dict.fromkeys(exported_peer_names(name), peer_multiply_adds(name, image))
    for name, path in exports.items():
        costs[name] = network_multiply_adds(detector, image, ExportedDetector.load(path).info.canvas)
    times = contest_networks(image, list(exports.values()), threads=threads, turns=turns)
    return [
        {"name": name, "threads": number, "ms": milliseconds(seconds), "multiply_adds": costs[name]}
        for number, contest in times.items()
        for name, seconds in contest.items()
    ]


def prediction_tables(
    timings: list[dict[str, Any]],
    spent: dict[str, float],
    memory: dict[str, float],
    efficiency: list[dict[str, Any]],
    threads: int,
) -> str:
    """What `benchmark_predict` measured, as Markdown tables."""
    who = {"what": ("name", ""), "threads": ("threads", "")}
    times = {f"p{share}, ms": (f"p{share}_ms", ".1f") for share in PERCENTILES}
    tables = [
        _table(timings, who | times | {"times torch": ("times_of_torch", ".2f")}),
        markdown_table((f"part (torch, {threads} threads)", "ms"), [(part, f"{ms:.2f}") for part, ms in spent.items()]),
        markdown_table(("peak memory of a process", "MB"), [(name, f"{size:.0f}") for name, size in memory.items()]),
    ]
    if efficiency:
        rows = [
            row | {"G": row["multiply_adds"] / 1e9, "rate": 1e9 * row["ms"] / row["multiply_adds"]}
            for row in efficiency
        ]
        rates = {"ms": ("ms", ".1f"), "multiply-adds, G": ("G", ".3f"), "ms per G": ("rate", ".1f")}
        tables.append(_table(rows, who | rates))
    return "\n\n".join(tables)


def _write(path: str | Path | None, content: dict[str, Any]) -> None:
    if path:
        write_json(path, content)
        log.info("%s", path)
