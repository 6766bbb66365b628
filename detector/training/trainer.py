"""What every run has, whatever it trains: devices and processes, progress, the run directory, Lightning's trainer."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from pydantic import Field
from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm

from detector.errors import InputError
from detector.files import replacing
from detector.options import BelowOne, Count, Flag, Natural, Options
from detector.training.callbacks import (
    EMA,
    FirstBatchImage,
    History,
    LastEpochScored,
    ProgressBar,
    ProgressLines,
    RandomStates,
)
from detector.training.device_options import DeviceOptions
from detector.training.schedule import OptimizerOptions, ScheduleOptions

log = logging.getLogger(__name__)
# The process that launches the others decides on the name of the run's folder; they find it here.
RUN_NAME_VARIABLE = "DETECTOR_RUN_NAME"
# Everything that a run writes but config.yaml, in the order in which the log names it.
WRITTEN = (
    "best.pth", "best.ckpt", "last.ckpt", "metrics.csv", "metrics.json", "curves.png", "train_batch.png", "tensorboard"
)  # fmt: skip
# What a resumed run goes on with, beside its checkpoint.
CONTINUED = ("best.pth", "best.ckpt", "metrics.csv", "metrics.json", "train_batch.png")
LOGGERS = ("lightning.pytorch", "lightning.fabric")
# What Lightning says about itself and not about this run; a newcomer would take it for a fault.
NOISE = (
    r"Checkpoint directory .* exists and is not empty",  # config.yaml is in it
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # inside Lightning
    r"The number of training batches .* is smaller than the logging interval",  # metrics.csv has a row per validation
    r"The '.*_dataloader' does not have many workers",  # the option here is `workers`, and 1 keeps up on a CPU
    r"`broadcast_buffers` is deprecated",  # torch 2.6 knows no other name for it
    r"It is recommended to use `self.log\(.*sync_dist=True\)`",  # the metrics are those of all ranks already
)


class TrainerOptions(DeviceOptions):
    """Where a training runs, and what it notes."""

    accumulate: Count = 1
    """batches for one step of the optimiser"""
    log_every: Count = 20
    """steps between rows of metrics.csv"""


class TrainBatchOptions(Options):
    """How training images come."""

    batch_size: Count = 2
    """images a step and device (Li et al. 2017, section 4.1)"""


class ValidationOptions(Options):
    """When and how the validation split is scored."""

    batch_size: Count = 4
    """images a step and device (Ma et al. 2018, table 7: speed at batch 4)"""
    every: Count = 1
    """epochs between validations; the last epoch is always scored"""


class RunOptions(Options):
    """What every run has, whatever it trains."""

    recipe_name: str = "none"
    """names the run directory"""
    backbone_name: str = "none"
    """names the run directory"""
    overrides: tuple[str, ...] = ()
    """the command line, for the record; of a resumed run, what it changes"""
    run_dir: str | None = Field(default=None, coerce_numbers_to_str=True)
    """null: runs/<recipe>/<backbone>/<time>"""
    overwrite: Flag = False
    """start anew in a run_dir that holds a run, and remove that"""
    ckpt: str | None = Field(default=None, coerce_numbers_to_str=True)
    """start from these weights ..."""
    resume: Flag = False
    """... or go on with that run, as configured then: ckpt=RUN_DIR/last.ckpt resume=true"""
    seed: Natural = 0
    """of everything that is drawn"""
    workers: Natural = 4
    """loader processes per device; 0 loads in the training process"""
    ema: BelowOne | None = None
    """decay of the moving average of the weights; null: none (the released code of Li et al. 2017)"""
    train: TrainBatchOptions = TrainBatchOptions()
    val: ValidationOptions = ValidationOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    trainer: TrainerOptions = TrainerOptions()


class KeptCheckpoint(ModelCheckpoint):
    """best.ckpt, the checkpoint with the highest score, the first of equals; or last.ckpt, after each epoch.

    Lightning's forgets the score when its folder has moved; here it goes with the folder, and without the file there
    is none.

    Args:
        run_dir: where it is kept.
        monitor: the metric that decides; None: the last is kept, scored or not.
    """

    def __init__(self, run_dir: Path, monitor: str | None = None) -> None:
        # No metric in the file name: '=' in a name could not be given on the command line as ckpt=...
        self.kept = run_dir / ("best.ckpt" if monitor else "last.ckpt")
        super().__init__(
            run_dir, filename=self.kept.stem, monitor=monitor, mode="max" if monitor else "min", save_last=False,
            save_on_train_epoch_end=None if monitor else True, enable_version_counter=False,
        )  # fmt: skip

    @property
    def state_key(self) -> str:
        """Where a checkpoint holds the state: the place of earlier versions."""
        return super().state_key.replace("KeptCheckpoint", "ModelCheckpoint", 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        score = state_dict["best_model_score"]
        if score is not None and self.kept.is_file():
            path = f"{self.dirpath}/{self.kept.name}"
            self.best_model_path = self.kth_best_model_path = path
            self.best_model_score = self.kth_value = score
            self.best_k_models = {path: score}


def build_trainer(
    options: RunOptions,
    device_arguments: Mapping[str, Any],
    run_dir: Path,
    *,
    epochs: int,
    best: KeptCheckpoint,
    history: History,
    first_batch: FirstBatchImage,
) -> lightning.Trainer:
    """Lightning's trainer for one run.

    Args:
        options: of the run.
        device_arguments: see `devices`.
        run_dir: where everything is written.
        epochs: after which the run ends.
        best: what keeps the best checkpoint; the last one is kept here.
        history, first_batch: see their classes. A resumed run has its image already.
    """
    callbacks: list[lightning.Callback] = [
        best,
        KeptCheckpoint(run_dir),
        history,
        LearningRateMonitor("step"),
        *([first_batch] if not options.resume else []),
        *([EMA(options.ema)] if options.ema else []),
        LastEpochScored(),
        RandomStates(),
    ]
    return lightning.Trainer(
        **device_arguments,
        **progress(options.trainer, callbacks),
        max_epochs=epochs,
        check_val_every_n_epoch=min(options.val.every, epochs),
        gradient_clip_val=options.optimizer.clip_norm,
        accumulate_grad_batches=options.trainer.accumulate,
        logger=TensorBoardLogger(run_dir, name="", version="tensorboard"),
        log_every_n_steps=options.trainer.log_every,
        num_sanity_val_steps=0,  # its scores of an untrained network have been taken for the best elsewhere
        use_distributed_sampler=False,  # it pads; those of data_module.py do not when they score
        enable_model_summary=False,
        default_root_dir=run_dir,
    )


def progress(options: DeviceOptions, callbacks: list[lightning.Callback]) -> dict[str, Any]:
    """Lightning's arguments for callbacks and for progress: a bar in a terminal, else lines in the log."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)  # advertisements, and which devices there are not
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    terminal = sys.stdout.isatty()
    shown = ProgressBar(refresh_rate=options.progress_every) if terminal else ProgressLines()
    return {"callbacks": [*callbacks, shown], "enable_progress_bar": terminal}


def devices(options: DeviceOptions) -> dict[str, Any]:
    """Lightning's device arguments; data parallel where there is more than one device."""
    accelerator, nodes = options.accelerator, options.nodes
    gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0
    devices: Any = list(options.devices) if isinstance(options.devices, tuple) else options.devices
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun has started the processes already
        devices, nodes = _launched(options.devices)
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
        # Buffers are made equal once, before evaluation (`share_buffers`); at every forward pass it would be a
        # collective inside validation, where ranks have different numbers of batches.
        strategy = DDPStrategy(broadcast_buffers=False, process_group_backend="nccl" if gpus else "gloo")
    return {
        "accelerator": "gpu" if gpus else "cpu",
        "devices": devices,
        "num_nodes": nodes,
        "strategy": strategy,
        "precision": options.precision,
    }


@contextmanager
def ranks_end_together(trainer: lightning.Trainer) -> Iterator[None]:
    """Ranks that Lightning started end when this one, the first, fails: on GPUs they would wait half an hour for it."""
    try:
        yield
    except BaseException:
        for process in getattr(trainer.strategy.launcher, "procs", []):
            process.kill()
        raise


def fit(
    trainer: lightning.Trainer,
    task: lightning.LightningModule,
    data: lightning.LightningDataModule,
    resumed: str | None,
) -> None:
    """Train to the end, from the checkpoint `resumed` where there is one.

    Raises:
        KeyboardInterrupt: Ctrl-C; Lightning has ended the run in order.
    """
    with ranks_end_together(trainer), logging_redirect_tqdm():
        trainer.fit(task, data, ckpt_path=resumed, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt


def _launched(devices: Any) -> tuple[int, int]:
    """Processes per node, and nodes, as torchrun started them."""
    here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if devices not in ("auto", here):
        raise InputError(
            f"trainer.devices={devices}, but torchrun started {here} processes; leave trainer.devices out, "
            f"or start torchrun with --nproc-per-node {devices}."
        )
    return here, everywhere // here


def is_first_process() -> bool:
    """Whether this process has rank 0; known before the processes have met, whoever started them."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, once they have met."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def share_buffers(network: nn.Module) -> None:
    """Give every rank the running statistics of rank 0, before evaluation.

    Ranks keep their own while they train; a checkpoint holds those of rank 0: score those.
    """
    if world_size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer.data, src=0)


@contextmanager
def without_traces() -> Iterator[None]:
    """Warnings, log levels, threads and environment are afterwards as before: runs can follow in one process."""
    environment, threads = os.environ.copy(), torch.get_num_threads()
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    with warnings.catch_warnings():
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(environment)
            torch.set_num_threads(threads)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def check_free(options: RunOptions) -> None:
    """
    Raises:
        InputError: the run directory that is given holds a run already.
    """
    if options.run_dir and not options.resume and not options.overwrite and is_first_process():
        run_dir = Path(options.run_dir)
        if any((run_dir / name).exists() for name in WRITTEN):
            raise InputError(
                f"'{run_dir}' holds a run. Choose another run_dir; or overwrite=true, which removes that run; or "
                f"ckpt={run_dir / 'last.ckpt'} resume=true, which goes on with it."
            )


def run_directory(options: RunOptions, above: Path = Path("runs")) -> Path:
    """Given, or the resumed run's, or <above>/<recipe>/<backbone>/<time>. Rank 0 alone writes to it, beginning here."""
    if options.run_dir:
        run_dir = Path(options.run_dir)
    elif options.resume:
        run_dir = Path(str(options.ckpt)).parent
    else:
        folder = above / options.recipe_name / options.backbone_name
        run_dir = folder / os.environ.setdefault(RUN_NAME_VARIABLE, _free_name(folder))
    if is_first_process():
        check_writable(run_dir)
        if options.resume:
            _bring(Path(str(options.ckpt)).parent, run_dir)
        else:
            _clear(run_dir)
        with replacing(run_dir / "config.yaml") as partial:
            partial.write_text(yaml.safe_dump(options.to_dict(), sort_keys=False))
        log.info("run directory: %s", run_dir)
    return run_dir


def _free_name(folder: Path) -> str:
    """The time, to the second; with a number where a run has begun in the same one."""
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    names = itertools.chain([now], (f"{now}_{number}" for number in itertools.count(2)))
    return next(name for name in names if not (folder / name).exists())


def _bring(old: Path, new: Path) -> None:
    """What belongs to a run, where it goes on in another folder."""
    for name in CONTINUED:
        if (old / name).is_file() and not (new / name).exists():
            shutil.copy2(old / name, new / name)


def _clear(run_dir: Path) -> None:
    """Remove what another run has left, or its best.ckpt would pass for this one's."""
    for name in WRITTEN:
        if (run_dir / name).is_dir():
            shutil.rmtree(run_dir / name)
        else:
            (run_dir / name).unlink(missing_ok=True)


def say_what_was_written(run_dir: Path) -> None:
    """A line in the log that names the files of a run."""
    log.info("%s in %s", ", ".join(name for name in WRITTEN[:-1] if (run_dir / name).exists()), run_dir)


def check_writable(folder: Path) -> None:
    """
    Raises:
        InputError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"Cannot write to '{folder}': {error.strerror or error}. Choose another run_dir= or out=."
        ) from error
