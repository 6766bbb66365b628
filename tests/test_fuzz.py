"""Malformed inputs: see fuzz.py, which makes more of them, and one of them again by its seed."""

from __future__ import annotations

import itertools

import pytest
from fuzz import failures, run_many, table


@pytest.mark.slow
def test_no_mutant_ends_in_a_traceback_a_hang_or_a_wrong_result() -> None:
    outcomes = run_many(itertools.count(), 2000)
    print(table(outcomes))
    assert failures(outcomes) == {}, table(outcomes)
    assert sum(one.reached for one in outcomes) >= len(outcomes) / 2
