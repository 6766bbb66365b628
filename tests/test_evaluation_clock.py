"""Every second belongs to one part."""

from __future__ import annotations

import time

import pytest

from detector.evaluation.clock import Clock


def test_parts_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 101.5, 104.5, 104.75])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    assert [clock.book(part) for part in ("decode", "network", "decode")] == [1.5, 3.0, 0.25]
    assert clock.seconds == {"decode": 1.75, "network": 3.0}
    assert list(clock.seconds) == ["decode", "network"]
