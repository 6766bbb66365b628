"""How something is trained and scored under Lightning, and a Detector: a step, exact evaluation, checkpoint fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn

from detector.data.collate import Batch, EvaluationBatch
from detector.data.index import AnnotationIndex
from detector.data.results import Results
from detector.errors import InputError
from detector.evaluation.metrics import METRICS, compute_metrics, format_table
from detector.evaluation.operating_point import operating_point
from detector.inference.detector import Detector
from detector.inference.operating_point import OperatingPoint
from detector.models.calibrate import IDENTITY, calibrated
from detector.training.callbacks import Columns
from detector.training.plots import draw_batch
from detector.training.processes import rank, share_buffers, world_size
from detector.training.run_options import FreezeOptions
from detector.training.schedule import OptimizerOptions, ScheduleOptions, as_configured, configure

if TYPE_CHECKING:
    from PIL.Image import Image

    from detector.models.light_head_rcnn import Teach


class Task(lightning.LightningModule):
    """What is trained and scored; here what detectors and classifiers have in common.

    Args:
        network: the only child, so that checkpoint keys read `network....`.
        optimizer, schedule: see their classes; None for evaluation alone.

    Attributes:
        entry: of a checkpoint, under which it describes itself.
        columns: of the table of a run.
        metrics: of the last validation.
    """

    entry: ClassVar[str]
    columns: Columns

    def __init__(
        self, network: nn.Module, optimizer: OptimizerOptions | None = None, schedule: ScheduleOptions | None = None
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.optimizer_options, self.schedule = optimizer, schedule
        self.metrics: dict[str, Any] = {}
        self._restore: Callable[[], None] = lambda: None

    def describe(self) -> dict[str, Any]:
        """Everything but the weights, in plain types: the entry of a checkpoint."""
        raise NotImplementedError

    def draw(self, batch: Any) -> Image:
        """A grid of training images, as the network sees them."""
        raise NotImplementedError

    def summary(self) -> str:
        """The metrics of the last validation, for the log."""
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        assert self.optimizer_options is not None
        assert self.schedule is not None
        configured = configure(self.trainer, self.network, self.optimizer_options, self.schedule)
        self._restore = as_configured(configured["optimizer"], configured["lr_scheduler"]["scheduler"])
        return configured

    def on_train_start(self) -> None:
        self._restore()

    def on_train_epoch_start(self) -> None:
        self.metrics = {}  # of the weights from before

    def on_validation_epoch_start(self) -> None:
        share_buffers(self.network)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        metrics = {key: value for key, value in self.metrics.items() if key != "per_class"}
        now = {"epoch": int(self.current_epoch), "step": int(self.global_step), "metrics": metrics}
        about = self.describe()
        checkpoint[self.entry] = about | {"provenance": about["provenance"] | now}

    def not_finite(self, details: str, look_at: str) -> InputError:
        """What to say of a loss that is not finite."""
        return InputError(
            f"The loss is not finite at step {self.global_step} {details}. Look at {look_at}, lower optimizer.lr, or "
            "set optimizer.clip_norm=10; last.ckpt holds the state of the last finished epoch "
            "(ckpt=.../last.ckpt resume=true)."
        )


def worth(point: OperatingPoint, class_names: Sequence[str]) -> str:
    """What is known of the scores, in a line for people."""
    raw = ", ".join(f"{score} now reads {calibrated(score, *point.calibration):.2f}" for score in (0.5, 0.9))
    line = "scores: as the network gives them" if point.calibration == IDENTITY else f"scores: calibrated; {raw}"
    if not point.thresholds:
        return line
    (low, easy), (high, hard) = (pick(zip(point.thresholds, class_names, strict=True)) for pick in (min, max))
    return f"{line}; score_threshold=auto shows a class from {low:.2f} ({easy}) to {high:.2f} ({hard}) on"


class DetectionTask(Task):
    """One detector, its losses, and COCO's metrics over the validation split.

    Args:
        detector: what is trained.
        val_index: what it is scored on.
        optimizer, schedule: see their classes; None for evaluation alone.
        freeze: what of the backbone stays as it is, see `Backbone.freeze`; None: nothing.
        teach: says of what class RoIs are, for a loss more, `head_teacher`.
        calibrate: find in each validation what the scores are worth, for the checkpoint.
    """

    entry = "detector"
    columns = Columns(
        losses=("loss", "loss_rpn_objectness", "loss_rpn_box", "loss_head_class", "loss_head_box"),
        metrics=METRICS,
        shown=("AP", "AP50", "AP75"),
    )

    def __init__(
        self,
        detector: Detector,
        val_index: AnnotationIndex | None = None,
        *,
        optimizer: OptimizerOptions | None = None,
        schedule: ScheduleOptions | None = None,
        freeze: FreezeOptions | None = None,
        calibrate: bool = False,
        teach: Teach | None = None,
    ) -> None:
        super().__init__(detector.network, optimizer, schedule)
        self.detector, self.val_index, self.calibrate = detector, val_index, calibrate
        self.teach = teach
        if teach:
            losses = (*self.columns.losses, "loss_head_teacher")
            self.columns = self.columns._replace(losses=losses)
        self.operating_point = detector.operating_point
        self.results = Results.of([], [])
        self._found: list[Results] = []
        freeze = freeze or FreezeOptions(stages=0, batch_norm=False)
        self._frozen_norms = detector.network.backbone.freeze(freeze.stages, batch_norm=freeze.batch_norm)
        self._keep_frozen()  # Lightning trains in the modes that it finds, and does not call `train`

    def describe(self) -> dict[str, Any]:
        return self.detector.describe() | {"operating_point": self.operating_point.to_dict()}

    def draw(self, batch: Batch) -> Image:
        return draw_batch(batch, self.detector.class_names)

    def summary(self) -> str:
        assert self.val_index is not None
        table = format_table(self.metrics, f"{self.val_index.annotation_file}, last epoch")
        return f"\n{table}\n\n{worth(self.operating_point, self.detector.class_names)}\n"

    def train(self, mode: bool = True) -> DetectionTask:
        super().train(mode)
        self._keep_frozen()
        return self

    def _keep_frozen(self) -> None:
        for norm in self._frozen_norms:
            norm.eval()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.operating_point = self.detector.operating_point  # likewise

    def training_step(self, batch: Batch, _: int) -> Tensor:
        with big_enough():
            losses = self.network(batch, self.teach)
        total = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(total):
            parts = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
            raise self.not_finite(f"({parts}) on the images {list(batch.image_ids)}", "their boxes")
        self.log_dict({f"loss_{name}": value for name, value in losses.items()}, batch_size=len(batch))
        self.log("loss", total, prog_bar=True, batch_size=len(batch))
        return total

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._found = []

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
            outcome = [compute_metrics(self.results, self.val_index)]
            if self.calibrate:
                self.operating_point = OperatingPoint.parse(operating_point(self.results, self.val_index))
        if world_size() > 1:
            dist.broadcast_object_list(outcome, src=0)
        self.metrics = outcome[0]
        # An empty split of one size has no value (None); the monitored metrics always have a number.
        for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"):
            self.log(name, float(self.metrics[name] or 0.0), prog_bar=name == "AP")


@contextmanager
def big_enough() -> Iterator[None]:
    """Say by the names of the options why torch's normalisation refuses a small image alone in its batch.

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
