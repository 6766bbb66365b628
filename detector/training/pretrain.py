"""Pre-training a backbone as an image classifier, from plain configuration.

Run on CPUs, in one process and in two, and in bf16-mixed; not yet on a GPU, and not on ImageNet.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from detector.data.crops import ensure_crops
from detector.data.image_folder import LAYOUT, ImageFolder, check_same_classes, eval_view, train_view
from detector.errors import InputError
from detector.files import replacing
from detector.inference.detector import read_torch_file
from detector.models.backbones import arguments_of
from detector.models.backbones.classifier import ImageClassifier, build_classifier
from detector.models.backbones.pretrained import load_weights
from detector.training.callbacks import FirstBatchPicture, History
from detector.training.classification import LOSSES, METRICS, ClassificationTask, draw_images
from detector.training.data_module import ClassificationData
from detector.training.resume import check_can_go_on, checked_config
from detector.training.schedule import OptimizerSettings, ScheduleSettings
from detector.training.trainer import build_trainer, devices, ranks_end_together, run_directory

log = logging.getLogger(__name__)

FORMAT = "light-head-classifier"
VERSION = 1
ENTRY = "classifier"  # of a checkpoint
PREFIX = "network."


def pretrain(config: Mapping[str, Any]) -> Path:
    """Train a classifier as conf/pretrain.yaml describes it. Returns the run directory.

    Raises:
        InputError: something in the configuration, the data or the checkpoint is wrong.
    """
    if config["ckpt"] and not config["resume"]:
        raise InputError("ckpt is for resume=true; to start from the weights of a backbone, give weights=PATH.")
    config, checkpoint = checked_config(config, read=read_classifier, entry=ENTRY, group="pretrain")
    lightning.seed_everything(config["seed"] + (checkpoint["global_step"] if checkpoint else 0), verbose=False)
    device_arguments = devices(config)
    train, val = load_splits(config)
    schedule = ScheduleSettings(**config["schedule"])
    epochs = schedule.epochs_for(len(train))
    about = _describe(config, train.classes)
    if checkpoint:
        check_can_go_on(config["ckpt"], checkpoint, about, epochs, entry=ENTRY)
    task = ClassificationTask(
        _new_network(config, len(train.classes)),
        about,
        optimizer=OptimizerSettings(**config["optimizer"]),
        schedule=schedule,
        label_smoothing=config["label_smoothing"],
    )
    data = ClassificationData(
        train=train,
        val=val,
        train_batch_size=config["train"]["batch_size"],
        val_batch_size=config["val"]["batch_size"],
        workers=config["workers"],
        seed=config["seed"],
    )
    run_dir = run_directory(config, Path("runs/pretrain"))  # last: a mistake above leaves no empty folder
    trainer = build_trainer(
        config,
        device_arguments,
        run_dir,
        epochs=epochs,
        best=BestWeights(run_dir),
        history=History(
            run_dir, every=config["trainer"]["log_every"], losses=LOSSES, metrics=METRICS, shown=METRICS[:2]
        ),
        picture=FirstBatchPicture(run_dir, lambda batch: draw_images(batch, train.classes)),
    )
    if trainer.is_global_zero:
        log.info(
            "%d training and %d validation pictures of %d classes, %d epochs",
            len(train), len(val), len(train.classes), epochs,
        )  # fmt: skip
    with ranks_end_together(trainer), logging_redirect_tqdm():
        trainer.fit(task, data, ckpt_path=config["ckpt"] if checkpoint else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        log.info("last epoch: top-1 %.4f, top-5 %.4f", task.figures["top1"], task.figures["top5"])
        log.info(
            "best.pth, best.ckpt, last.ckpt, metrics.csv, metrics.json, curves.png, train_batch.png in %s", run_dir
        )
        log.info("A detector on this backbone:\n%s", next_command(config, run_dir))
    return run_dir


class BestWeights(ModelCheckpoint):
    """best.ckpt, as Lightning keeps it, and best.pth: the same weights alone, as `backbone.weights` takes them."""

    def __init__(self, run_dir: Path) -> None:
        # No metric in the file name: '=' in a name could not be given on the command line as ckpt=...
        super().__init__(
            run_dir, filename="best", monitor=METRICS[0], mode="max", save_last=False, enable_version_counter=False
        )
        self.weights = run_dir / "best.pth"
        self.written: Tensor | None = None  # the score of what best.pth holds

    # Which of the two hooks keeps the checkpoint is Lightning's choice.
    def on_validation_end(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        super().on_validation_end(trainer, task)
        self._follow(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        super().on_train_epoch_end(trainer, task)
        self._follow(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.written = self.best_model_score

    def _follow(self, trainer: lightning.Trainer) -> None:
        score = self.best_model_score
        if trainer.is_global_zero and score is not None and (self.written is None or score != self.written):
            with replacing(self.weights) as partial:
                torch.save(classifier_weights(read_classifier(self.best_model_path)), partial)
        self.written = score


def load_splits(config: Mapping[str, Any]) -> tuple[ImageFolder, ImageFolder]:
    """Training and validation split; makes the embedded data set where it is asked for and missing.

    Args:
        config: its nodes data, input, augment and seed are read.

    Raises:
        InputError: no data is given, or it is not as `ImageFolder` wants it.
    """
    data, size = config["data"], config["input"]["size"]
    if not data["root"]:
        raise InputError(f"data.root is not set: give {LAYOUT}, or use pretrain=crops, which needs no data.")
    views = train_view(size=size, **config["augment"]), eval_view(size=size, resize=config["input"]["resize"])
    root = Path(str(data["root"]))
    if data["generate"]:
        ensure_crops(root, **data["generate"])
    train, val = (
        ImageFolder(root / str(data[split]), view, config["seed"])
        for split, view in zip(("train", "val"), views, strict=True)
    )
    check_same_classes(train, val)
    return train, val


def read_classifier(path: str | Path) -> dict[str, Any]:
    """A checkpoint of pre-training as plain data.

    Raises:
        InputError: missing, damaged, of something else or of a newer version.
    """
    checkpoint = read_torch_file(path)
    about = checkpoint.get(ENTRY) if isinstance(checkpoint, dict) else None
    if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("version") != VERSION:
        raise InputError(
            f"'{path}' is a torch file, but not a checkpoint that tools/pretrain.py of this version wrote. Weights to "
            "start from are given as weights=PATH."
        )
    return checkpoint


def classifier_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The backbone's tensors by their names there, and those of conv5 and fc: the names of torchvision's files."""
    names = {name: name.removeprefix(PREFIX).removeprefix("backbone.") for name in checkpoint["state_dict"]}
    return {names[name]: value for name, value in checkpoint["state_dict"].items()}


def next_command(config: Mapping[str, Any], run_dir: Path) -> str:
    """The command line that trains a detector from this run's weights."""
    # The same architecture; what stands on top of the backbone, and where it started, is no part of it.
    changes = [
        override
        for override in config["overrides"]
        if override.startswith("backbone.")
        and override.split(".")[1].partition("=")[0] not in ("weights", "classifier")
    ]
    words = (
        "python tools/train.py recipe=finetune", f"backbone={config['backbone_name']}", *changes,
        f"backbone.weights={run_dir / 'best.pth'}", "data.root=DIR",
    )  # fmt: skip
    return " ".join(words)


def _describe(config: Mapping[str, Any], class_names: list[str]) -> dict[str, Any]:
    """Everything but the weights, in plain types: the `classifier` entry of a checkpoint."""
    backbone = config["backbone"]
    return {
        "format": FORMAT,
        "version": VERSION,
        "spec": {"backbone": arguments_of(backbone), "classifier": backbone["classifier"]},
        "class_names": list(class_names),
        "provenance": {
            "config": dict(config),
            "torch": str(torch.__version__),
            "created": datetime.now().isoformat(timespec="seconds"),
        },
    }


def _new_network(config: Mapping[str, Any], num_classes: int) -> ImageClassifier:
    entry = config["backbone"]
    network = build_classifier(entry, num_classes)
    if entry["weights"] and not config["resume"]:
        log.info("%s", load_weights(network.backbone, str(entry["weights"])))
    return network.to(memory_format=torch.channels_last)
