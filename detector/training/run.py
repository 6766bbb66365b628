"""Train a detector.

python tools/train.py backbone=v2_1x                            the embedded data set, minutes on a CPU
python tools/train.py recipe=finetune data.root=DIR             your folder, from a detector of this package
python tools/train.py recipe=finetune data.root=DIR ckpt=PATH   from another one; ckpt=null: ImageNet weights
python tools/train.py recipe=voc data.root=DIR                  Pascal VOC, as docs/weights.md says
python tools/train.py recipe=paper backbone=v2star_1x           a cell of the ShuffleNet V2 paper's table 7, on COCO
python tools/train.py ckpt=RUN_DIR/last.ckpt resume=true        go on where a run stopped
python tools/train.py trainer.devices=2 trainer.accelerator=cpu data parallel
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from detector.data.preprocess import Preprocessing
from detector.data.split_checks import refuse_pointless
from detector.data.splits import DataOptions, load_splits
from detector.data.transforms import AugmentOptions, TrainTransform
from detector.errors import InputError
from detector.inference.detector import Detector, read_checkpoint
from detector.inference.operating_point import OperatingPoint
from detector.inference.shipped import find
from detector.models.backbones.pretrained import load_weights
from detector.models.build import NetworkOptions
from detector.models.weights import first_three
from detector.training.run_options import FreezeOptions, RunOptions, provenance
from detector.training.teacher import Teacher
from detector.training.warm_start import find_start, matched, warm_start

log = logging.getLogger(__name__)


class TrainOptions(NetworkOptions, RunOptions):
    """A training run; the defaults are the recipe of Li et al. 2017 as Ma et al. 2018, table 7, uses it."""

    ckpt: str | None = None
    """start from this detector: a file, the name of one of this package, or auto, its detector of this backbone ..."""
    data: DataOptions = DataOptions()
    input: Preprocessing = Preprocessing()
    augment: AugmentOptions = AugmentOptions()
    freeze: FreezeOptions = FreezeOptions()
    teacher: str | None = None
    """a more able detector of the same classes, to be imitated: a file, or the name of one of this package"""
    calibrate: str = "auto"
    """what scores are worth: auto, found on the validation split; none; or as in this checkpoint of the same classes"""


def train(options: TrainOptions) -> Path:
    """Train a detector. Returns the run directory.

    Raises:
        InputError: something in the options, the data or the checkpoint is wrong.
    """
    # Lightning takes seconds to import, which --help, a misspelt key and tools/doctor.py need not wait for.
    from detector.training.trainer import without_traces

    with without_traces():
        return _train(options)


def _train(options: TrainOptions) -> Path:
    from detector.training.data_module import DetectionData
    from detector.training.resume import classes_of_run
    from detector.training.task import DetectionTask
    from detector.training.trainer import begin, fit

    options, checkpoint = begin(options, entry=DetectionTask.entry, read=read_checkpoint, group="recipe")
    options, start = find_start(options)
    options = _free_what_is_random(options, start)
    refuse_pointless(splits := load_splits(options.data))
    train_index, val_index = splits["train"], splits["val"]
    if checkpoint:
        names = classes_of_run(checkpoint["detector"].get("class_names"), train_index.class_names)
        train_index, val_index = train_index.in_order(names), val_index.in_order(names)
    point = _operating_point(options.calibrate, train_index.class_names, checkpoint)
    task = DetectionTask(
        _new_detector(options, train_index.class_names, start, point),
        val_index,
        optimizer=options.optimizer,
        schedule=options.schedule,
        freeze=options.freeze,
        calibrate=options.calibrate == "auto",
        teach=_teacher(options, train_index.class_names),
    )
    transform = TrainTransform(options.input, options.augment, seed=options.seed)
    data = DetectionData(
        val_index, options.input, options, train=train_index, transform=transform, cache=options.data.cache
    )
    return fit(options, checkpoint, task, data)


def _free_what_is_random(options: TrainOptions, start: Detector | None) -> TrainOptions:
    """Nothing stays frozen, or learns at a part of the rate, that has learnt nothing yet.

    A backbone at random is no network without its statistics. Factors that the command line gives stay.
    """
    if start or options.resume or options.backbone.weights:
        return options
    nothing, optimizer = FreezeOptions(stages=0, batch_norm=False), options.optimizer
    if not any(word.startswith("optimizer.lr_scales") for word in options.overrides):
        scales = {name: scale for name, scale in (optimizer.lr_scales or {}).items() if not name.startswith("backbone")}
        optimizer = optimizer.model_copy(update={"lr_scales": scales or None})
    if (options.freeze, options.optimizer) != (nothing, optimizer):
        log.info("backbone: nothing of it is frozen, or has less than the full rate, because it starts at random")
    return options.model_copy(update={"freeze": nothing, "optimizer": optimizer})


def _new_detector(
    options: TrainOptions, class_names: Sequence[str], start: Detector | None, point: OperatingPoint
) -> Detector:
    detector = Detector(options, class_names, options.input, provenance(options), point)
    if start:
        log.info("\nweights of %s\n\n%s\n", options.ckpt, warm_start(detector, start))
    elif options.backbone.weights and not options.resume:
        log.info("%s", load_weights(detector.network.backbone, options.backbone.weights))
    detector.network.to(memory_format=torch.channels_last)
    return detector


def _teacher(options: TrainOptions, class_names: Sequence[str]) -> Teacher | None:
    """
    Raises:
        InputError: it cannot teach these classes, or this run would overwrite it.
    """
    if not options.teacher:
        return None
    if options.run_dir and Path(options.run_dir).resolve() == Path(options.teacher).resolve().parent:
        raise InputError(
            f"teacher={options.teacher} lies in run_dir={options.run_dir}, where this run writes. "
            "Choose another run_dir."
        )
    return Teacher(options.teacher, class_names)


def _operating_point(
    calibrate: str, class_names: Sequence[str], checkpoint: Mapping[str, Any] | None = None
) -> OperatingPoint:
    """What a run begins with: nothing, or what another detector knows of its scores, in the order of these classes.

    Args:
        calibrate: see TrainOptions.
        class_names: of the run.
        checkpoint: that the run goes on from, in the same order; what it was told of its scores is in there.

    Raises:
        InputError: there is no other one, it was not scored, or it does not know all classes.
    """
    if calibrate in ("auto", "none"):
        return OperatingPoint()
    if checkpoint and checkpoint["detector"]["provenance"]["config"].get("calibrate") == calibrate:
        return OperatingPoint.parse(checkpoint["detector"]["operating_point"]).check(len(class_names))
    try:
        other = Detector.load(find(calibrate), "cpu", fused=False)
    except InputError as error:
        raise InputError(f"calibrate={calibrate}: {error}") from error
    point, labels = other.operating_point, matched(class_names, other.class_names)
    unknown = [name for name, label in zip(class_names, labels, strict=True) if label is None]
    if unknown or point == OperatingPoint():
        what = f"it does not know {first_three(unknown)}" if unknown else "it knows nothing of its scores"
        raise InputError(
            f"calibrate={calibrate}: {what}. Give a checkpoint that was scored on these classes, auto or none."
        )
    thresholds = point.thresholds and tuple(point.thresholds[label] for label in labels if label is not None)
    return point.model_copy(update={"thresholds": thresholds})
