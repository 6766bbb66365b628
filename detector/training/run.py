"""A training run and an evaluation run, from plain configuration: where the parts of training meet."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from tqdm.contrib.logging import logging_redirect_tqdm

from detector.api import Detector, read_checkpoint
from detector.backbones import arguments_of
from detector.backbones.pretrained import load_weights
from detector.data.coco import CocoIndex, load_coco
from detector.data.shapes import ensure_shapes
from detector.data.transforms import TrainTransform
from detector.errors import InputError
from detector.evaluation.clock import Clock
from detector.evaluation.coco import evaluate as score
from detector.evaluation.coco import format_table, save_metrics
from detector.files import replacing, write_json
from detector.preprocess import Preprocessing
from detector.training.callbacks import EMA, FirstBatchPicture, History, ProgressBar, ProgressLines
from detector.training.checks import check_values
from detector.training.data_module import DetectionData
from detector.training.reporting import report_on_checkpoint
from detector.training.resume import check_can_go_on, read_resumable, resumed_config
from detector.training.schedule import OptimizerSettings, ScheduleSettings
from detector.training.task import DetectionTask, load_pretrained
from detector.training.timing import PartTimes

log = logging.getLogger(__name__)
# The process that launches the others decides on the time; they find it here.
RUN_TIME_VARIABLE = "DETECTOR_RUN_TIME"
# What Lightning says about itself and not about this run; a newcomer would take it for a fault.
NOISE = (
    r"Checkpoint directory .* exists and is not empty",  # config.yaml is in it
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # inside Lightning
    r"The number of training batches .* is smaller than the logging interval",  # metrics.csv has a row per validation
    r"The '.*_dataloader' does not have many workers",  # ours is called `workers`, and 1 keeps up on a CPU
    r"`broadcast_buffers` is deprecated",  # torch 2.6 knows no other name for it
    r"It is recommended to use `self.log\(.*sync_dist=True\)`",  # the figures are those of all ranks already
)


def train(config: Mapping[str, Any]) -> Path:
    """Train a detector as conf/train.yaml describes it. Returns the run directory.

    Raises:
        InputError: something in the configuration, the data or the checkpoint is wrong.
    """
    config, checkpoint = _checked(config)
    # Not the draws of the first epochs once more where a run goes on.
    lightning.seed_everything(config["seed"] + (checkpoint["global_step"] if checkpoint else 0), verbose=False)
    devices = _devices(config)
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
    run_dir = _run_dir(config)  # last: a mistake above leaves no empty folder
    trainer = _trainer(config, devices, run_dir, task, epochs)
    with _ranks_end_together(trainer), logging_redirect_tqdm():
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
    devices = _devices(config)
    detector = Detector.load(config["ckpt"], device="cpu")  # Lightning moves it to this process's device
    data_config = _evaluation_data(config, detector)
    index = load_split(data_config, "val", class_names=detector.class_names)
    out = Path(str(config["out"])) if config["out"] else Path(config["ckpt"]).parent / "eval"
    if _is_first_process():
        _check_writable(out)
    data = _data_module(config, detector.preprocessing, None, index)
    task = DetectionTask(detector)
    task.val_index = index
    times = PartTimes(clock)
    trainer = lightning.Trainer(
        **devices, **_progress(config, [times]), logger=False, enable_checkpointing=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=out,
    )  # fmt: skip
    with _ranks_end_together(trainer), logging_redirect_tqdm():
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


def _checked(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The configuration, and the checkpoint of the run that goes on with it."""
    check_values(config)
    if not config["resume"]:
        return dict(config), None
    checkpoint = read_resumable(config["ckpt"])
    resumed = resumed_config(config, checkpoint)
    check_values(resumed)
    return resumed, checkpoint


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


def _evaluation_data(config: Mapping[str, Any], detector: Detector) -> dict[str, Any]:
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
    config: Mapping[str, Any], devices: Mapping[str, Any], run_dir: Path, task: DetectionTask, epochs: int
) -> lightning.Trainer:
    assert task.optimizer_settings is not None
    callbacks: list[lightning.Callback] = [
        # No metric in the file names: '=' in a name could not be given on the command line as ckpt=...
        ModelCheckpoint(
            run_dir, filename="best", monitor="AP", mode="max", save_last=False, enable_version_counter=False
        ),
        # After each epoch, scored or not.
        ModelCheckpoint(
            run_dir, filename="last", monitor=None, save_on_train_epoch_end=True, enable_version_counter=False
        ),
        History(run_dir, every=config["trainer"]["log_every"]),
        LearningRateMonitor("step"),
        *([FirstBatchPicture(run_dir)] if not config["resume"] else []),
        *([EMA(config["ema"])] if config["ema"] else []),
    ]
    return lightning.Trainer(
        **devices,
        **_progress(config, callbacks),
        max_epochs=epochs,
        check_val_every_n_epoch=min(config["val"]["every"], epochs),
        gradient_clip_val=task.optimizer_settings.clip_norm,
        accumulate_grad_batches=config["trainer"]["accumulate"],
        logger=TensorBoardLogger(run_dir, name="", version="tensorboard"),
        log_every_n_steps=config["trainer"]["log_every"],
        num_sanity_val_steps=0,  # its scores of an untrained network have been taken for the best elsewhere
        use_distributed_sampler=False,  # it pads; ours do not
        enable_model_summary=False,
        default_root_dir=run_dir,
    )


def _progress(config: Mapping[str, Any], callbacks: list[lightning.Callback]) -> dict[str, Any]:
    """Lightning's arguments for callbacks and for progress: a bar in a terminal, else lines in the log."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # advertisements, and which devices there are not
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    terminal = sys.stdout.isatty()
    shown = ProgressBar(refresh_rate=config["trainer"]["progress_every"]) if terminal else ProgressLines()
    return {"callbacks": [*callbacks, shown], "enable_progress_bar": terminal}


def _devices(config: Mapping[str, Any]) -> dict[str, Any]:
    """Lightning's device arguments; data parallel where there is more than one device."""
    wanted = config["trainer"]
    accelerator, nodes = wanted["accelerator"], wanted["nodes"]
    gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0
    devices = wanted["devices"]
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun has started the processes already
        devices, nodes = _launched(wanted)
    elif devices == "auto":
        devices = gpus or 1
    if accelerator in ("gpu", "cuda") and gpus == 0:
        raise InputError("trainer.accelerator=gpu, but torch sees no GPU here; use trainer.accelerator=auto or cpu.")
    if gpus and isinstance(devices, int) and devices > gpus:
        raise InputError(f"trainer.devices={devices}, but there are {gpus} GPUs; lower it, or trainer.accelerator=cpu.")
    processes = (devices if isinstance(devices, int) else len(devices)) * nodes
    if not gpus and processes > 1:
        # Two processes with a thread per core each would take turns spinning.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    strategy: Any = "auto"
    if processes > 1:
        # Buffers are made equal once, before evaluation (DetectionTask); at every forward pass it would be a
        # collective inside validation, where ranks have different numbers of batches.
        strategy = DDPStrategy(broadcast_buffers=False, process_group_backend="nccl" if gpus else "gloo")
    return {
        "accelerator": "gpu" if gpus else "cpu",
        "devices": devices,
        "num_nodes": nodes,
        "strategy": strategy,
        "precision": wanted["precision"],
    }


@contextmanager
def _ranks_end_together(trainer: lightning.Trainer) -> Iterator[None]:
    """Ranks that Lightning started end when this one, the first, fails: on GPUs they would wait half an hour for it."""
    try:
        yield
    except BaseException:
        for process in getattr(trainer.strategy.launcher, "procs", []):
            process.kill()
        raise


def _launched(wanted: Mapping[str, Any]) -> tuple[int, int]:
    """Processes per node, and nodes, as torchrun started them."""
    here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if wanted["devices"] not in ("auto", here):
        raise InputError(
            f"trainer.devices={wanted['devices']}, but torchrun started {here} processes; leave trainer.devices out, "
            f"or start torchrun with --nproc-per-node {wanted['devices']}."
        )
    return here, everywhere // here


def _is_first_process() -> bool:
    """Whether this process has rank 0; known before the processes have met, whoever started them."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def _run_dir(config: Mapping[str, Any]) -> Path:
    """Given, or the resumed run's, or runs/<recipe>/<backbone>/<time>. Rank 0 alone writes to it, beginning here."""
    if config["run_dir"]:
        run_dir = Path(str(config["run_dir"]))
    elif config["resume"]:
        run_dir = Path(config["ckpt"]).parent
    else:
        now = os.environ.setdefault(RUN_TIME_VARIABLE, datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
        run_dir = Path("runs") / config["recipe_name"] / config["backbone_name"] / now
    if _is_first_process():
        _check_writable(run_dir)
        with replacing(run_dir / "config.yaml") as partial:
            partial.write_text(yaml.safe_dump(dict(config), sort_keys=False))
        log.info("run directory: %s", run_dir)
    return run_dir


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"Cannot write to '{folder}': {error.strerror or error}. Choose another run_dir= or out=."
        ) from error
