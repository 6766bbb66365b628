"""Which unit of a ShuffleNet V2 reads a channel: the shuffles of a stage, played through with numbers for channels.

The authors' released network (github.com/megvii-model/ShuffleNet-Series, ShuffleNetV2) and the one here are the same up
to the order of channels: theirs splits the channels of a unit into even ones, which pass, and odd ones, which its main
branch reads; here two halves are shuffled and split in the middle. Every channel passes some units and is then read.
"""

from __future__ import annotations

import numpy as np

UNITS = 64  # more than any stage has


def reads_here(channels: np.ndarray, units: int) -> list[np.ndarray]:
    """What main branches read where halves are shuffled, then split.

    Args:
        channels: (C,) numbers 0 to C - 1 of the channels that the first unit makes, in the order of its two halves.
        units: how many follow; number u of them makes C / 2 channels, numbered from C + u * C / 2 on.

    Returns:
        For each of the units, the numbers (C / 2,) that its main branch reads, in order; last, the result (C,).
    """
    reads = []
    for unit in range(units):
        kept, read = np.split(_shuffled(channels), 2)
        reads.append(read)
        channels = np.concatenate((kept, _made(channels, unit)))
    return [*reads, _shuffled(channels)]


def reads_of_authors(channels: np.ndarray, units: int) -> list[np.ndarray]:
    """The same for the authors: even channels pass, odd ones are read, nothing else is shuffled."""
    reads = []
    for unit in range(units):
        reads.append(channels[1::2])
        channels = np.concatenate((channels[::2], _made(channels, unit)))
    return [*reads, channels]


def uneven_order(channels: int) -> np.ndarray:
    """The order (C,) in which an uneven pair of branches must enter the units here to be the authors' network.

    The two agree up to the order of channels if every channel passes the same number of units before a main branch
    takes it: so both are sorted by that number. Entry p is the channel of the authors' order that is here at p.
    """
    numbers = np.arange(channels)
    here, theirs = (_passed(reads(numbers, UNITS), channels) for reads in (reads_here, reads_of_authors))
    order = np.empty(channels, np.int64)
    order[np.argsort(here, kind="stable")] = np.argsort(theirs, kind="stable")
    return order


def _passed(reads: list[np.ndarray], channels: int) -> np.ndarray:
    """How many units each channel (C,) of the first unit passes as it is."""
    passed = np.empty(channels, np.int64)
    for unit, read in enumerate(reads):
        passed[read[read < channels]] = unit
    return passed


def _shuffled(channels: np.ndarray) -> np.ndarray:
    return channels.reshape(2, -1).T.ravel()


def _made(channels: np.ndarray, unit: int) -> np.ndarray:
    half = len(channels) // 2
    return np.arange(half) + len(channels) + unit * half
