"""How a Detector is trained and scored under Lightning: a step, an optimiser, exact evaluation, checkpoint fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import lightning
import torch
import torch.distributed as dist
from torch import Tensor

from detector.data.annotations import AnnotationIndex
from detector.data.collate import Batch, EvaluationBatch
from detector.data.results import Results
from detector.errors import InputError
from detector.evaluation.metrics import evaluate
from detector.inference.detector import Detector
from detector.options import Flag, Options
from detector.training.schedule import OptimizerOptions, ScheduleOptions, configure
from detector.training.trainer import rank, share_buffers, world_size


class FreezeOptions(Options):
    """What of the backbone stays as it is."""

    stages: Literal[0, 1, 2, 3, 4] = 1
    """stages: 1 to stride 4, 2 to stride 8, 3 to 16, 4 all (Li et al. 2017: ResNet's conv1 and block1, to stride 4)"""
    batch_norm: Flag = True
    """normalisation keeps its statistics and weights (Li et al. 2017, section 4.1: "all batch normalisation fixed")"""


class DetectionTask(lightning.LightningModule):
    """One detector, its losses, and COCO's metrics over the validation split.

    Args:
        detector: what is trained; its network is the only child, so that checkpoint keys read `network....`.
        optimizer, schedule: see their classes; None for evaluation alone.
        freeze: what of the backbone stays as it is, see `Backbone.freeze`; None: nothing.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        optimizer: OptimizerOptions | None = None,
        schedule: ScheduleOptions | None = None,
        freeze: FreezeOptions | None = None,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.network = detector.network
        self.optimizer_options, self.schedule = optimizer, schedule
        self.val_index: AnnotationIndex | None = None
        self.results = Results.of([], [])
        self._found: list[Results] = []
        self.metrics: dict[str, Any] = {}
        freeze = freeze or FreezeOptions(stages=0, batch_norm=False)
        self._frozen_norms = detector.network.backbone.freeze(freeze.stages, batch_norm=freeze.batch_norm)

    def train(self, mode: bool = True) -> DetectionTask:
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self

    def training_step(self, batch: Batch, _: int) -> Tensor:
        with big_enough():
            losses = self.network(batch)
        total = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(total):
            parts = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
            raise InputError(
                f"The loss is not finite at step {self.global_step} ({parts}) on the images {list(batch.image_ids)}. "
                "Look at their boxes, lower optimizer.lr, or set optimizer.clip_norm=10; "
                "last.ckpt holds the state of the last finished epoch (ckpt=.../last.ckpt resume=true)."
            )
        self.log_dict({f"loss_{name}": value for name, value in losses.items()}, batch_size=len(batch))
        self.log("loss", total, prog_bar=True, batch_size=len(batch))
        return total

    def configure_optimizers(self) -> Any:
        assert self.optimizer_options is not None
        assert self.schedule is not None
        return configure(self.trainer, self.network, self.optimizer_options, self.schedule)

    def on_validation_epoch_start(self) -> None:
        self._found = []
        share_buffers(self.network)

    def validation_step(self, batch: EvaluationBatch, _: int) -> None:
        """Empty where this rank has no image left."""
        assert self.val_index is not None
        places = [self.val_index.place[image_id] for image_id in batch.image_ids]
        self._found.append(Results.of(places, self.detector.detect_prepared(batch.prepared)))

    def on_validation_epoch_end(self) -> None:
        """Score once, on rank 0, over the detections of every rank; tell the metrics to all."""
        assert self.val_index is not None
        # In the data set's order, however many processes shared the work.
        self.results = Results.joined(_gather(self._found))
        outcome: list[Any] = [None]
        if rank() == 0:
            outcome = [evaluate(self.results, self.val_index)]
        if world_size() > 1:
            dist.broadcast_object_list(outcome, src=0)
        self.metrics = outcome[0]
        # An empty split of one size has no value (None); the monitored metrics always have a number.
        for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"):
            self.log(name, float(self.metrics[name] or 0.0), prog_bar=name == "AP")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        provenance = self.detector.provenance | {
            "epoch": int(self.current_epoch),
            "step": int(self.global_step),
            "metrics": {key: value for key, value in self.metrics.items() if key != "per_class"},
        }
        checkpoint["detector"] = self.detector.describe() | {"provenance": provenance}


@contextmanager
def big_enough() -> Iterator[None]:
    """Say in the field's words what torch's normalisation has against one small image alone.

    Raises:
        InputError: a map has one value per channel, and no variance.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            "The images of a step are too small for batch normalisation: a feature map has a single value per channel. "
            "Raise train.batch_size, or the size of the input."
        ) from error


def _gather(results: list[Results]) -> list[Results]:
    """All ranks' results on rank 0; on the others their own."""
    if world_size() == 1:
        return results
    parts: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(results, parts, dst=0)
    return [found for part in parts for found in part] if parts else results


def load_pretrained(detector: Detector, checkpoint: Mapping[str, Any]) -> list[str]:
    """Start from another detector's weights: all that have the same name and shape. Returns the names left at random.

    The class layers change with the data set; the rest is what a fine-tuning starts from.
    """
    own = detector.network.state_dict()
    given = {key.removeprefix("network."): value for key, value in checkpoint["state_dict"].items()}
    fitting = {key: value for key, value in given.items() if key in own and own[key].shape == value.shape}
    # V2 weights are a start for V2*, whose extra layers begin as the identity.
    missing = [key for key in own.keys() - fitting.keys() if key.startswith("backbone.") and ".extra." not in key]
    if missing:
        raise InputError(
            f"The checkpoint's backbone does not fit: {len(missing)} tensors are absent or of another shape, for "
            f"example {min(missing)}. Give the same backbone=..., or leave ckpt out."
        )
    detector.network.load_state_dict(own | fitting)
    return sorted(own.keys() - fitting.keys())
