"""Train a detector.

python tools/train.py backbone=v2_1x                            the embedded data set, minutes on a CPU
python tools/train.py recipe=finetune data.root=DIR             your COCO-style folder, from ImageNet weights
python tools/train.py recipe=paper backbone=v2star_1x           a cell of the ShuffleNet V2 paper's table 7, on COCO
python tools/train.py ckpt=RUN_DIR/last.ckpt resume=true        go on where a run stopped
python tools/train.py trainer.devices=2 trainer.accelerator=cpu data parallel
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import lightning
import torch

from detector.data.preprocess import Preprocessing
from detector.data.split_checks import refuse_pointless
from detector.data.splits import DataOptions, load_split
from detector.data.transforms import AugmentOptions, TrainTransform
from detector.evaluation.metrics import format_table
from detector.inference.detector import Detector, read_checkpoint
from detector.models.backbones.pretrained import load_weights
from detector.models.build import NetworkOptions
from detector.training.callbacks import FirstBatchImage, History
from detector.training.data_module import DetectionData
from detector.training.plots import draw_batch
from detector.training.resume import check_can_go_on, with_checkpoint
from detector.training.task import DetectionTask, FreezeOptions, load_pretrained
from detector.training.trainer import (
    KeptCheckpoint,
    RunOptions,
    build_trainer,
    check_free,
    devices,
    fit,
    run_directory,
    say_what_was_written,
    without_traces,
)

log = logging.getLogger(__name__)


class TrainOptions(NetworkOptions, RunOptions):
    """A training run; the defaults are the recipe of Li et al. 2017 as Ma et al. 2018, table 7, uses it."""

    data: DataOptions = DataOptions()
    input: Preprocessing = Preprocessing()
    augment: AugmentOptions = AugmentOptions()
    freeze: FreezeOptions = FreezeOptions()


@without_traces()
def train(options: TrainOptions) -> Path:
    """Train a detector. Returns the run directory.

    Raises:
        InputError: something in the options, the data or the checkpoint is wrong.
    """
    check_free(options)
    options, checkpoint = with_checkpoint(options)
    # Not the draws of the first epochs once more where a run goes on.
    lightning.seed_everything(options.seed + (checkpoint["global_step"] if checkpoint else 0), verbose=False)
    device_arguments = devices(options.trainer)
    train_index, val_index = (load_split(options.data, split) for split in ("train", "val"))
    refuse_pointless({"train": train_index, "val": val_index})
    detector = _new_detector(options, train_index.class_names)
    data = DetectionData(
        train=train_index,
        val=val_index,
        preprocessing=options.input,
        transform=TrainTransform(options.input, options.augment, seed=options.seed),
        train_batch_size=options.train.batch_size,
        val_batch_size=options.val.batch_size,
        workers=options.workers,
        cache=options.data.cache,
        seed=options.seed,
    )
    task = DetectionTask(
        detector,
        optimizer=options.optimizer,
        schedule=options.schedule,
        freeze=options.freeze,
    )
    task.val_index = val_index
    epochs = options.schedule.epochs_for(len(train_index))
    if checkpoint:
        check_can_go_on(str(options.ckpt), checkpoint, detector.describe(), epochs)
    run_dir = run_directory(options)  # last: a mistake above leaves no empty folder
    trainer = build_trainer(
        options,
        device_arguments,
        run_dir,
        epochs=epochs,
        best=KeptCheckpoint(run_dir, "AP"),
        history=History(run_dir, every=options.trainer.log_every),
        first_batch=FirstBatchImage(run_dir, lambda batch: draw_batch(batch, detector.class_names)),
    )
    fit(trainer, task, data, options.ckpt if checkpoint else None)
    if trainer.is_global_zero:
        log.info("\n%s\n", format_table(task.metrics, f"{val_index.annotation_file}, last epoch"))
        say_what_was_written(run_dir)
    return run_dir


def _new_detector(options: TrainOptions, class_names: Sequence[str]) -> Detector:
    provenance = {
        "config": options.to_dict(),
        "torch": str(torch.__version__),
        "created": datetime.now().isoformat(timespec="seconds"),
    }
    detector = Detector(options, class_names, options.input, provenance)
    if options.ckpt and not options.resume:
        random = load_pretrained(detector, read_checkpoint(options.ckpt))
        log.info("weights from %s; %d tensors start at random", options.ckpt, len(random))
    elif options.backbone.weights and not options.resume:
        log.info("%s", load_weights(detector.network.backbone, options.backbone.weights))
    detector.network.to(memory_format=torch.channels_last)
    return detector
