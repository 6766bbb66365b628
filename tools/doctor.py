"""Examine a data set before training on it: annotations, pictures, splits, anchors. Lists every fault with a remedy.

python tools/doctor.py data.root=DIR                  at the input size and with the anchors of recipe=finetune
python tools/doctor.py recipe=demo                    any command line of train.py is understood
python tools/doctor.py data.root=DIR workers=4 out=DIR

Writes doctor.json. Exit code 1 when there are errors, 0 when there are warnings only.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import launch, plain

from omegaconf import DictConfig

from detector.apps.doctor.examine import examine, format_diagnosis
from detector.data.preprocess import Preprocessing
from detector.data.shapes import ensure_shapes
from detector.errors import InputError
from detector.files import write_json
from detector.training.run import TrainOptions

log = logging.getLogger(__name__)
# Of the map that the RPN looks at, C4 or the neck's.
RPN_STRIDE = 16


def main(config: DictConfig) -> None:
    values = plain(config)
    out = Path(str(values.pop("out"))) / "doctor.json"
    values = TrainOptions.parse(values).to_dict()
    rpn = values["rpn"]
    diagnosis = examine(
        locate_splits(values["data"]),
        preprocessing=Preprocessing.parse(values["input"], "input"),
        anchors={key: rpn[key] for key in ("scales", "ratios", "foreground_iou")} | {"stride": RPN_STRIDE},
        workers=values["workers"],
    )
    write_json(out, diagnosis.to_dict())
    log.info("%s\n%s", format_diagnosis(diagnosis), out)
    if diagnosis.counts["error"]:
        sys.exit(1)


def locate_splits(data: Mapping[str, Any]) -> dict[str, tuple[Path, Path]]:
    """Annotation file and picture folder of each split; makes the embedded data set where it is asked for."""
    if not data["root"]:
        raise InputError(
            "data.root is not set: give the folder of your data set, data.root=DIR, holding images/ and "
            "annotations/train.json and annotations/val.json, or use recipe=demo."
        )
    root = Path(str(data["root"]))
    if data["generate"]:
        ensure_shapes(root, **data["generate"])
    if not root.is_dir():
        raise InputError(f"{root}: no such folder (looked in '{root.resolve()}'); check data.root.")
    return {split: (root / data[split]["annotations"], root / data[split]["images"]) for split in ("train", "val")}


if __name__ == "__main__":
    launch(main, config_name="doctor")
