"""Scores that mean what they say: Platt scaling, on arrays and on tensors."""

from __future__ import annotations

import math
from typing import Any, TypeVar

Scores = TypeVar("Scores", bound=Any)  # a numpy array or a torch tensor
# What changes nothing.
IDENTITY = (1.0, 0.0)
# A scale or shift beyond makes a step of the scores, and overflows. Chosen by this project.
LARGEST = 32.0


def calibrated(scores: Scores, scale: float, shift: float) -> Scores:
    """sigmoid(scale * logit(score) + shift), Platt 1999 (Probabilistic outputs for support vector machines), eq. 1.

    Monotone: the order stays, and with it AP. Written without a logarithm, so that 0 and 1 stay what they are in every
    runtime: scores of 0 mark places without a detection.
    """
    for_it, against = scores**scale, math.exp(-shift) * (1 - scores) ** scale
    return for_it / (for_it + against)
