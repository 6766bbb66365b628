"""What the scores of a detector are worth: found on the validation split at the end of its training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.types import Strict

from detector.errors import InputError
from detector.models.calibrate import IDENTITY, LARGEST
from detector.options import Options, Share

Scale = Annotated[float, Strict(), Field(gt=0), Field(le=LARGEST)]
Shift = Annotated[float, Strict(), Field(ge=-LARGEST), Field(le=LARGEST)]


class OperatingPoint(Options):
    """Without any, nothing is known of the scores."""

    calibration: tuple[Scale, Shift] = IDENTITY
    """Scale and shift of the scores' logits, so that of the detections with a score of 0.7 about 70% are right."""
    thresholds: tuple[Share, ...] | None = None
    """For each class the calibrated score with the best F1 at IoU 0.5; null: not known."""

    def check(self, classes: int) -> OperatingPoint:
        """Itself. Raises InputError where it belongs to another number of classes."""
        if self.thresholds is not None and len(self.thresholds) != classes:
            raise InputError(f"thresholds: {len(self.thresholds)} of {classes} classes")
        return self
