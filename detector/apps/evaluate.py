"""Score a checkpoint, and write a report that shows where it errs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
from tqdm.contrib.logging import logging_redirect_tqdm

from detector.apps.report.reporting import report_on_checkpoint
from detector.data.splits import load_split
from detector.errors import InputError
from detector.evaluation.clock import Clock
from detector.evaluation.metrics import evaluate as score
from detector.evaluation.metrics import format_table, save_metrics
from detector.files import write_json
from detector.inference.detector import Detector
from detector.inference.runtime import ExportedDetector, is_export
from detector.training.checks import check_values
from detector.training.data_module import DetectionData
from detector.training.task import DetectionTask
from detector.training.timing import PartTimes
from detector.training.trainer import (
    DeviceOptions,
    check_writable,
    devices,
    is_first_process,
    progress,
    ranks_end_together,
)

log = logging.getLogger(__name__)


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
        from detector.apps.evaluate_export import evaluate_export

        return evaluate_export(config)
    where = DeviceOptions.parse(config["trainer"], "trainer")
    device_arguments = devices(where)
    detector = Detector.load(config["ckpt"], device="cpu")  # Lightning moves it to this process's device
    if config["max_proposals"]:
        rpn = detector.network.rpn
        budget = min(config["max_proposals"], rpn.test_limits.after_nms)
        rpn.test_limits = rpn.test_limits.model_copy(update={"after_nms": budget})
    data_config = evaluation_data(config, detector)
    index = load_split(data_config, "val", class_names=detector.class_names)
    # Not where other tools look for the detector's figures.
    name = f"eval_{config['max_proposals']}_proposals" if config["max_proposals"] else "eval"
    out = Path(str(config["out"])) if config["out"] else Path(config["ckpt"]).parent / name
    if is_first_process():
        check_writable(out)
    data = DetectionData(
        val=index,
        preprocessing=detector.preprocessing,
        val_batch_size=config["val"]["batch_size"],
        workers=config["workers"],
    )
    task = DetectionTask(detector)
    task.val_index = index
    times = PartTimes(clock)
    trainer = lightning.Trainer(
        **device_arguments, **progress(where, [times]), logger=False, enable_checkpointing=False,
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
