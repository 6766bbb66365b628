"""Examine a data set before training on it: annotations, images, splits, anchors. Lists the faults, with a remedy each.

python tools/doctor.py data.root=DIR                  at the input size and with the anchors of recipe=finetune
python tools/doctor.py recipe=demo                    any command line of train.py is understood
python tools/doctor.py data.root=DIR workers=4 out=DIR

Writes doctor.json, which names up to 1,000 entries of each kind; the terminal has the first five of them. Exit code 1
when there are errors, 0 when there are warnings only.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from detector.apps.doctor.examine import examine, format_diagnosis
from detector.data.image_files import match_files
from detector.data.splits import read_splits
from detector.errors import InputError
from detector.files import check_writable, write_json
from detector.models.build import build_network
from detector.training.run import TrainOptions
from detector.training.warm_start import find_start

log = logging.getLogger(__name__)


class DoctorOptions(TrainOptions):
    """A training run, whose data is examined."""

    out: str = "doctor"
    """A folder; doctor.json goes there."""


def doctor(options: DoctorOptions) -> None:
    """Examine the data set, and say what is wrong. Exit code 1 where there are errors.

    Raises:
        InputError: there is no data set, or `ckpt` is no start.
    """
    if not (root := options.data.prepared()).is_dir():
        raise InputError(f"{root}: no such folder (looked in '{root.resolve()}'); check data.root.")
    options, _ = find_start(options)
    stride = build_network(options, num_classes=1).rpn.anchors.stride
    splits = {split: match_files(index, options.data.exif_boxes) for split, index in read_splits(options.data).items()}
    out = Path(options.out) / "doctor.json"
    check_writable(out.parent)
    diagnosis = examine(
        splits,
        preprocessing=options.input,
        anchors=(options.rpn, stride),
        workers=options.workers,
    )
    log.info("%s", format_diagnosis(diagnosis))
    write_json(out, diagnosis.to_dict())
    log.info("%s", out)
    if diagnosis.counts["error"]:
        sys.exit(1)
