"""Turn a file of pre-trained weights into one for a backbone here, and say what became of every tensor.

python tools/import_weights.py source=ShuffleNetV2.1.0x.pth.tar backbone=v2_1x backbone.layout=paper out=v2_1x.pth
python tools/import_weights.py source=shufflenetv2_x1-5666bf0f80.pth backbone=v2star_1x out=v2star_1x.pth
python tools/train.py backbone=v2_1x backbone.layout=paper backbone.weights=v2_1x.pth

The names in the file tell whose it is: torchvision's, timm's, this project's, or ShuffleNet V2's authors' (who train on
BGR in 0-255; their 1x, 1.5x and 2x need backbone.layout=paper). The result keeps the classifier as conv5.* and fc.*.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Literal

import torch

from detector.errors import InputError
from detector.evaluation.tables import markdown_table
from detector.files import check_not_read, check_writable, replacing
from detector.models.backbones import AnyBackboneOptions, build_backbone
from detector.models.backbones.pretrained import WeightsReport, load_weights
from detector.models.backbones.shufflenet_v2 import ShuffleNetV2Options
from detector.options import Flag, Options

log = logging.getLogger(__name__)


class ImportOptions(Options):
    """Which file, for which backbone."""

    source: str
    """A file of torchvision, of timm, of ShuffleNet V2's authors, or of this project; or imagenet."""
    out: str
    """What backbone.weights=OUT takes."""
    backbone: AnyBackboneOptions = ShuffleNetV2Options()
    """What the weights are for; `name` chooses the family."""
    input: Literal["rgb_imagenet", "bgr255"] | None = None
    """What they were trained on; null: bgr255 for the authors' files, else rgb_imagenet."""
    partial: Flag = False
    """Load what fits and leave the rest at random."""


def import_weights(options: ImportOptions) -> None:
    """Write the file.

    Raises:
        InputError: there is no such file, it does not fit and `partial` is not asked for, or it is `out` itself.
    """
    check_not_read(options.out, options.source)
    check_writable(options.out, file=True)
    backbone = build_backbone(options.backbone)
    report = load_weights(backbone, options.source, input_frame=options.input, partial=True)
    log.info("%s: %s\n\n%s", report.source, report.format, describe(report))
    if report.problems and not options.partial:
        raise InputError(
            f"source={options.source}: {len(report.problems)} tensors do not fit this backbone, see above; nothing is "
            "written. Choose the backbone, width and layout of the file, or load what fits with partial=true."
        )
    with replacing(options.out) as partial:
        torch.save({**backbone.state_dict(), **report.classifier}, partial)
    log.info("%s: use it with backbone.weights=%s", options.out, options.out)


def describe(report: WeightsReport) -> str:
    """A table of what became of the tensors."""
    kinds = {
        "matched": report.matched,
        "ignored (classifier)": report.ignored,
        "start as the identity": report.kept,
        "start at random": report.random,
    }
    rows = [(str(len(names)), kind, modules(names)) for kind, names in kinds.items() if names]
    rows += [("1", "does not fit", phrase) for phrase in report.problems]
    table = markdown_table(("tensors", "", "which"), rows, align="rll", width=None)
    return f"{table}\n\ninput: {report.input_frame}, {len(report.classifier)} tensors of a classifier kept"


def modules(names: tuple[str, ...]) -> str:
    """The modules that they belong to, two levels deep, with the number of tensors of each."""
    counts = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(f"{module} ({count})" for module, count in counts.items())
