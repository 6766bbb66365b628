"""Malformed inputs: see fuzz.py, which makes more of them, and one of them again by its seed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import fuzz
import pytest
from fuzz import Outcome, run_many
from tool_runner import run_process


def test_a_run_leaves_its_failures_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    at_work = []

    def run_one(shop: SimpleNamespace, seed: int) -> Outcome:
        at_work.append((shop.folder / "current").read_text())
        return Outcome("images", seed, "KeyError: 'x'" if seed == 8 else "used", True, 0.0)

    monkeypatch.setattr(fuzz, "Workshop", lambda folder: SimpleNamespace(folder=folder))
    monkeypatch.setattr(fuzz, "run_one", run_one)
    run_many(iter([7, 8, 9]), 3, Path("kept.jsonl"))
    assert at_work == ["7\n", "8\n", "9\n"]
    assert [path.name for path in tmp_path.iterdir()] == ["kept.jsonl"]
    assert json.loads(Path("kept.jsonl").read_text())["seed"] == 8


MUTANTS = """
import itertools
from fuzz import failures, run_many, table
outcomes = run_many(itertools.count(), 2000)
print(table(outcomes))
assert failures(outcomes) == {}
assert sum(one.reached for one in outcomes) >= len(outcomes) / 2
"""


@pytest.mark.slow
def test_no_mutant_ends_in_a_traceback_a_hang_or_a_wrong_result(tmp_path: Path) -> None:
    """In a process of its own, so that one that ends it is told, and its seed."""
    command = [sys.executable, "-X", "faulthandler", "-c", MUTANTS]
    ended = run_process(command, Path(__file__).parent, timeout=1200, TMPDIR=str(tmp_path))
    print(ended.out)
    at_work = [path.read_text().strip() for path in tmp_path.glob("fuzz*/current")]
    assert ended.code == 0, f"exit code {ended.code}, seed at work {at_work}\n{ended.err[-10_000:]}"
