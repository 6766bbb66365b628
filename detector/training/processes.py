"""The processes of a run: on which devices, how many, which one this is, and that they end together."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from detector.errors import InputError
from detector.training.device_options import DeviceOptions

log = logging.getLogger(__name__)


def devices(options: DeviceOptions) -> dict[str, Any]:
    """Lightning's device arguments; data parallel where there is more than one device."""
    accelerator, nodes = options.accelerator, options.nodes
    gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0
    devices: Any = list(options.devices) if isinstance(options.devices, tuple) else options.devices
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun has started the processes already
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        if options.devices not in ("auto", here):
            raise InputError(
                f"trainer.devices={options.devices}, but torchrun started {here} processes; leave trainer.devices "
                f"out, or start torchrun with --nproc-per-node {options.devices}."
            )
        devices, nodes = here, int(os.environ["WORLD_SIZE"]) // here
    elif devices == "auto":
        devices = gpus or 1
    if accelerator in ("gpu", "cuda") and gpus == 0:
        raise InputError("trainer.accelerator=gpu, but torch sees no GPU here; use trainer.accelerator=auto or cpu.")
    if isinstance(devices, list) and max(devices) >= gpus:
        there = f"numbers 0 to {gpus - 1}" if gpus else "no GPU, and a CPU has no number: trainer.devices=1"
        raise InputError(f"trainer.devices={devices} are numbers of GPUs; here are {there}.")
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
        strategy = DDPStrategy(broadcast_buffers=False)
    return {
        "accelerator": "gpu" if gpus else "cpu",
        "devices": devices,
        "num_nodes": nodes,
        "strategy": strategy,
        "precision": options.precision,
    }


class EndAtOnce(lightning.Callback):
    """Of several processes, one that gets SIGTERM ends where it is: files are written whole or not at all.

    Lightning's handler broadcasts, in the middle of whatever the ranks tell each other, and they wait for ever.
    """

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.world_size > 1:
            signal.signal(signal.SIGTERM, self._end)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.on_train_start(trainer, pl_module)

    @staticmethod
    def _end(*_: object) -> None:
        raise SIGTERMException


@contextmanager
def ranks_end_together(trainer: lightning.Trainer) -> Iterator[None]:
    """Ranks that Lightning started end when this one, the first, fails: on GPUs they would wait half an hour for it.

    Raises:
        SystemExit: 143 after SIGTERM, which Lightning answers with 0.
    """
    try:
        yield
    except BaseException as error:
        for process in getattr(trainer.strategy.launcher, "procs", []):
            process.kill()
        if isinstance(error, SIGTERMException):
            log.info("terminated")
            raise SystemExit(128 + signal.SIGTERM) from error
        raise


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
