"""What every run does, whatever it trains: progress, the run directory, Lightning's trainer."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import lightning
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from detector.training import callbacks as parts
from detector.training.checkpoints import CheckpointFiles, KeptCheckpoint
from detector.training.device_options import DeviceOptions
from detector.training.processes import EndAtOnce, devices, ranks_end_together
from detector.training.resume import check_can_go_on, check_state, read_resumable, resumed_options
from detector.training.run_directory import WRITTEN, check_free, run_directory, settle
from detector.training.run_options import RunOptions

if TYPE_CHECKING:
    from detector.training.data_module import SplitData
    from detector.training.task import Task

T = TypeVar("T", bound="RunOptions")
Weights = Callable[[Mapping[str, Any]], dict[str, Tensor]]
Checkpoint = dict[str, Any] | None  # of a run that goes on

log = logging.getLogger(__name__)
LOGGERS = ("lightning.pytorch", "lightning.fabric")
# What Lightning says about itself and not about this run; a newcomer would take it for a fault.
NOISE = (
    r"Checkpoint directory .* exists and is not empty",  # config.yaml is in it
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # inside Lightning
    r"The number of training batches .* is smaller than the logging interval",  # metrics.csv has a row per validation
    r"The '.*_dataloader' does not have many workers",  # the option here is `workers`, and 1 keeps up on a CPU
    r"`broadcast_buffers` is deprecated",  # torch 2.6 knows no other name for it
    r"Found .* module\(s\) in eval mode at the start of training",  # frozen normalisation
    r"It is recommended to use `self.log\(.*sync_dist=True\)`",  # the metrics are those of all ranks already
)


def bar_fits() -> bool:
    """Whether stdout is a terminal with room for a bar: those of some containers have a size of 0 x 0."""
    try:
        return sys.stdout.isatty() and min(os.get_terminal_size(sys.stdout.fileno())) > 0
    except OSError:  # a stream without a descriptor, whatever it says of itself
        return False


def progress(options: DeviceOptions, callbacks: list[lightning.Callback]) -> dict[str, Any]:
    """Lightning's arguments for callbacks and for progress: a bar in a terminal, else lines in the log."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)  # advertisements, and which devices there are not
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    terminal = bar_fits()
    shown = parts.ProgressBar(refresh_rate=options.progress_every) if terminal else parts.ProgressLines()
    return {"callbacks": [*callbacks, EndAtOnce(), shown], "enable_progress_bar": terminal}


def begin(options: T, *, entry: str, read: Callable[[str], dict[str, Any]], group: str) -> tuple[T, Checkpoint]:
    """The options of a run and, where it goes on with another, that run's options and its checkpoint.

    Args:
        options: as the command line gives them; with `resume`, the run's own with today's changes are returned.
        entry: of a checkpoint, under which it describes itself.
        read: reads a checkpoint.
        group: of configuration files, whose choice a run keeps.

    Raises:
        InputError: the run cannot go on like this, its directory holds another, or the devices are not there.
    """
    check_free(options)
    checkpoint: Checkpoint = None
    if options.resume:
        checkpoint = read_resumable(options.ckpt, entry, read)
        options = resumed_options(options, checkpoint[entry]["provenance"]["config"], group)
    devices(options.trainer)  # what is wrong with them is said before the data is read
    # Not the draws of the first epochs once more where a run goes on.
    step = checkpoint["global_step"] if checkpoint else 0
    lightning.seed_everything((options.seed + step) % 2**32, verbose=False)
    return options, checkpoint


def fit(
    options: RunOptions,
    checkpoint: Checkpoint,
    task: Task,
    data: SplitData,
    above: Path = Path("runs"),
    weights: Weights | None = None,
) -> Path:
    """Train to the end, with everything that a run writes. Returns the run directory.

    Args:
        options, checkpoint: see `begin`.
        task, data: what is trained, and on what.
        above: where run directories lie that are not given.
        weights: of a checkpoint; what best.pth holds. None: there is no best.pth.

    Raises:
        InputError: nothing is left to do, or the checkpoint does not fit.
        KeyboardInterrupt: Ctrl-C; Lightning has ended the run in order.
    """
    epochs = options.schedule.epochs_for(data.train_images)
    if checkpoint:
        check_can_go_on(str(options.ckpt), checkpoint[task.entry], checkpoint["epoch"], task.describe(), epochs)
    with run_directory(options, above) as run_dir:  # last: a mistake above leaves no empty folder
        trainer = _trainer(options, task, data, run_dir, epochs, weights)
        if checkpoint:
            check_state(str(options.ckpt), checkpoint, trainer, task, options)
            data.first_epoch = checkpoint["epoch"] + 1
        data.at_start = partial(settle, options, run_dir)
        with ranks_end_together(trainer), logging_redirect_tqdm():
            trainer.fit(task, data, ckpt_path=options.ckpt if checkpoint else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        log.info("%s", task.summary())
        log.info("%s in %s", ", ".join(name for name in WRITTEN[:-1] if (run_dir / name).exists()), run_dir)
    return run_dir


def _trainer(
    options: RunOptions, task: Task, data: SplitData, run_dir: Path, epochs: int, weights: Weights | None
) -> lightning.Trainer:
    callbacks: list[lightning.Callback] = [
        KeptCheckpoint(run_dir, task.columns.monitor),
        KeptCheckpoint(run_dir),
        parts.History(run_dir, every=options.trainer.log_every, columns=task.columns),
        LearningRateMonitor("step"),
        *([parts.FirstBatchImage(run_dir)] if not options.resume else []),  # a resumed run has its image already
        *([parts.EMA(options.ema)] if options.ema else []),
        parts.TimeEstimate(),
        parts.LastEpochScored(),
        parts.RandomStates(),
    ]
    return lightning.Trainer(
        **devices(options.trainer),
        **progress(options.trainer, callbacks),
        max_epochs=epochs,
        check_val_every_n_epoch=min(options.val.every, epochs),
        gradient_clip_val=options.optimizer.clip_norm,
        accumulate_grad_batches=options.trainer.accumulate,
        logger=parts.Events(run_dir),
        log_every_n_steps=options.trainer.log_every,
        num_sanity_val_steps=0,  # its scores of an untrained network have been taken for the best elsewhere
        use_distributed_sampler=False,  # it pads; those of data_module.py do not when they score
        enable_model_summary=False,
        default_root_dir=run_dir,
        plugins=[CheckpointFiles(weights)],
    )


@contextmanager
def without_traces() -> Iterator[None]:
    """Warnings, log levels, threads and environment are afterwards as before: runs can follow in one process."""
    environment, threads, hook = os.environ.copy(), torch.get_num_threads(), threading.excepthook
    # A full disk ends TensorBoard's thread with a traceback; `Events` says it in a line.
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else hook(args)
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    with warnings.catch_warnings():
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(environment)
            torch.set_num_threads(threads)
            threading.excepthook = hook
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
