"""The progress bar: seen at a terminal, silent elsewhere, never in the way."""

from __future__ import annotations

import io
import sys

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


def test_it_works_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(progress(range(3), "reading")) == [0, 1, 2]
