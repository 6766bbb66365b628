"""Examine a data set before training on it: annotations, images, splits, anchors. Lists every fault with a remedy.

python tools/doctor.py data.root=DIR                  at the input size and with the anchors of recipe=finetune
python tools/doctor.py recipe=demo                    any command line of train.py is understood
python tools/doctor.py data.root=DIR workers=4 out=DIR

Writes doctor.json. Exit code 1 when there are errors, 0 when there are warnings only.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from detector.apps.doctor.examine import examine, format_diagnosis
from detector.data.shapes import ensure_shapes
from detector.data.splits import DataOptions
from detector.errors import InputError
from detector.files import write_json
from detector.training.run import TrainOptions

log = logging.getLogger(__name__)
# Of the map that the RPN looks at, C4 or the neck's.
RPN_STRIDE = 16


class DoctorOptions(TrainOptions):
    """A training run, whose data is examined."""

    out: str = "doctor"
    """A folder; doctor.json goes there."""


def doctor(options: DoctorOptions) -> None:
    """Examine the data set, and say what is wrong. Exit code 1 where there are errors.

    Raises:
        InputError: there is no data set.
    """
    diagnosis = examine(
        locate_splits(options.data),
        preprocessing=options.input,
        anchors=options.rpn.model_dump(include={"scales", "ratios", "foreground_iou"}) | {"stride": RPN_STRIDE},
        workers=options.workers,
    )
    out = Path(options.out) / "doctor.json"
    write_json(out, diagnosis.to_dict())
    log.info("%s\n%s", format_diagnosis(diagnosis), out)
    if diagnosis.counts["error"]:
        sys.exit(1)


def locate_splits(data: DataOptions) -> dict[str, tuple[Path, Path]]:
    """Annotation file and image folder of each split; makes the embedded data set where it is asked for."""
    if not data.root:
        raise InputError(
            "data.root is not set: give the folder of your data set, data.root=DIR, holding images/ and "
            "annotations/train.json and annotations/val.json, or use recipe=demo."
        )
    root = Path(data.root)
    if data.generate:
        ensure_shapes(root, **data.generate.to_dict())
    if not root.is_dir():
        raise InputError(f"{root}: no such folder (looked in '{root.resolve()}'); check data.root.")
    splits = {"train": data.train, "val": data.val}
    return {name: (root / split.annotations, root / split.images) for name, split in splits.items()}
