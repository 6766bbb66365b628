"""The progress bar: seen at a terminal, lines elsewhere, never in the way."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable

import pytest

from detector.data.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    assert list(progress(iter("abc"), "reading", total=3, unit="file")) == ["a", "b", "c"]
    assert "reading" in screen.getvalue()
    assert "/3" in screen.getvalue()
    assert "file" in screen.getvalue()


def test_a_file_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), "reading")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("items", "total", "of"), [(range(9), None, " of 9"), (iter(range(9)), None, ""), (iter(range(9)), 9, " of 9")]
)
def test_a_log_has_a_line_now_and_then(
    items: Iterable[int], total: int | None, of: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr("detector.data.progress.time.monotonic", lambda: now)
    seen = []
    with caplog.at_level("INFO"):
        for item in progress(items, "decode", total):
            seen.append(item)
            now += 7.0
    assert seen == list(range(9))
    assert caplog.messages == [f"decode: image 4{of}", f"decode: image 7{of}"]


def test_it_works_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(progress(range(3), "reading")) == [0, 1, 2]
