"""How a backbone is trained and scored as an image classifier under Lightning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from detector.data.collate import Batch
from detector.data.image_folder import ImageBatch
from detector.models.light_head_rcnn import MEAN, STD
from detector.training.callbacks import Columns
from detector.training.plots import draw_batch
from detector.training.processes import world_size
from detector.training.schedule import OptimizerOptions, ScheduleOptions
from detector.training.task import Task, big_enough

if TYPE_CHECKING:
    from PIL.Image import Image

METRICS = ("top1", "top5", "loss_val")
_NAMED = 8  # files in a message


class ClassificationTask(Task):
    """One classifier, its loss, and its accuracy over the validation split.

    Takes raw uint8 pixels and normalises them as a detector does, so that the backbone is at home there.

    Args:
        network: what is trained.
        about: what a checkpoint says of itself, with a `provenance`; plain values.
        optimizer, schedule: see their classes.
        label_smoothing: share of the target that all classes have together (Szegedy et al. 2016, section 7).
    """

    entry = "classifier"
    columns = Columns(losses=("loss",), metrics=METRICS, shown=METRICS[:2])
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        about: Mapping[str, Any],
        *,
        optimizer: OptimizerOptions,
        schedule: ScheduleOptions,
        label_smoothing: float,
    ) -> None:
        super().__init__(network, optimizer, schedule)
        self.about = dict(about)
        self.label_smoothing = label_smoothing
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.sums: Tensor = torch.zeros(0)

    def describe(self) -> dict[str, Any]:
        return self.about

    def draw(self, batch: ImageBatch) -> Image:
        return draw_images(batch, self.about["class_names"])

    def summary(self) -> str:
        return f"last epoch: top-1 {self.metrics['top1']:.4f}, top-5 {self.metrics['top5']:.4f}"

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
            bad = [path for path, one in zip(batch.paths, losses, strict=True) if not torch.isfinite(one)]
            more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
            named = ", ".join(bad[:_NAMED])
            raise self.not_finite(f"on {len(bad)} of {len(losses)} images: {named}{more}", "them")
        self.log("loss", loss, prog_bar=True, batch_size=len(batch.labels))
        return loss

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)

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


def score(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over a batch: images, right at the first guess, right among five guesses, cross-entropy; (4,) float64.

    Where there are fewer than five classes, all are guessed. Classes that are exactly as likely come in torch's order.

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
