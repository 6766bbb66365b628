"""Timing that survives a noisy machine: contestants take turns, the ratio is taken per turn, medians are reported."""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Contest:
    """Seconds of two contestants that took turns.

    Attributes:
        name: what was measured.
        ours, peer: seconds per turn, of this package and of the other one.
    """

    name: str
    ours: list[float]
    peer: list[float]

    @property
    def ratio(self) -> float:
        """How many times faster this package is: the median over the turns of peer / ours."""
        return statistics.median(theirs / mine for mine, theirs in zip(self.ours, self.peer, strict=True))

    def to_dict(self) -> dict[str, float | str]:
        return {
            "name": self.name,
            "ours_ms": 1000 * statistics.median(self.ours),
            "peer_ms": 1000 * statistics.median(self.peer),
            "ratio": self.ratio,
        }


# Turns that are not counted: lazy initialisation, and an allocator that still has to learn which sizes to keep.
WARM_UP = 3


def contest(name: str, ours: Callable[[], object], peer: Callable[[], object], *, turns: int) -> Contest:
    """Time two callables in alternation, WARM_UP turns of each unmeasured first."""
    times = take_turns({"ours": ours, "peer": peer}, range(WARM_UP + turns))
    return Contest(name, times["ours"], times["peer"])


def take_turns(calls: Mapping[str, Callable[[], object]], turns: Iterable[int]) -> dict[str, list[float]]:
    """Seconds of each callable in each turn; a turn calls them all, one after the other.

    Args:
        calls: by name.
        turns: a range, or a progress bar over one; the first WARM_UP are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in turns:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            _wait_for_device()
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    return times


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> str:
    """The processor's name, torch's threads, and its version: without them a figure of speed says nothing."""
    return f"{next(_processor_names())}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _processor_names() -> Iterator[str]:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:  # Linux, but not on ARM
        yield from (line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    yield platform.processor() or platform.machine() or "unknown processor"
