"""What a run writes besides checkpoints: the table of its history, curves, an image of what the network saw."""

from __future__ import annotations

import csv
import logging
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import TQDMProgressBar, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from detector.data.progress import SECONDS
from detector.files import replacing, write_json
from detector.training.plots import plot_curves
from detector.training.run_directory import dispensable

log = logging.getLogger(__name__)


class Columns(NamedTuple):
    """What the table of a run holds.

    Attributes:
        losses: of a step: what the task logs at each step.
        metrics: of a validation: keys of the task's `metrics`.
        shown: those of them that the log shows.
    """

    losses: Sequence[str]
    metrics: Sequence[str]
    shown: Sequence[str]

    @property
    def monitor(self) -> str:
        """The metric that decides on the best."""
        return self.shown[0]


class History(lightning.Callback):
    """Writes metrics.csv (a row every `every` steps, and one per validation), metrics.json and curves.png.

    Lightning's CSVLogger starts an empty file when a run is resumed; this one goes on.

    Args:
        run_dir: where they are written.
        every: steps between rows.
        columns: of metrics.csv.
    """

    def __init__(self, run_dir: Path, *, every: int, columns: Columns) -> None:
        self.run_dir, self.every = run_dir, every
        self.losses, self.shown, self.monitor = columns.losses, columns.shown, columns.monitor
        self.columns = ("step", "epoch", "lr", *columns.losses, *columns.metrics)
        self.path = run_dir / "metrics.csv"
        self.best: dict[str, Any] = {}
        self.told: set[Path] = set()
        self.lr = 0.0
        self.written = 0

    # Not on_fit_start: there the step of a resumed run is not restored yet.
    def on_train_start(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.written = trainer.global_step
        kept = []
        if self.path.exists():
            text = self.path.read_bytes().decode(errors="replace")
            lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)  # no half row
            whole = [row for row in csv.DictReader(lines) if None not in row.values()]
            # A run that died wrote rows after its last checkpoint; they will be written again.
            kept = [row for row in whole if (step := row.get("step", "")).isdecimal() and int(step) <= self.written]
        with replacing(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)

    def _write(self, trainer: lightning.Trainer, values: Mapping[str, Any]) -> None:
        row = {"step": trainer.global_step, "epoch": trainer.current_epoch} | dict(values)
        with dispensable(self.path, self.told):
            size = self.path.stat().st_size
            try:
                with self.path.open("a", newline="") as file:
                    csv.DictWriter(file, self.columns, extrasaction="ignore").writerow(row)
            except OSError:
                os.truncate(self.path, size)  # no half row
                raise

    def on_before_optimizer_step(
        self, _: lightning.Trainer, __: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.lr = optimizer.param_groups[0]["lr"]  # of this step; at the end of the batch it is the next one's

    def on_train_batch_end(
        self, trainer: lightning.Trainer, _: lightning.LightningModule, __: Any, ___: Any, ____: int
    ) -> None:
        step = trainer.global_step
        # A step can take several batches (trainer.accumulate): a row for the last of them.
        if trainer.is_global_zero and step % self.every == 0 and step > self.written:
            losses = {name: f"{trainer.callback_metrics[name].item():.5g}" for name in self.losses}
            self._write(trainer, losses | {"lr": f"{self.lr:.4g}"})
            self.written = step

    def on_validation_end(self, trainer: lightning.Trainer, task: Any) -> None:
        if not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        metrics = {key: value for key, value in task.metrics.items() if key != "per_class" and value is not None}
        self._write(trainer, {key: f"{value:.6f}" for key, value in metrics.items()})
        last = task.metrics | {"epoch": trainer.current_epoch, "step": trainer.global_step}
        # As ModelCheckpoint decides about best.ckpt: the first of equals stays, and no value (no objects) counts as 0.
        if not self.best or (last[self.monitor] or 0.0) > (self.best[self.monitor] or 0.0):
            self.best = last
        with dispensable(self.run_dir / "metrics.json", self.told):
            write_json(self.run_dir / "metrics.json", {"best": self.best, "last": last})
        with dispensable(self.run_dir / "curves.png", self.told):
            plot_curves(self.path, self.run_dir / "curves.png")
        shown = ", ".join(f"{name} {metrics[name]:.3f}" for name in self.shown if name in metrics)
        shown = shown or "no AP, the validation split has no objects"
        log.info("after epoch %d of %d: %s", trainer.current_epoch + 1, trainer.max_epochs, shown)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        best = state_dict["best"]
        if best and not 0 <= (best[self.monitor] or 0) <= 1:
            raise ValueError(f"its best {self.monitor} is {best[self.monitor]}")
        if (self.run_dir / "best.ckpt").is_file():  # what `best` describes
            self.best = best


class FirstBatchImage(lightning.Callback):
    """Draws the first training batch as the network sees it: what most mistakes in data and augmentation show on.

    Args:
        run_dir: becomes run_dir/train_batch.png.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path: Path | None = run_dir / "train_batch.png"

    def on_train_batch_start(self, trainer: lightning.Trainer, task: Any, batch: Any, _: int) -> None:
        if self.path is not None and trainer.is_global_zero:
            with dispensable(self.path, set()), replacing(self.path) as partial:
                task.draw(batch).save(partial)
        self.path = None


class Events(TensorBoardLogger):
    """Lightning's, but where its files cannot be written, the training goes on without them."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, name="", version="tensorboard")
        self.told: set[Path] = set()

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        with self._dispensable():
            super().log_metrics(metrics, step)

    def save(self) -> None:
        with self._dispensable():
            super().save()

    def finalize(self, status: str) -> None:
        with self._dispensable():
            super().finalize(status)

    @contextmanager
    def _dispensable(self) -> Iterator[None]:
        with dispensable(Path(self.log_dir), self.told):
            try:
                yield
            except ValueError as error:  # for any error, in log_metrics
                raise error.__cause__ or error from None


class ProgressBar(TQDMProgressBar):
    """Lightning's bar for a terminal, without the logger's version number."""

    def get_metrics(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> dict[str, Any]:
        return {key: value for key, value in super().get_metrics(trainer, task).items() if key != "v_num"}


class ProgressLines(lightning.Callback):
    """A line in the log now and then, where there is no terminal for a bar.

    Args:
        seconds: time between lines.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.first_step = 0
        self.start = self.last = time.monotonic()

    def on_train_start(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        self.first_step = trainer.global_step
        self.start = self.last = time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, _: lightning.LightningModule, __: Any, ___: Any, ____: int
    ) -> None:
        steps = trainer.global_step - self.first_step
        if not (steps and self._due(trainer)):
            return
        total = int(trainer.estimated_stepping_batches)
        rate = steps / (time.monotonic() - self.start)
        loss, left = trainer.callback_metrics["loss"].item(), (total - trainer.global_step) / rate / 60
        where = f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}, step {trainer.global_step} of {total}"
        log.info("%s, loss %.3f, %.2f steps/s, %.0f min left", where, loss, rate, left)

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, _: lightning.LightningModule, __: Any, ___: Any, index: int, ____: int = 0
    ) -> None:
        if self._due(trainer):
            log.info("validation: %d of %s batches", index + 1, trainer.num_val_batches[0])

    def _due(self, trainer: lightning.Trainer) -> bool:
        now = time.monotonic()
        due = trainer.is_global_zero and now - self.last >= self.seconds
        self.last = now if due else self.last
        return due


class TimeEstimate(lightning.Callback):
    """Says once, after a few steps, how long the training will take on this machine.

    The first steps are slow, and the first of an epoch waits for a validation or for the loader: they do not count. An
    image that is scored is taken for a third of one that is trained on, which goes through the network both ways.

    Also whether threads wait for each other because something else has a core: on two cores beside one busy process,
    a step on two threads took 2.8 times as long as on one.
    """

    skipped, timed = 3, 10
    # Times a second that a thread loses its core: 17 on an idle machine of two cores, 97 beside one busy process.
    crowded = 50

    def __init__(self) -> None:
        self.last: float | None = None
        self.seconds: list[float] = []  # of batches
        self.began = 0.0, 0  # these batches: when, and how many cores had been lost

    def on_train_epoch_start(self, *_: Any) -> None:
        self.last = None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, _: lightning.LightningModule, __: Any, ___: Any, ____: int
    ) -> None:
        if len(self.seconds) == self.skipped + self.timed:
            return
        before, self.last = self.last, time.monotonic()
        if before is not None:
            self.seconds.append(self.last - before)
        if len(self.seconds) == self.skipped:
            self.began = time.monotonic(), cores_lost()
        if len(self.seconds) == self.skipped + self.timed and trainer.is_global_zero:
            self._tell(trainer, sum(self.seconds[self.skipped :]) / self.timed)
            threads, (start, lost) = torch.get_num_threads(), self.began
            often = cores_lost() - lost > self.crowded * threads * (time.monotonic() - start)
            if trainer.strategy.root_device.type == "cpu" and threads > 1 and often:
                log.warning(
                    "Something else uses this machine, and %d threads wait for each other. Fewer may be several times "
                    "as fast: OMP_NUM_THREADS=%d before the command.",
                    threads,
                    threads - 1,
                )

    @staticmethod
    def _tell(trainer: lightning.Trainer, batch_seconds: float) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        epochs, every, images = trainer.max_epochs or 0, trainer.check_val_every_n_epoch or 1, len(data.val_order)
        scored = sum(epoch % every == 0 or epoch == epochs for epoch in range(trainer.current_epoch + 1, epochs + 1))
        steps = int(trainer.estimated_stepping_batches) - trainer.global_step
        batches = steps * trainer.accumulate_grad_batches
        batches += scored * images / (3 * data.train_batch_size * trainer.world_size)
        threads = torch.get_num_threads()
        where = f"{threads} thread{'s' * (threads > 1)}" if trainer.strategy.root_device.type == "cpu" else "the GPU"
        where += f" of each of {trainer.world_size} processes" if trainer.world_size > 1 else ""
        log.info(
            "about %s: %s steps of %.2g s and %d validations of %s images on %s",
            _spoken(batches * batch_seconds),
            f"{steps:,}",
            batch_seconds * trainer.accumulate_grad_batches,
            scored,
            f"{images:,}",
            where,
        )


def cores_lost() -> int:
    """How often the threads of this process had to give up their core to others; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _spoken(seconds: float) -> str:
    """A duration for people: 50 seconds, 42 minutes, 3.5 hours."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"


class LastEpochScored(lightning.Callback):
    """Scores the last epoch, also where `val.every` would leave it out."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        if trainer.max_epochs and trainer.current_epoch + 1 >= trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1


class RandomStates(lightning.Callback):
    """Keeps where all random generators stand in the checkpoint, so that a resumed run draws what it would have drawn.

    Those of Python, numpy and torch, of each process. Training images are drawn from seed and epoch, and need none.
    """

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """The states of all ranks, as plain values and tensors."""
        numpy_state: Any = np.random.get_state()
        kind, keys, *rest = numpy_state
        own = {
            "python": random.getstate(),
            "numpy": (kind, keys.tolist(), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        }
        if not (dist.is_available() and dist.is_initialized()):
            return {"ranks": [own]}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for own in state_dict["ranks"]:  # what cannot be taken up is found here, with generators that nobody uses
            self._take_up(own, random.Random(), np.random.RandomState(), torch.Generator())
        self.states = state_dict["ranks"]

    @staticmethod
    def _take_up(own: dict[str, Any], python: Any, legacy: Any, generator: torch.Generator) -> None:
        if not 0 <= own["numpy"][2] <= len(own["numpy"][1]):  # numpy itself would read beyond
            raise ValueError(f"numpy's generator is said to stand at {own['numpy'][2]}")
        python.setstate(own["python"])
        legacy.set_state(own["numpy"])
        generator.set_state(own["torch"])
        if own["cuda"] is not None:
            torch.ByteTensor(own["cuda"])

    def on_train_epoch_start(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        states, self.states = self.states, []
        if len(states) != trainer.world_size:  # not resumed, or on another number of devices
            return
        own = states[trainer.global_rank]
        self._take_up(own, random, np.random, torch.default_generator)
        if own["cuda"] is not None and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(own["cuda"])


class EMA(WeightAveraging):
    """Exponential moving average of the weights, scored and saved in place of the weights themselves.

    Early on the average follows quickly, or a short run would end with an average over its random start:
    decay min(d, (1 + n) / (10 + n)) after n updates. Source of the formula: TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=self._average)
        self.decay = decay

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device  # the weights themselves are moved there only after this hook
        super().setup(trainer, pl_module, stage)

    @torch.no_grad()
    def _average(self, averages: list[Tensor], currents: list[Tensor], updates: Tensor | int) -> None:
        if averages[0].is_floating_point():
            count = int(updates)
            torch._foreach_lerp_(averages, currents, 1 - min(self.decay, (1 + count) / (10 + count)))
        else:
            torch._foreach_copy_(averages, currents)
