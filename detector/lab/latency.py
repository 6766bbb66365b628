"""Timing that survives a noisy machine: contestants take turns, and are compared turn by turn.

Each may have a process of its own. Runtimes keep threads that go on spinning after a call, and allocators, caches and
thread pools of one get in the way of another: in one process p50 was up to twice that of a process alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from typing import TypeAlias

import torch

from detector.data.progress import progress
from detector.errors import InputError
from detector.inference.memory import keep_freed_memory

Call: TypeAlias = Callable[[], object]
# Makes, in its process, what is timed. Pickled: a function of a module, or a partial of one.
Maker: TypeAlias = Callable[[], Call]

# Turns that are not counted: lazy initialisation, and an allocator that still has to learn which sizes to keep.
WARM_UP = 3


def take_turns(calls: Mapping[str, Call], turns: int, title: str, warm_up: int = WARM_UP) -> dict[str, list[float]]:
    """Seconds of each callable in each of `turns` turns, after `warm_up` that are not counted.

    A turn calls them all, one after the other.

    Args:
        calls: by name.
        title: before the progress bar.
    """
    return _alternate({name: partial(_seconds, call) for name, call in calls.items()}, turns, title, warm_up)


def take_turns_apart(makers: Mapping[str, Maker], turns: int, title: str, *, settle: int) -> dict[str, list[float]]:
    """As `take_turns`, each contestant in a process of its own.

    Args:
        makers: by name.
        settle: calls that are not timed before each that is: another process used the caches last.

    Raises:
        InputError: a contestant could not be made or failed; the message names it.
    """

    def answer(name: str, future: Future[float]) -> float:
        try:
            return future.result()
        except Exception as error:  # of any library, or of a process that ended
            raise InputError(f"{name}: {type(error).__name__}: {error}") from error

    with contextlib.ExitStack() as processes:
        pools = {
            name: processes.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
            for name in makers
        }
        for name, ready in {name: pools[name].submit(_make, maker) for name, maker in makers.items()}.items():
            answer(name, ready)

        def timed(name: str) -> float:
            return answer(name, pools[name].submit(_seconds_of_own, settle))

        return _alternate({name: partial(timed, name) for name in makers}, turns, title)


def _alternate(
    timers: Mapping[str, Callable[[], float]], turns: int, title: str, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    rows = [[timer() for timer in timers.values()] for _ in progress(range(warm_up + turns), title, unit="turn")]
    return {name: list(column) for name, column in zip(timers, zip(*rows[warm_up:], strict=True), strict=True)}


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


_own: list[Call] = []  # in the process of a contestant: what it times


def _make(maker: Maker) -> float:
    _own.append(maker())
    return 0.0


def _seconds_of_own(settle: int) -> float:
    for _ in range(settle):
        _own[0]()
    return _seconds(_own[0])


def milliseconds(seconds: Sequence[float]) -> float:
    """The median."""
    return 1000 * statistics.median(seconds)


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median over the turns of one contestant's time divided by another's."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


def take_cores(threads: int) -> None:
    """Pin this process to as many cores as there are threads, and keep the memory that a network frees."""
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    keep_freed_memory()


def machine() -> str:
    """The processor's name, torch's threads, and its version: without them a time says nothing."""
    return f"{next(_processor_names())}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _processor_names() -> Iterator[str]:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:  # Linux, but not on ARM
        yield from (line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    yield platform.processor() or platform.machine() or "unknown processor"
