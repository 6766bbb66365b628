"""Repeat the ablations of ShuffleNet V1 in small, and see which features ShuffleNet V2 reuses.

python tools/ablations.py                             all: 10 networks trained 3 times each, half an hour on one core
python tools/ablations.py groups shuffle seeds=5      two tables of V1: groups, channel shuffle
python tools/ablations.py units                       ShuffleNet against units of ResNet, ResNeXt, Xception and VGG
python tools/ablations.py reuse ckpt=RUN_DIR/best.ckpt    figure 4 of V2, for any checkpoint, beside a DenseNet

Small classifiers of equal multiply-adds are trained on the crops of the drawn data set, each with the same seeds. What
is done is kept in OUT/ablations.json: the same command goes on where it was stopped, and more seeds add to those there.
A claim of the paper holds here where the 95% interval of the mean difference (Student's t over the seeds, paired) lies
on its side of zero; it does not where it lies on the other, and is undecided where it holds zero.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

import yaml
from pydantic import Field
from pydantic.types import Strict
from torch import nn
from torchvision.models import DenseNet

from detector.data.json_file import read_json
from detector.data.progress import progress
from detector.errors import InputError
from detector.files import CONF, check_writable, replacing, write_json
from detector.lab.ablation_networks import COST, SIDE, TABLES, What, build
from detector.lab.ablation_report import plot, section, to_dict
from detector.lab.latency import machine
from detector.lab.networks import backbone_options
from detector.lab.reuse import plot_reuse, read_reuse, reuse_section
from detector.models.backbones.classifier import build_classifier
from detector.options import Count, Options
from detector.training.pretrain import PretrainOptions, pretrain

log = logging.getLogger(__name__)

DENSENET, V2 = "DenseNet", "ShuffleNet V2 0.5x"
GROWTH, BLOCKS, FIRST = 16, (4, 8, 4), 32  # of the DenseNet: as many layers as V2 has units
Runs: TypeAlias = dict[str, list[float]]

ABOUT = """# ShuffleNet's ablations in small

Classifiers of {cost:.1f} M multiply-adds at {side} x {side} pixels, {epochs} epochs on the crops of {scenes} drawn
scenes, {seeds} seeds, on {machine}.
Errors are means with a 95% interval (Student's t over the seeds). Differences are to the network that the row is
compared with, paired by seed: the order of the images and their changes are the same. Beside them the paper's own
errors on ImageNet."""


class AblationsOptions(Options):
    """What to train, and how long."""

    what: tuple[Literal["groups", "shuffle", "units", "reuse"], ...] = (*get_args(What), "reuse")
    """Tables; the words alone will do: groups shuffle."""
    seeds: Annotated[int, Strict(), Field(ge=2), Field(le=10)] = 3
    """Trainings of each network; fewer than three say little."""
    epochs: Count = 2
    """Of each training."""
    scenes: Count = 1200
    """Drawn for training, five or six crops each; a sixth as many more for validation."""
    data: str = Field(default="data/crops", min_length=1)
    """The folder of the crops; they are made where it is empty."""
    ckpt: str | None = None
    """For reuse: a checkpoint, or a .pth file, of ShuffleNet V2; null: v2_0.5x, trained as the others."""
    out: str = "ablations"
    """A folder for ablations.{json,md,png}, tables.json, reuse.{json,png}, and the runs."""


def ablations(options: AblationsOptions) -> None:
    """Train what is missing, log the tables and write them into `out`.

    Raises:
        InputError: `out` cannot be written or holds results of other settings, or `ckpt` holds no ShuffleNet V2.
    """
    out, tables = Path(options.out), [name for name in dict.fromkeys(options.what) if name != "reuse"]
    check_writable(out)
    logging.getLogger("detector.training").setLevel(logging.WARNING)  # a line for each training is said here
    given = {Path(options.ckpt).name: read_reuse(options.ckpt)} if options.ckpt and "reuse" in options.what else {}
    networks = {row.network: options.seeds for name in tables for row in TABLES[name].rows}
    if "reuse" in options.what:
        networks |= {DENSENET: 1} | ({} if given else {V2: 1})
    runs = train_all(networks, options)
    errors = {name: values[: options.seeds] for name, values in runs.items()}
    text = ABOUT.format(cost=COST / 1e6, side=SIDE, machine=machine(), **options.to_dict())
    parts = [text, *(section(TABLES[name], errors) for name in tables)]
    if tables:
        plot(tables, errors, out / "ablations.png")
        parts.append("![Top-1 error](ablations.png)")
        write_json(out / "tables.json", {"machine": machine(), "options": options.to_dict()} | to_dict(tables, errors))
    if "reuse" in options.what:
        trained = {name: read_reuse(run_dir(out, name, 0) / "best.pth") for name in networks if name in (DENSENET, V2)}
        parts += [reuse_section(trained | given), "![Feature reuse](reuse.png)"]
        plot_reuse(trained | given, out / "reuse.png")
        shown = {name: [one.to_dict() for one in stages] for name, stages in (trained | given).items()}
        write_json(out / "reuse.json", shown)
    text = "\n\n".join(parts)
    log.info("%s", text)
    with replacing(out / "ablations.md") as partial_file:
        partial_file.write_text(f"{text}\n", encoding="utf-8")


def train_all(networks: Mapping[str, int], options: AblationsOptions) -> Runs:
    """Network -> top-1 error of its last epoch in percent, by seed; trains what OUT/ablations.json does not have.

    Args:
        networks: by name, the number of seeds; one seed of all is trained before the next.

    Raises:
        InputError: what it has is of other settings.
    """
    path = Path(options.out) / "ablations.json"
    settings = {"multiply_adds": COST, "epochs": options.epochs, "scenes": options.scenes}
    kept = read_json(path, "file of results") if path.exists() else {"settings": settings, "runs": {}}
    if not isinstance(kept, dict) or not (
        isinstance(kept.get("settings"), dict) and isinstance(kept.get("runs"), dict)
    ):
        raise InputError(f"'{path}' holds no results of this command; choose another out=.")
    if kept["settings"] != settings:
        was = " ".join(f"{name}={value}" for name, value in kept["settings"].items())
        raise InputError(f"'{path}' has results of {was}. Choose another out=, or train on with these settings.")
    runs: Runs = kept["runs"]
    missing = [
        (name, seed)
        for seed in range(max(networks.values(), default=0))
        for name, seeds in networks.items()
        if len(runs.get(name, [])) <= seed < seeds
    ]
    for name, seed in progress(missing, "all networks", unit="training"):
        runs.setdefault(name, []).append(train(name, seed, options))
        write_json(path, {"settings": settings, "runs": runs})
        log.info("%s, seed %d: top-1 error %.1f%%", name, seed, runs[name][-1])
    return runs


def train(name: str, seed: int, options: AblationsOptions) -> float:
    """Top-1 error in percent after the last epoch of one training, by the recipe pretrain=crops."""
    folder = run_dir(Path(options.out), name, seed)
    values = yaml.safe_load((CONF / "pretrain" / "crops.yaml").read_text())
    del values["defaults"]
    scenes = {"train": options.scenes, "val": -(-options.scenes // 6)}
    changed: dict[str, Any] = {
        "data": {"root": options.data, "generate": values["data"]["generate"] | scenes},
        "schedule": values["schedule"] | {"epochs": options.epochs},
        "val": {"every": options.epochs},
        "trainer": {"devices": 1},
    }
    about = {"recipe_name": "ablations", "backbone_name": name, "run_dir": str(folder), "overwrite": True}
    pretrain(PretrainOptions.parse(values | changed | about | {"seed": seed}), maker(name))
    return 100 * (1 - float(json.loads((folder / "metrics.json").read_text())["last"]["top1"]))


def maker(name: str) -> Callable[[int], nn.Module]:
    """What makes a network, with random weights, for a number of classes."""
    if name == DENSENET:
        return partial(DenseNet, GROWTH, BLOCKS, FIRST, 4, 0.0)  # bottlenecks of 4, no dropout: torchvision's defaults
    if name == V2:
        return partial(build_classifier, backbone_options("v2_0.5x"))
    return partial(build, name)


def run_dir(out: Path, name: str, seed: int) -> Path:
    """Where a training writes."""
    return out / "runs" / f"{name.replace(' ', '_').replace(',', '')}_{seed}"
