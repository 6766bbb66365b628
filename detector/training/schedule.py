"""Optimiser and learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from detector.errors import InputError
from detector.options import BelowOne, Count, Natural, NotNegative, Options, Positive, Share

# What is left of the rate at a milestone: 0.01 becomes 0.001 (Li et al. 2017, section 4.1).
DROP = 0.1
# Warm-up takes at most one part in so many of a run. Chosen by this project: a short run should see the full rate.
WARMUP_PARTS = 5


class OptimizerOptions(Options):
    """What moves the weights. "code" is the released code of Li et al. 2017, github.com/zengarden/light_head_rcnn."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd without Nesterov (Li et al. 2017, section 4.1), or adamw"""
    lr: Positive = 0.01
    """for base_batch images a step; scaled linearly to the real batch (Li et al. 2017, section 4.1)"""
    base_batch: Count | None = 16
    """images a step, over all devices, that lr is for (Li et al. 2017: 8 GPUs, 2 images each); null: no scaling"""
    momentum: BelowOne = 0.9
    """momentum of sgd; the first beta of adamw (Li et al. 2017, section 4.1)"""
    weight_decay: NotNegative = 1e-4
    """not on biases and normalisation (Li et al. 2017, section 4.1, and code)"""
    lr_scales: dict[str, Positive] | None = Field(default={"head.thin": 3.0})
    """prefix of parameter names: factor on lr, as {backbone: 0.1} (code: 3 on the large separable convolution)"""
    clip_norm: Positive | None = None
    """largest norm of the gradient; null: any (code)"""

    def scaled_lr(self, batch: int) -> float:
        """The rate for `batch` images a step, over all devices (Goyal et al. 2017)."""
        return self.lr * (batch / self.base_batch if self.base_batch else 1.0)


class ScheduleOptions(Options):
    """How long a run is, and how the learning rate goes."""

    kind: Literal["cosine", "linear", "steps"] = "steps"
    """cosine or linear to final_share of the rate, or steps: a tenth at each milestone (Li et al. 2017, section 4.1)"""
    epochs: Count | None = None
    """passes over the training split; null: as many as give `images`"""
    images: Count | None = 2_000_000
    """images to be seen where epochs is null (Li et al. 2017, section 4.1: 1.5M at 0.01, 0.5M at 0.001)"""
    milestones: tuple[Share, ...] = (0.75,)
    """shares of the run at which kind=steps drops (Li et al. 2017, section 4.1)"""
    warmup_steps: Natural = 500
    """steps of linear warm-up (code), at most a fifth of the run"""
    warmup_factor: Share = 1 / 3
    """share of the rate at which the warm-up begins (code)"""
    final_share: Share = 0.0
    """share of the rate at which cosine and linear end"""

    @model_validator(mode="after")
    def _has_an_end(self) -> Self:
        if not self.epochs and not self.images:
            raise InputError(
                "Neither schedule.epochs nor schedule.images is set; set one, for example schedule.epochs=12."
            )
        return self

    def epochs_for(self, dataset_size: int) -> int:
        """Whole passes over a training split of this size."""
        return self.epochs or max(1, round((self.images or 0) / dataset_size))

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied with at this step of `total`."""
        warmup = min(self.warmup_steps, total // WARMUP_PARTS)
        if step < warmup:
            return self.warmup_factor + (1 - self.warmup_factor) * step / warmup
        if self.kind == "steps":
            return float(DROP ** sum(step >= share * total for share in self.milestones))
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        left = 1 - progress if self.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.final_share + (1 - self.final_share) * left


def parameter_groups(network: nn.Module, options: OptimizerOptions, lr: float) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and weight decay, those at the rate itself first: it is what a run shows.

    Vectors (biases, normalisation) are not decayed.

    Raises:
        InputError: a prefix of lr_scales fits no parameter.
    """
    names = [name for name, _ in network.named_parameters()]
    factors = options.lr_scales or {}
    parts = ", ".join(name for name, _ in network.named_children())
    for prefix in factors:
        if not any(name.startswith(prefix) for name in names):
            raise InputError(f"optimizer.lr_scales: no parameter starts with '{prefix}': {parts} do.")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        scales = [scale for prefix, scale in factors.items() if name.startswith(prefix)]
        decay = options.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((lr * math.prod(scales), decay), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda group: group[0][0] != lr)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in ordered]


def build_optimizer(network: nn.Module, options: OptimizerOptions, batch: int) -> torch.optim.Optimizer:
    """The optimiser for `batch` images per step over all devices."""
    lr = options.scaled_lr(batch)
    groups = parameter_groups(network, options, lr)
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=options.momentum)
    return torch.optim.AdamW(groups, lr=lr, betas=(options.momentum, 0.999))


def configure(trainer: Any, network: nn.Module, optimizer: OptimizerOptions, schedule: ScheduleOptions) -> Any:
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


def as_configured(built: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR) -> Callable[[], None]:
    """What brings rates, decay and momentum of today's options back, once another run's state has been loaded.

    `load_state_dict` of both takes the rates from the state, so that a changed rate, batch or length would not count.
    """
    fresh = [{key: value for key, value in group.items() if key != "params"} for group in built.param_groups]

    def restore() -> None:
        scheduler.base_lrs = [group["initial_lr"] for group in fresh]
        for group, values, factor in zip(built.param_groups, fresh, scheduler.lr_lambdas, strict=True):
            group.update(values | {"lr": values["initial_lr"] * factor(scheduler.last_epoch)})

    return restore
