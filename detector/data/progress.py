"""The progress of whatever takes long: reading, drawing, predicting, measuring."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

SECONDS = 20  # between lines where there is no bar: a log of hours stays readable, and nobody takes it for hanging


def progress(items: Iterable[T], title: str, total: int | None = None, unit: str = "image") -> Iterable[T]:
    """The same items, with a bar on stderr where somebody watches a terminal and tqdm is installed (extra `train`).
    Elsewhere a line is logged every SECONDS.

    Args:
        items: what is gone through once.
        title: what is being done, before the bar.
        total: how many items there are, where they cannot say it themselves.
        unit: of an item.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        return _with_lines(items, title, total, unit)
    try:
        from tqdm import tqdm
    except ImportError:
        return _with_lines(items, title, total, unit)
    bar: Iterable[T] = tqdm(items, desc=title, total=total, unit=unit, leave=False)
    return bar


def _with_lines(items: Iterable[T], title: str, total: int | None, unit: str) -> Iterator[T]:
    if total is None and isinstance(items, Sized):
        total = len(items)
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        if (now := time.monotonic()) - last >= SECONDS:
            log.info("%s: %s %d%s", title, unit, done, f" of {total}" if total else "")
            last = now
        yield item
