"""Contestants for tests of timing. They import nothing: each is made in a process of its own."""

from __future__ import annotations

import os
import time
from typing import Any


def sleeper(milliseconds: float) -> Any:
    calls = [0]

    def call() -> None:
        calls[0] += 1
        time.sleep(milliseconds / 1000 if calls[0] % 3 == 0 else 0)  # two calls settle, the third is timed

    return call


def broken(where: str) -> Any:
    if where == "made":
        raise ValueError("cannot be made")

    def call() -> None:
        if where == "ended":
            os._exit(3)
        raise ValueError("cannot be called")

    return call
