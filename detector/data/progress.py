"""The progress bar of whatever takes long: reading, drawing, predicting, measuring."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], title: str, total: int | None = None, unit: str = "image") -> Iterable[T]:
    """The same items, with a bar on stderr where somebody watches a terminal and tqdm is installed (extra `train`).

    Args:
        items: what is gone through once.
        title: what is being done, before the bar.
        total: how many items there are, where they cannot say it themselves.
        unit: of an item.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    # disable=None: silent where stderr is no terminal.
    bar: Iterable[T] = tqdm(items, desc=title, total=total, unit=unit, leave=False, disable=None)
    return bar
