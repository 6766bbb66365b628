"""What the scores of a detector are worth: found on the validation split at the end of its training."""

from __future__ import annotations

from detector.errors import InputError
from detector.options import Options, Share


class OperatingPoint(Options):
    """Without any, nothing is known of the scores."""

    thresholds: tuple[Share, ...] | None = None
    """For each class the score with the best F1 at IoU 0.5; null: not known."""

    def check(self, classes: int) -> OperatingPoint:
        """Itself. Raises InputError where it belongs to another number of classes."""
        if self.thresholds is not None and len(self.thresholds) != classes:
            raise InputError(f"thresholds: {len(self.thresholds)} of {classes} classes")
        return self
