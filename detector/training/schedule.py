"""Optimiser and learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from detector.errors import InputError

KINDS = ("cosine", "linear", "steps")


@dataclass(frozen=True)
class OptimizerSettings:
    """What moves the weights.

    Attributes:
        name: "sgd" (Nesterov off, as in the papers) or "adamw".
        lr: learning rate at `base_batch` images per step; scaled linearly to the real batch (Goyal et al. 2017).
        base_batch: images per step, over all devices, that `lr` was chosen for; None: no scaling.
        momentum: of SGD; the first beta of AdamW.
        weight_decay: not on biases and normalisation (Ma et al. 2018 and the released code of Li et al. 2017).
        lr_scales: prefix of parameter names -> factor on the learning rate, for example {"head.thin": 3}.
        clip_norm: largest gradient norm, or None.
    """

    name: str
    lr: float
    base_batch: int | None
    momentum: float
    weight_decay: float
    lr_scales: Mapping[str, float] | None
    clip_norm: float | None

    def scaled_lr(self, batch: int) -> float:
        return self.lr * (batch / self.base_batch if self.base_batch else 1.0)


@dataclass(frozen=True)
class ScheduleSettings:
    """How the learning rate goes.

    Attributes:
        kind: "cosine" or "linear" (to `final_share` of the rate), or "steps" (times 0.1 at each milestone).
        epochs: passes over the training split; None derives them from `images`.
        images: pictures to be seen, the unit of Li et al. 2017; used when `epochs` is None.
        milestones: shares of the run at which "steps" drops.
        warmup_steps: steps of linear warm-up from `warmup_factor` to 1.
        final_share: where cosine and line end.
    """

    kind: str
    epochs: int | None
    images: int | None
    milestones: Sequence[float]
    warmup_steps: int
    warmup_factor: float
    final_share: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"schedule.kind={self.kind}; it is one of {', '.join(KINDS)}.")
        if not self.epochs and not self.images:
            raise InputError(
                "Neither schedule.epochs nor schedule.images is set; set one, for example schedule.epochs=12."
            )

    def epochs_for(self, dataset_size: int) -> int:
        """Whole passes over a training split of this size."""
        return self.epochs or max(1, round((self.images or 0) / dataset_size))

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied with at this step of `total`."""
        warmup = min(self.warmup_steps, total // 5)
        if step < warmup:
            return self.warmup_factor + (1 - self.warmup_factor) * step / warmup
        if self.kind == "steps":
            return 0.1 ** sum(step >= share * total for share in self.milestones)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        left = 1 - progress if self.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.final_share + (1 - self.final_share) * left


def parameter_groups(network: nn.Module, settings: OptimizerSettings, lr: float) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and weight decay. Vectors (biases, normalisation) are not decayed.

    Raises:
        InputError: a prefix of lr_scales fits no parameter.
    """
    names = [name for name, _ in network.named_parameters()]
    factors = settings.lr_scales or {}
    parts = ", ".join(name for name, _ in network.named_children())
    for prefix in factors:
        if not any(name.startswith(prefix) for name in names):
            raise InputError(f"optimizer.lr_scales: no parameter starts with '{prefix}': {parts} do.")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        scales = [scale for prefix, scale in factors.items() if name.startswith(prefix)]
        decay = settings.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((lr * math.prod(scales), decay), []).append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]


def build_optimizer(network: nn.Module, settings: OptimizerSettings, batch: int) -> torch.optim.Optimizer:
    """The optimiser for `batch` images per step over all devices."""
    lr = settings.scaled_lr(batch)
    groups = parameter_groups(network, settings, lr)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(settings.momentum, 0.999))
    raise InputError(f"optimizer.name={settings.name}; it is 'sgd' or 'adamw'.")


def configure(trainer: Any, network: nn.Module, optimizer: OptimizerSettings, schedule: ScheduleSettings) -> Any:
    """What `configure_optimizers` of a Lightning module returns: the rate follows the real batch and length of the run.

    Args:
        trainer: Lightning's; its data module has a `train_batch_size`, per device.
        network: what is trained.
    """
    batch = trainer.datamodule.train_batch_size * trainer.world_size * trainer.accumulate_grad_batches
    built = build_optimizer(network, optimizer, batch)
    total = int(trainer.estimated_stepping_batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(built, lambda step: schedule.factor(step, total))
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
