"""What every run has, whatever it trains: its options. A module of its own: to know them, nobody needs Lightning."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.types import Strict

from detector.options import BelowOne, Count, Flag, Natural, Options
from detector.training.device_options import DeviceOptions
from detector.training.schedule import OptimizerOptions, ScheduleOptions


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
    by_shape: Flag = True
    """of a detector: upright and other images in batches of their own, saves padding (Li et al. 2017, released code)"""


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
    run_dir: str | None = None
    """null: runs/<recipe>/<backbone>/<time>"""
    overwrite: Flag = False
    """start anew in a run_dir that holds a run, and remove that"""
    ckpt: str | None = None
    """start from these weights ..."""
    resume: Flag = False
    """... or go on with that run, as configured then: ckpt=RUN_DIR/last.ckpt resume=true"""
    seed: Annotated[int, Strict(), Field(ge=0), Field(lt=2**32)] = 0
    """seed of all random draws: first weights, order of the images, augmentation"""
    workers: Natural = 4
    """loader processes per device; 0 loads in the training process"""
    ema: BelowOne | None = None
    """decay of the moving average of the weights; null: none (the released code of Li et al. 2017)"""
    train: TrainBatchOptions = TrainBatchOptions()
    val: ValidationOptions = ValidationOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    trainer: TrainerOptions = TrainerOptions()


class FreezeOptions(Options):
    """What of the backbone stays as it is."""

    stages: Literal[0, 1, 2, 3, 4] = 1
    """stages: 1 to stride 4, 2 to stride 8, 3 to 16, 4 all (Li et al. 2017: ResNet's conv1 and block1, to stride 4)"""
    batch_norm: Flag = True
    """normalisation keeps its statistics and weights (Li et al. 2017, section 4.1: "all batch normalisation fixed")"""


def provenance(options: RunOptions) -> dict[str, Any]:
    """Where a network comes from, for its checkpoint."""
    return {
        "config": options.to_dict(),
        "torch": str(torch.__version__),
        "created": datetime.now().isoformat(timespec="seconds"),
    }
