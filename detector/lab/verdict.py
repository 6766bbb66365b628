"""From measured times to a verdict: does breaking a guideline cost time on this machine?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

Verdict: TypeAlias = Literal["holds", "does not hold", "undecided"]

# What counts as a cost. Less than this is within what the order of the same operations changes, and no reason to
# design a network otherwise; chosen by this project. The smallest averages of the paper: 1.06 (table 3, ARM).
MARGIN = 1.05
DRAWS = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Effect:
    """How many times longer networks take that break a guideline, at equal multiply-adds.

    Attributes:
        ratio: the geometric mean over their rows and columns, the median over the turns.
        low, high: of a 95% interval.
    """

    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """By the interval: all above MARGIN, all below, or neither."""
        if self.low > MARGIN:
            return "holds"
        return "does not hold" if self.high < MARGIN else "undecided"

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"


def effect(seconds: np.ndarray, base: np.ndarray, seed: int = 0) -> Effect:
    """The cost of cells against those of the row that follows the guideline.

    The interval is a bootstrap that draws processes, and turns within them: memory that is placed badly slows a network
    for the whole life of its process.

    Args:
        seconds, base: (processes, turns, cells), the same cells in each: what breaks the guideline, and what follows it
            in the same column and turn.
        seed: of the draws.
    """
    ratios = np.log(seconds / base).mean(axis=2)
    rng = np.random.default_rng(seed)
    processes, turns = ratios.shape
    who = rng.integers(processes, size=(DRAWS, processes, 1))
    when = rng.integers(turns, size=(DRAWS, processes, turns))
    drawn = np.median(ratios[who, when].reshape(DRAWS, -1), axis=1)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Effect(*(float(np.exp(value)) for value in (np.median(ratios), low, high)))
