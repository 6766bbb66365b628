"""One thread that has the network, and a bounded number of requests that may be here for it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

log = logging.getLogger(__name__)


class Full(Exception):
    """Every place is taken."""


class Worker:
    """Runs jobs one after the other, away from the event loop.

    A place is taken before a request's body is read, and given back when its job has ended, or when it is known that
    there will be none: a job that nobody waits for any more still has the network, and so keeps its place.
    """

    def __init__(self, places: int) -> None:
        self._places = threading.BoundedSemaphore(places)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="detector")

    def place(self) -> Place:
        """Take a place.

        Raises:
            Full: there is none.
        """
        if not self._places.acquire(blocking=False):
            raise Full
        return Place(self._places, self._executor)

    def close(self) -> None:
        """Let the running job end, and drop the others."""
        self._executor.shutdown(wait=True, cancel_futures=True)


class Place:
    """The place of one request; use as a context manager."""

    def __init__(self, places: threading.BoundedSemaphore, executor: ThreadPoolExecutor) -> None:
        self._places, self._executor = places, executor
        self._job: Future[Any] | None = None

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        if self._job is None:
            self._places.release()

    def submit(self, job: Callable[[], Any]) -> asyncio.Future[Any]:
        """Queue the one job of this place. Cancelling the future that this returns drops a job that has not begun."""
        self._job = self._executor.submit(job)
        self._job.add_done_callback(lambda _: self._places.release())
        return asyncio.wrap_future(self._job)
