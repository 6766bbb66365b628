"""Where the time of a run goes: every second belongs to one part."""

from __future__ import annotations

import time


class Clock:
    """Books the time since the last booking, or since it was made, on a part.

    Attributes:
        seconds: of each part, in the order of their first booking; together all the time until the last booking.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def book(self, part: str) -> float:
        """Seconds since the last booking, now those of this part."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        self.seconds[part] = self.seconds.get(part, 0.0) + elapsed
        return elapsed
