"""A training run and an evaluation run, from plain configuration: where the parts of training meet."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tqdm.contrib.logging import logging_redirect_tqdm

from detector.api import Detector, read_checkpoint
from detector.backbones import arguments_of
from detector.backbones.pretrained import load_weights
from detector.data.coco import CocoIndex, load_coco
from detector.data.shapes import ensure_shapes
from detector.data.transforms import TrainTransform
from detector.deploy.runtime import ExportedDetector, is_export
from detector.errors import InputError
from detector.evaluation.clock import Clock
from detector.evaluation.coco import evaluate as score
from detector.evaluation.coco import format_table, save_metrics
from detector.files import write_json
from detector.preprocess import Preprocessing
from detector.training.callbacks import FirstBatchPicture, History
from detector.training.checks import check_values
from detector.training.data_module import DetectionData
from detector.training.reporting import report_on_checkpoint
from detector.training.resume import check_can_go_on, checked_config
from detector.training.schedule import OptimizerSettings, ScheduleSettings
from detector.training.task import DetectionTask, load_pretrained
from detector.training.timing import PartTimes
from detector.training.trainer import (
    build_trainer,
    check_writable,
    devices,
    is_first_process,
    progress,
    ranks_end_together,
    run_directory,
)
from detector.visualize import draw_batch

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
    data = _data_module(config, detector.preprocessing, train_index, val_index)
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


def evaluate(config: Mapping[str, Any]) -> dict[str, Any]:
    """Score a checkpoint as conf/eval.yaml describes it.

    Writes metrics.json, detections.json and, unless `report` is false, diagnosis.json and report.html.

    Returns:
        COCO's figures, on every rank; other `metrics` are written only.
    """
    clock = Clock()
    check_values(config)
    if not config["ckpt"]:
        raise InputError(
            "ckpt is missing: add ckpt=RUN_DIR/best.ckpt; or results=detections.json annotations=instances.json to "
            "score what another detector found."
        )
    if is_export(config["ckpt"]):
        from detector.training.exported import evaluate_export

        return evaluate_export(config)
    device_arguments = devices(config)
    detector = Detector.load(config["ckpt"], device="cpu")  # Lightning moves it to this process's device
    if config["max_proposals"]:
        rpn = detector.network.rpn
        budget = min(config["max_proposals"], rpn.test_limits.after_nms)
        rpn.test_limits = replace(rpn.test_limits, after_nms=budget)
    data_config = evaluation_data(config, detector)
    index = load_split(data_config, "val", class_names=detector.class_names)
    # Not where other tools look for the detector's figures.
    name = f"eval_{config['max_proposals']}_proposals" if config["max_proposals"] else "eval"
    out = Path(str(config["out"])) if config["out"] else Path(config["ckpt"]).parent / name
    if is_first_process():
        check_writable(out)
    data = _data_module(config, detector.preprocessing, None, index)
    task = DetectionTask(detector)
    task.val_index = index
    times = PartTimes(clock)
    trainer = lightning.Trainer(
        **device_arguments, **progress(config, [times]), logger=False, enable_checkpointing=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=out,
    )  # fmt: skip
    with ranks_end_together(trainer), logging_redirect_tqdm():
        trainer.validate(task, data, verbose=False)
    if trainer.is_global_zero:
        figures = task.figures
        if config["metrics"] != "coco":
            figures = score(task.results, index.annotation_file, image_ids=index.image_ids, metrics=config["metrics"])
            clock.book("metrics")
        write_json(out / "detections.json", task.results)
        save_metrics(figures, out / "metrics.json")
        clock.book("files")
        log.info("\n%s\n", format_table(figures, str(index.annotation_file)))
        log.info("metrics.json, detections.json in %s", out)
        if config["report"]:
            detector.to(trainer.strategy.root_device)  # Lightning has put it back on the CPU
            report_on_checkpoint(out, config, clock, detector, index, task.results, figures, times.seconds_per_image)
    return task.figures


def load_split(data: Mapping[str, Any], split: str, class_names: tuple[str, ...] | None = None) -> CocoIndex:
    """The index of one split; makes the embedded data set where it is asked for and missing.

    Args:
        data: the `data` node of a configuration.
        split: "train" or "val".
        class_names: of a checkpoint; the data set's must be the same.
    """
    if not data["root"]:
        raise InputError(
            "data.root is not set: give the folder of your data set, data.root=DIR, holding images/ and "
            "annotations/train.json and annotations/val.json, or use recipe=demo."
        )
    root = Path(str(data["root"]))
    if data["generate"]:
        ensure_shapes(root, **data["generate"])
    annotations, images = root / data[split]["annotations"], root / data[split]["images"]
    if not annotations.is_file() and data["missing"]:
        raise InputError(f"No {annotations} here (looked in '{root.resolve()}'). {data['missing']}")
    return load_coco(
        annotations, images, keep_empty=data["keep_empty"], class_names=class_names, limit=data[split]["limit"]
    )


def _new_detector(config: Mapping[str, Any], index: CocoIndex) -> Detector:
    spec = {"backbone": arguments_of(config["backbone"])} | {key: config[key] for key in ("neck", "rpn", "light_head")}
    provenance = {
        "config": dict(config),
        "torch": str(torch.__version__),
        "created": datetime.now().isoformat(timespec="seconds"),
    }
    detector = Detector(spec, index.class_names, Preprocessing(**config["input"]), provenance)
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


def _data_module(
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


def evaluation_data(config: Mapping[str, Any], detector: Detector | ExportedDetector) -> dict[str, Any]:
    """The data of the checkpoint's recipe, with what the command line gives instead."""
    recorded = detector.provenance.get("config", {}).get("data")
    given = config["data"]
    if recorded is None and not given["root"]:
        raise InputError("This checkpoint does not say which data it was trained on; give data.root=DIR.")
    data = dict(recorded or {"generate": None, "missing": None, "keep_empty": True})
    if given["root"] and given["root"] != data.get("root"):
        data |= {"root": given["root"], "generate": None, "missing": None}
    val = {"annotations": "annotations/val.json", "images": "images", "limit": None} | dict(data.get("val", {}))
    data["val"] = val | {key: value for key, value in given["val"].items() if value is not None}
    return data


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
