"""A training run, from plain configuration: where the parts of training meet."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tqdm.contrib.logging import logging_redirect_tqdm

from detector.data.coco import CocoIndex
from detector.data.preprocess import Preprocessing
from detector.data.splits import load_split
from detector.data.transforms import TrainTransform
from detector.errors import InputError
from detector.evaluation.metrics import format_table
from detector.inference.detector import Detector, read_checkpoint
from detector.models.backbones import arguments_of
from detector.models.backbones.pretrained import load_weights
from detector.training.callbacks import FirstBatchPicture, History
from detector.training.data_module import DetectionData
from detector.training.plots import draw_batch
from detector.training.resume import check_can_go_on, checked_config
from detector.training.schedule import OptimizerSettings, ScheduleSettings
from detector.training.task import DetectionTask, load_pretrained
from detector.training.trainer import (
    build_trainer,
    devices,
    ranks_end_together,
    run_directory,
)

log = logging.getLogger(__name__)


def train(config: Mapping[str, Any]) -> Path:
    """Train a detector as conf/train.yaml describes it. Returns the run directory.

    Raises:
        InputError: something in the configuration, the data or the checkpoint is wrong.
    """
    config, checkpoint = checked_config(config)
    # Not the draws of the first epochs once more where a run goes on.
    lightning.seed_everything(config["seed"] + (checkpoint["global_step"] if checkpoint else 0), verbose=False)
    device_arguments = devices(config)
    train_index, val_index = load_split(config["data"], "train"), load_split(config["data"], "val")
    if train_index.class_names != val_index.class_names:
        raise InputError(
            f"The classes of the training split {list(train_index.class_names)} and the validation split "
            f"{list(val_index.class_names)} differ; both files must declare the same categories."
        )
    detector = _new_detector(config, train_index)
    data = data_module(config, detector.preprocessing, train_index, val_index)
    task = _new_task(config, detector, val_index)
    assert task.schedule is not None
    epochs = task.schedule.epochs_for(len(train_index))
    if checkpoint:
        check_can_go_on(config["ckpt"], checkpoint, detector.describe(), epochs)
    run_dir = run_directory(config)  # last: a mistake above leaves no empty folder
    trainer = _trainer(config, device_arguments, run_dir, task, epochs)
    with ranks_end_together(trainer), logging_redirect_tqdm():
        trainer.fit(task, data, ckpt_path=config["ckpt"] if checkpoint else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        log.info("\n%s\n", format_table(task.figures, f"{val_index.annotation_file}, last epoch"))
        log.info("best.ckpt, last.ckpt, metrics.csv, metrics.json, curves.png, train_batch.png in %s", run_dir)
    return run_dir


def _new_detector(config: Mapping[str, Any], index: CocoIndex) -> Detector:
    spec = {"backbone": arguments_of(config["backbone"])} | {key: config[key] for key in ("neck", "rpn", "light_head")}
    provenance = {
        "config": dict(config),
        "torch": str(torch.__version__),
        "created": datetime.now().isoformat(timespec="seconds"),
    }
    detector = Detector(spec, index.class_names, Preprocessing.parse(config["input"], "input"), provenance)
    if config["ckpt"] and not config["resume"]:
        random = load_pretrained(detector, read_checkpoint(config["ckpt"]))
        log.info("weights from %s; %d tensors start at random", config["ckpt"], len(random))
    elif config["backbone"]["weights"] and not config["resume"]:
        log.info("%s", load_weights(detector.network.backbone, config["backbone"]["weights"]))
    detector.network.to(memory_format=torch.channels_last)
    return detector


def _new_task(config: Mapping[str, Any], detector: Detector, val_index: CocoIndex) -> DetectionTask:
    task = DetectionTask(
        detector,
        optimizer=OptimizerSettings(**config["optimizer"]),
        schedule=ScheduleSettings(**config["schedule"]),
        freeze_stages=config["freeze"]["stages"],
        freeze_batch_norm=config["freeze"]["batch_norm"],
    )
    task.val_index = val_index
    return task


def data_module(
    config: Mapping[str, Any], preprocessing: Preprocessing, train: CocoIndex | None, val: CocoIndex
) -> DetectionData:
    transform = TrainTransform(preprocessing, **config["augment"], seed=config["seed"]) if train is not None else None
    return DetectionData(
        train=train,
        val=val,
        preprocessing=preprocessing,
        transform=transform,
        train_batch_size=config["train"]["batch_size"] if train is not None else 1,
        val_batch_size=config["val"]["batch_size"],
        seed=config.get("seed", 0),
        workers=config["workers"],
        cache=config["data"].get("cache", False),
    )


def _trainer(
    config: Mapping[str, Any], device_arguments: Mapping[str, Any], run_dir: Path, task: DetectionTask, epochs: int
) -> lightning.Trainer:
    names = task.detector.class_names
    return build_trainer(
        config,
        device_arguments,
        run_dir,
        epochs=epochs,
        # No metric in the file names: '=' in a name could not be given on the command line as ckpt=...
        best=ModelCheckpoint(
            run_dir, filename="best", monitor="AP", mode="max", save_last=False, enable_version_counter=False
        ),
        history=History(run_dir, every=config["trainer"]["log_every"]),
        picture=FirstBatchPicture(run_dir, lambda batch: draw_batch(batch, names)),
    )
