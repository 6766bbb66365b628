"""Where the time of an evaluation goes, measured while Lightning runs it."""

from __future__ import annotations

from typing import Any

import lightning
import torch

from detector.evaluation.clock import Clock


class PartTimes(lightning.Callback):
    """Books the time of validation on decode, network, post-process and metrics.

    The border between network and post-process is where the head's forward pass ends: boxes are decoded, suppressed
    by class and put back into original pixels after it. Asynchronous devices are waited for at each border.

    Attributes:
        clock: takes the bookings.
        seconds_per_image: of network and post-process together, one value for each batch.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seconds_per_image: list[float] = []
        self._handles: list[Any] = []
        self._spent = 0.0
        self._after_head = False

    def on_validation_start(self, _: lightning.Trainer, task: Any) -> None:
        self._handles = [
            task.network.backbone.register_forward_pre_hook(self._on_backbone),
            task.network.head.register_forward_hook(self._on_head),
        ]
        self._book("load")

    def on_validation_batch_start(self, *_: Any) -> None:
        self._book("decode")
        self._spent, self._after_head = 0.0, False

    def on_validation_batch_end(
        self, _: lightning.Trainer, __: lightning.LightningModule, ___: Any, batch: Any, ____: int, _____: int = 0
    ) -> None:
        self._spent += self._book("post-process")
        if len(batch):
            self.seconds_per_image.append(self._spent / len(batch))

    def on_validation_epoch_end(self, *_: Any) -> None:
        self._book("decode")  # The callbacks' turn comes before the task's, which scores.

    def on_validation_end(self, *_: Any) -> None:
        self._book("metrics")
        for handle in self._handles:
            handle.remove()

    def _on_backbone(self, *_: Any) -> None:
        # A step goes through the network once for each canvas size.
        if self._after_head:
            self._spent += self._book("post-process")
            self._after_head = False

    def _on_head(self, *_: Any) -> None:
        self._spent += self._book("network")
        self._after_head = True

    def _book(self, part: str) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self.clock.book(part)
