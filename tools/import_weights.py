"""Turn a file of pre-trained weights into one for a backbone of ours, and say what became of every tensor.

python tools/import_weights.py source=ShuffleNetV2.1.0x.pth.tar backbone=v2_1x backbone.layout=paper out=v2_1x.pth
python tools/import_weights.py source=shufflenetv2_x1-5666bf0f80.pth backbone=v2star_1x out=v2star_1x.pth
python tools/train.py backbone=v2_1x backbone.layout=paper backbone.weights=v2_1x.pth

The names in the file tell whose it is: torchvision's, timm's, ours, or ShuffleNet V2's authors' (who train on BGR in
0-255; their 1x, 1.5x and 2x need backbone.layout=paper). The result keeps the classifier as conv5.* and fc.*.
"""

from __future__ import annotations

from launch import launch, plain

import torch
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from detector.errors import InputError
from detector.files import replacing
from detector.models.backbones import build_backbone, parse_backbone
from detector.models.backbones.pretrained import WeightsReport, load_weights


def main(cfg: DictConfig) -> None:
    config = plain(cfg)
    source, out = str(config["source"]), str(config["out"])
    backbone = build_backbone(parse_backbone(config["backbone"]))
    report = load_weights(backbone, source, input_frame=config["input"], partial=True)
    show(report)
    if report.problems and not config["partial"]:
        raise InputError(
            f"source={source}: {len(report.problems)} tensors do not fit this backbone, see above; nothing is written. "
            "Choose the backbone, width and layout of the file, or load what fits with partial=true."
        )
    with replacing(out) as partial:
        torch.save({**backbone.state_dict(), **report.classifier}, partial)
    print(f"{out}: use it with backbone.weights={out}")


def show(report: WeightsReport) -> None:
    table = Table("tensors", "", "which", title=Text(f"{report.source}: {report.format}"), box=box.SIMPLE_HEAD)
    rows = {
        "matched": report.matched,
        "ignored (classifier)": report.ignored,
        "start as the identity": report.kept,
        "start at random": report.random,
    }
    for what, names in rows.items():
        if names:
            table.add_row(str(len(names)), what, Text(summary(names)))
    for phrase in report.problems:
        table.add_row("1", "does not fit", Text(phrase))
    Console(width=120).print(table)
    print(f"input: {report.input_frame}, {len(report.classifier)} tensors of a classifier kept")


def summary(names: tuple[str, ...]) -> str:
    """The modules that they belong to, two levels deep, with the number of tensors of each."""
    counts: dict[str, int] = {}
    for name in names:
        module = ".".join(name.split(".")[:2])
        counts[module] = counts.get(module, 0) + 1
    return ", ".join(f"{module} ({count})" for module, count in counts.items())


if __name__ == "__main__":
    launch(main, config_name="import_weights")
