"""How a backbone is trained and scored as an image classifier under Lightning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from detector.data.collate import Batch
from detector.data.image_folder import ImageBatch
from detector.errors import InputError
from detector.models.backbones.classifier import ImageClassifier
from detector.models.light_head_rcnn import MEAN, STD
from detector.training.plots import draw_batch
from detector.training.schedule import OptimizerOptions, ScheduleOptions, configure
from detector.training.task import big_enough
from detector.training.trainer import share_buffers, world_size

if TYPE_CHECKING:
    from PIL.Image import Image

# What a validation gives; the first decides on the best.
METRICS = ("top1", "top5", "loss_val")
LOSSES = ("loss",)
_NAMED = 8  # files in a message


class ClassificationTask(lightning.LightningModule):
    """One classifier, its loss, and its accuracy over the validation split.

    Takes raw uint8 pixels and normalises them as a detector does, so that the backbone is at home there.

    Args:
        network: what is trained; the only child, so that checkpoint keys read `network....`.
        about: what a checkpoint says of itself, with a `provenance`; plain values.
        optimizer, schedule: see their classes.
        label_smoothing: share of the target that all classes have together (Szegedy et al. 2016, section 7).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: ImageClassifier,
        about: Mapping[str, Any],
        *,
        optimizer: OptimizerOptions,
        schedule: ScheduleOptions,
        label_smoothing: float,
    ) -> None:
        super().__init__()
        self.network = network
        self.about = dict(about)
        self.optimizer_options, self.schedule = optimizer, schedule
        self.label_smoothing = label_smoothing
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.metrics: dict[str, Any] = {}
        self.sums: Tensor = torch.zeros(0)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 RGB (N, 3, H, W) -> class logits (N, K)."""
        images = (images.to(self.mean.dtype) - self.mean) / self.std
        return self.network(images.contiguous(memory_format=torch.channels_last))

    def training_step(self, batch: ImageBatch, _: int) -> Tensor:
        with big_enough():
            logits = self(batch.images).float()
        losses = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing, reduction="none")
        loss = losses.mean()
        if not torch.isfinite(loss):
            self._refuse(losses, batch.paths)
        self.log("loss", loss, prog_bar=True, batch_size=len(batch.labels))
        return loss

    def _refuse(self, losses: Tensor, paths: Sequence[str]) -> None:
        bad = [path for path, finite in zip(paths, torch.isfinite(losses).tolist(), strict=True) if not finite]
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise InputError(
            f"The loss is not finite at step {self.global_step} on {len(bad)} of {len(paths)} images: "
            f"{', '.join(bad[:_NAMED])}{more}. Look at them, lower optimizer.lr, or set optimizer.clip_norm=10; "
            "last.ckpt holds the state of the last finished epoch (ckpt=.../last.ckpt resume=true)."
        )

    def configure_optimizers(self) -> Any:
        return configure(self.trainer, self.network, self.optimizer_options, self.schedule)

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        share_buffers(self.network)

    def validation_step(self, batch: ImageBatch, _: int) -> None:
        """An empty batch where this rank has no image left."""
        if len(batch.labels):
            self.sums += score(self(batch.images).float(), batch.labels)

    def on_validation_epoch_end(self) -> None:
        """The same metrics on every rank, over the images of all."""
        if world_size() > 1:
            dist.all_reduce(self.sums)
        count, top1, top5, loss = self.sums.tolist()
        self.metrics = {"top1": top1 / count, "top5": top5 / count, "loss_val": loss / count, "images": int(count)}
        for name in METRICS:
            self.log(name, self.metrics[name], prog_bar=name == "top1")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        now = {"epoch": int(self.current_epoch), "step": int(self.global_step), "metrics": dict(self.metrics)}
        checkpoint["classifier"] = self.about | {"provenance": self.about["provenance"] | now}


def score(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over a batch: images, right at the first guess, right among five guesses, cross-entropy; (4,) float64.

    Of fewer than five classes all are guessed. Classes that are exactly as likely come in torch's order.

    Args:
        logits: (N, K).
        labels: (N,) int64.
    """
    guesses = logits.topk(min(5, logits.shape[1])).indices
    right = guesses == labels[:, None]
    loss = F.cross_entropy(logits.double(), labels, reduction="sum")
    count = torch.tensor(float(len(labels)), device=logits.device)
    return torch.stack([count.double(), right[:, 0].sum().double(), right.sum().double(), loss])


def draw_images(batch: ImageBatch, class_names: Sequence[str]) -> Image:
    """A grid of training images, as the network sees them, each with the name of its class."""
    count, _, height, width = batch.images.shape
    sizes = torch.tensor([[height, width]] * count)
    whole = torch.tensor([[[0.0, 0.0, width, height]]] * count)  # a box around each image carries the name
    crowd, scales = torch.zeros(count, 1, dtype=torch.bool), torch.ones(count, 2, dtype=torch.float64)
    labels = batch.labels[:, None]
    return draw_batch(Batch(batch.images, sizes, whole, labels, crowd, scales, sizes, batch.paths), class_names)
