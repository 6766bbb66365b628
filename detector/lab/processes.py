"""Contestants that take turns, each in a process of its own.

Runtimes keep threads that go on spinning after a call, and allocators, caches and thread pools of one get in the way of
another: in one process p50 was up to twice that of a process alone.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from detector.errors import InputError
from detector.lab.latency import WARM_UP

# Makes, in its process, what is timed. Pickled: a function of a module, or a partial of one.
Maker: TypeAlias = Callable[[], Callable[[], object]]


def take_turns_apart(makers: Mapping[str, Maker], turns: Iterable[int], *, settle: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each turn; as `latency.take_turns`, but for the processes.

    Args:
        makers: by name.
        turns: a range, or a progress bar over one; the first WARM_UP are not counted.
        settle: calls that are not timed before each that is: another process used the caches last.

    Raises:
        InputError: a contestant could not be made or failed; the message names it.
    """
    context = multiprocessing.get_context("spawn")
    workers = {name: _Worker(context, name, maker, settle) for name, maker in makers.items()}
    try:
        for worker in workers.values():
            worker.answer()  # it is ready
        times: dict[str, list[float]] = {name: [] for name in makers}
        for turn in turns:
            for name, worker in workers.items():
                worker.pipe.send(True)
                seconds = worker.answer()
                if turn >= WARM_UP:
                    times[name].append(seconds)
        return times
    finally:
        for worker in workers.values():
            worker.stop()


class _Worker:
    """A process, and this process's end of the pipe to it."""

    def __init__(self, context: Any, name: str, maker: Maker, settle: int) -> None:
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(maker, settle, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self) -> float:
        try:
            found = self.pipe.recv()
        except EOFError as error:
            self.process.join()
            raise InputError(f"{self.name}: its process ended with code {self.process.exitcode}.") from error
        if isinstance(found, str):
            raise InputError(f"{self.name}: {found}")
        return float(found)

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def _work(maker: Maker, settle: int, pipe: Connection) -> None:
    try:
        call = maker()
        pipe.send(0.0)
        while pipe.recv():
            for _ in range(settle):
                call()
            start = time.perf_counter()
            call()
            pipe.send(time.perf_counter() - start)
    except EOFError:
        pass  # nobody asks any more
    except Exception as error:  # of any library: it is told to the one who asks
        pipe.send(f"{type(error).__name__}: {error}")
