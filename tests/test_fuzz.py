"""Malformed inputs: see fuzz.py, which makes more of them, and one of them again by its seed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import fuzz
import pytest
from fuzz import Outcome, failures, run_many, table


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


@pytest.mark.slow
def test_no_mutant_ends_in_a_traceback_a_hang_or_a_wrong_result() -> None:
    outcomes = run_many(itertools.count(), 2000)
    print(table(outcomes))
    assert failures(outcomes) == {}, table(outcomes)
    assert sum(one.reached for one in outcomes) >= len(outcomes) / 2
