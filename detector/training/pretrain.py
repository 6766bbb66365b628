"""Pre-train a backbone as an image classifier.

python tools/pretrain.py backbone=v2_1x data.root=DIR       DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, the ImageNet
                                                            recipe of the ShuffleNet V2 paper
python tools/pretrain.py backbone=v2_0.5x pretrain=crops    embedded data, minutes on a CPU
python tools/pretrain.py ckpt=RUN_DIR/last.ckpt resume=true go on where a run stopped

RUN_DIR/best.pth is what tools/train.py takes as backbone.weights=PATH. Run on CPUs, in one process and in two, and in
bf16-mixed; not yet on a GPU, and not on ImageNet.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from detector.data.crops import CropsOptions, ensure_crops
from detector.data.image_folder import (
    LAYOUT,
    ImageFolder,
    PretrainAugment,
    PretrainInput,
    check_same_classes,
    eval_view,
    train_view,
)
from detector.errors import InputError
from detector.inference.detector import read_torch_file
from detector.models.backbones import AnyBackboneOptions
from detector.models.backbones.classifier import ImageClassifier, build_classifier
from detector.models.backbones.contract import ClassifierOptions
from detector.models.backbones.pretrained import load_weights
from detector.models.backbones.shufflenet_v2 import ShuffleNetV2Options
from detector.options import BelowOne, Flag, Natural, Options, typed
from detector.training.checkpoints import CheckpointFiles
from detector.training.classification import ClassificationTask
from detector.training.data_module import ClassificationData
from detector.training.run_directory import is_first_process
from detector.training.run_options import RunOptions, TrainBatchOptions, ValidationOptions, provenance
from detector.training.schedule import OptimizerOptions, ScheduleOptions
from detector.training.trainer import begin, fit, without_traces

log = logging.getLogger(__name__)

FORMAT = "light-head-classifier"
VERSION = 1


class PretrainData(Options):
    """A folder of images, a folder for each class."""

    root: str | None = None
    """DIR/train/CLASS/*, DIR/val/CLASS/*"""
    train: str = Field(default="train", min_length=1)
    """folder of the training split in it"""
    val: str = Field(default="val", min_length=1)
    """folder of the validation split in it"""
    generate: CropsOptions | None = None
    """cut the embedded data set out of drawn scenes, there"""


class PretrainOptions(RunOptions):
    """A pre-training run; the defaults are ImageNet as Ma et al. 2018 trained on it.

    They did "exactly the same" as Zhang et al. 2018 (ShuffleNet, section 4), called V1 here; "code" is their released
    code, github.com/megvii-model/ShuffleNet-Series. Never run on ImageNet by this project.
    """

    run_dir: str | None = None
    """null: runs/pretrain/<file of conf/pretrain/>/<backbone>/<time>"""
    ckpt: str | None = None
    """with resume=true: RUN_DIR/last.ckpt"""
    resume: Flag = False
    """go on with that run, as configured then"""
    backbone: AnyBackboneOptions = ShuffleNetV2Options()
    """what is trained; `name` chooses the family"""
    weights: str | None = None
    """weights of the backbone to start from: a path, or imagenet; null: backbone.weights"""
    workers: Natural = 8
    """loader processes per device; 0 loads in the training process"""
    label_smoothing: BelowOne = 0.1
    """share of the target that all classes have together (code); scored without"""
    data: PretrainData = PretrainData()
    input: PretrainInput = PretrainInput()
    train: TrainBatchOptions = TrainBatchOptions(batch_size=256)  # V1: 1024 on 4 GPUs
    val: ValidationOptions = ValidationOptions(batch_size=256)
    augment: PretrainAugment = PretrainAugment()
    # V1: from 0.5 at 1024 images a step to 0, linearly, in 300,000 steps: 240 epochs of ImageNet.
    optimizer: OptimizerOptions = OptimizerOptions(lr=0.5, base_batch=1024, weight_decay=4e-5, lr_scales=None)
    schedule: ScheduleOptions = ScheduleOptions(
        kind="linear", images=307_200_000, milestones=(), warmup_steps=0, warmup_factor=1.0
    )

    @model_validator(mode="after")
    def _ckpt_is_for_resume(self) -> Self:
        if self.ckpt and not self.resume:
            raise InputError("ckpt is for resume=true; to start from the weights of a backbone, give weights=PATH.")
        return self


@without_traces()
def pretrain(options: PretrainOptions, make: Callable[[int], nn.Module] | None = None) -> Path:
    """Train a classifier. Returns the run directory.

    Args:
        options: of the run.
        make: another network than that of options.backbone, from the number of classes; float images (N, 3, H, W) ->
            logits. A run of it cannot go on, and begins no detector.

    Raises:
        InputError: something in the options, the data or the checkpoint is wrong.
    """
    options, checkpoint = begin(options, entry=ClassificationTask.entry, read=read_classifier, group="pretrain")
    train, val = load_splits(options)
    task = ClassificationTask(
        _new_network(options, len(train.classes)) if make is None else make(len(train.classes)),
        _describe(options, train.classes) | ({} if make is None else {"spec": {}}),
        optimizer=options.optimizer,
        schedule=options.schedule,
        label_smoothing=options.label_smoothing,
    )
    counts = len(train), len(val), len(train.classes), options.schedule.epochs_for(len(train))
    log.info("%d training and %d validation images of %d classes, %d epochs", *counts)
    run_dir = fit(
        options, checkpoint, task, ClassificationData(train, val, options), Path("runs/pretrain"), classifier_weights
    )
    best = run_dir / "best.pth"
    if is_first_process() and not best.exists():  # a resumed run came without it
        CheckpointFiles().save_checkpoint(classifier_weights(read_classifier(run_dir / "best.ckpt")), best)
    if make is None:
        log.info("A detector on this backbone:\n%s", next_command(options, run_dir))
    return run_dir


def load_splits(options: PretrainOptions) -> tuple[ImageFolder, ImageFolder]:
    """Training and validation split; makes the embedded data set where it is asked for and missing.

    Args:
        options: their data, input, augment and seed are read.

    Raises:
        InputError: no data is given, or it is not as `ImageFolder` wants it.
    """
    data = options.data
    if not data.root:
        raise InputError(f"data.root is not set: give {LAYOUT}, or use pretrain=crops, which needs no data.")
    root = Path(data.root)
    if data.generate:
        ensure_crops(root, **data.generate.to_dict())
    train = ImageFolder(root / data.train, train_view(options.input.size, options.augment), options.seed)
    val = ImageFolder(root / data.val, eval_view(options.input), options.seed)
    check_same_classes(train, val)
    return train, val


def read_classifier(path: str | Path) -> dict[str, Any]:
    """A checkpoint of pre-training as plain data.

    Raises:
        InputError: missing, damaged, of something else or of a newer version.
    """
    checkpoint = read_torch_file(path)
    about = checkpoint.get(ClassificationTask.entry) if isinstance(checkpoint, dict) else None
    if (
        not isinstance(about, dict)
        or about.get("format") != FORMAT
        or about.get("version") != VERSION
        or not about.get("spec")  # a network that `pretrain` was given
    ):
        raise InputError(
            f"'{path}' is a torch file, but not a checkpoint that tools/pretrain.py of this version wrote. Weights to "
            "start from are given as weights=PATH."
        )
    return checkpoint


def classifier_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The backbone's tensors by their names there, and those of conv5 and fc: the names of torchvision's files."""
    return {
        name.removeprefix("network.").removeprefix("backbone."): value
        for name, value in checkpoint["state_dict"].items()
    }


def next_command(options: RunOptions, run_dir: Path) -> str:
    """The command line that trains a detector from this run's weights."""
    # The same architecture; what stands on top of the backbone, and where it started, is no part of it.
    changes = [
        shlex.quote(override)
        for override in options.overrides
        if override.startswith("backbone.")
        and override.split(".")[1].partition("=")[0] not in ("weights", "classifier")
    ]
    words = [f"backbone={options.backbone_name}", *changes, typed("backbone.weights", str(run_dir / "best.pth"))]
    return f"python tools/train.py recipe=finetune {' '.join(words)} data.root=DIR"


def _describe(options: PretrainOptions, class_names: list[str]) -> dict[str, Any]:
    """Everything but the weights, in plain types: the `classifier` entry of a checkpoint."""
    backbone, classifier = options.backbone, options.backbone.classifier or ClassifierOptions()
    return {
        "format": FORMAT,
        "version": VERSION,
        "spec": {"backbone": backbone.spec(), "classifier": classifier.to_dict()},
        "class_names": list(class_names),
        "provenance": provenance(options),
    }


def _new_network(options: PretrainOptions, num_classes: int) -> ImageClassifier:
    network = build_classifier(options.backbone, num_classes)
    weights = options.weights or options.backbone.weights
    if weights and not options.resume:
        log.info("%s", load_weights(network.backbone, weights))
    return network.to(memory_format=torch.channels_last)
