"""A trained detector says of what class the RoIs of another are: knowledge distillation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detector.errors import InputError
from detector.inference.detector import Detector
from detector.inference.shipped import find
from detector.models.weights import first_three
from detector.training.warm_start import matched


class Teacher:
    """What a detector says of RoIs that it has not proposed.

    It sees the pixels that the learner sees, at the learner's size, in bfloat16 on a processor with units for it (AMX).
    It learns nothing, and no checkpoint holds it.

    Args:
        ckpt: as of `Detector.load`.
        class_names: of the detector that learns, in its order. The teacher may know more, in another: what it takes for
            one of those is background to the learner, as the annotations say.

    Raises:
        InputError: there is no such detector, it does not know all the classes, or has one name for two.
    """

    def __init__(self, ckpt: str, class_names: Sequence[str]) -> None:
        try:
            detector = Detector.load(find(ckpt), "cpu", precision="bf16" if fast_in_bf16() else "float32")
        except InputError as error:
            raise InputError(f"teacher={ckpt}: {error} A run goes on without one with teacher=null.") from error
        labels = matched(class_names, detector.class_names)
        if unknown := [name for name, label in zip(class_names, labels, strict=True) if label is None]:
            raise InputError(
                f"teacher={ckpt}: it does not know {first_three(unknown)}. A teacher has to know all classes."
            )
        if doubled := [name for name, label in zip(class_names, labels, strict=True) if labels.count(label) > 1]:
            raise InputError(
                f"teacher={ckpt}: it has one class for {first_three(doubled)}. Merge them, or teacher=null."
            )
        self.network, self.labels = detector.network.eval(), torch.tensor(labels)
        self.bf16 = detector.precision == "bf16"

    @torch.no_grad()
    def __call__(self, images: Tensor, rois: Tensor) -> Tensor:
        """Probabilities (N, P, K + 1) of the learner's classes and of background.

        Args:
            images: uint8 RGB (N, 3, H, W).
            rois: (N, P, 4) xyxy in pixels of `images`.
        """
        if self.labels.device != images.device:
            self.network, self.labels = self.network.to(images.device), self.labels.to(images.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.network.class_logits(images, rois)
        known = logits.float().softmax(dim=-1)[..., self.labels]
        return torch.cat((known, (1 - known.sum(dim=-1, keepdim=True)).clamp(min=0)), dim=-1)


def fast_in_bf16() -> bool:
    """Whether this processor has tiles for bfloat16; torch has no public word for it."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
