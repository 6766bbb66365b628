"""The controlled experiments of the guidelines: their costs, their verdicts, the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tool_runner import run_tool

from detector.lab import cost, guidelines
from detector.lab.controlled import COLUMNS, EQUAL, PUBLISHED, ROWS, SIDE, Cell, Guideline, cells, spread
from detector.lab.guidelines import GuidelinesOptions
from detector.lab.verdict import MARGIN, effect

ALL = [(guideline, place, equal) for guideline in ROWS for place in ("cpu", "cuda") for equal in (False, True)]


def by_column(found: list[Cell]) -> list[list[Cell]]:
    return [[cell for cell in found if cell.column == column] for column in COLUMNS]


@pytest.mark.parametrize(("guideline", "place", "equal"), ALL)
def test_costs_are_those_of_the_networks(guideline: Guideline, place: str, equal: bool) -> None:
    """By torch's counter of operations, and by what hooks see convolutions read and write."""
    for cell in cells(guideline, place, equal=equal):  # type: ignore[arg-type]
        network = cell.stack.build(cell.widths).to("meta")
        image = torch.empty(1, cell.widths[0], SIDE, SIDE, device="meta")
        assert cell.multiply_adds == cost.multiply_adds(network, image), cell.name
        if not cell.stack.bottleneck:
            assert cell.memory_access == cost.memory_access(network, image), cell.name


@pytest.mark.parametrize(("guideline", "place", "equal"), ALL)
def test_multiply_adds_of_a_column_are_equal(guideline: Guideline, place: str, equal: bool) -> None:
    found = cells(guideline, place, equal=equal)  # type: ignore[arg-type]
    for column in by_column(found):
        # Ma et al. 2018: "the number of FLOPs is fixed"; rounding leaves 5.5% in table 1.
        assert spread(column) <= (2.2 * EQUAL if equal else 0.055)


def test_the_papers_widths() -> None:
    widths = {cell.name: cell.widths for cell in cells("g1", "cpu")}
    assert widths["1:12, x1"] == (9, 108)
    assert widths["1:6, x4"] == (52, 312)
    assert {cell.name: cell.widths for cell in cells("g2", "cuda")}["g=8, x1"] == (360, 360)


def test_equal_widths_need_least_memory_access() -> None:
    """Section 2, G1: the bound is reached where input and output channels are as many, and at no other ratio."""
    for cell in cells("g1", "cpu"):
        assert cell.memory_access >= cell.memory_access_bound * (1 - 1e-12)
        reached = cell.memory_access == pytest.approx(cell.memory_access_bound, rel=1e-9)
        assert reached == (cell.widths[0] == cell.widths[1])


def test_published_speeds() -> None:
    """What the text of section 2 says of its tables: 8 groups up to 30% slower on ARM; 4 fragments 3 times on a GPU."""
    assert PUBLISHED["Snapdragon 810"]["g2"][3][0] / PUBLISHED["Snapdragon 810"]["g2"][0][0] == pytest.approx(
        0.7, abs=0.01
    )
    gpu = PUBLISHED["GTX 1080 Ti"]["g3"]
    assert gpu[0][0] / gpu[4][0] > 3
    # "Around 20% speedup is obtained on both GPU and ARM, after ReLU and shortcut are removed."
    for tables in PUBLISHED.values():
        assert np.mean([a / b for a, b in zip(tables["g4"][0], tables["g4"][3], strict=True)]) == pytest.approx(
            1.17, abs=0.03
        )


def planted(true: float, noise: float, seed: int, processes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of cells that take `true` times as long as their base, with noise between processes and turns."""
    rng = np.random.default_rng(seed)
    between = rng.normal(0, noise / 2, (processes, 1, 9))
    seconds = true * np.exp(between + rng.normal(0, noise, (processes, 12, 9)))
    return seconds, np.exp(rng.normal(0, noise, (processes, 12, 9)))


@pytest.mark.parametrize(
    ("true", "noise", "verdict"),
    [(1.3, 0.1, "holds"), (1.0, 0.05, "does not hold"), (0.8, 0.1, "does not hold"), (MARGIN, 0.2, "undecided")],
)
def test_verdict_of_planted_times(true: float, noise: float, verdict: str) -> None:
    assert effect(*planted(true, noise, seed=3)).verdict == verdict


def test_interval_covers_the_planted_ratio() -> None:
    """Over 200 planted experiments; five processes are few, so that a bootstrap's 95% is a little less in truth."""
    found = [effect(*planted(1.2, 0.1, seed), seed=seed) for seed in range(200)]
    assert np.mean([one.low <= 1.2 <= one.high for one in found]) > 0.8
    assert np.median([one.ratio for one in found]) == pytest.approx(1.2, rel=0.01)


def test_a_shuffled_order_is_put_right_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are made in another order in each process; what is measured of them stays theirs."""
    made: list[list[int]] = []

    def runner(cell: Cell, *_: object) -> int:
        made[-1].append(cell.multiply_adds)
        return cell.multiply_adds

    def take_turns(calls: dict[str, int], turns: int, _: str) -> dict[str, list[float]]:
        return {name: [float(call)] * turns for name, call in calls.items()}

    monkeypatch.setattr(guidelines, "_take_cores", lambda _: None)
    monkeypatch.setattr(guidelines, "runner", runner)
    monkeypatch.setattr(guidelines, "take_turns", take_turns)
    table = cells("g1", "cpu")
    for seed in range(3):
        made.append([])
        found = guidelines.measure(GuidelinesOptions(turns=2), {("g1", "paper"): table}, "", seed)
        costs = [cell.multiply_adds for cell in (*table, *table[:3])]
        assert found["g1", "paper"].tolist() == [costs, costs]
        assert sorted(made[-1]) == sorted(costs)
    assert made[0] != made[1] != made[2]


def test_other_backends_are_of_the_cpu() -> None:
    with pytest.raises(ValueError, match="device=cuda takes backend=torch"):
        GuidelinesOptions(device="cuda", backend="openvino")


def test_more_threads_than_cores(tmp_path: Path) -> None:
    outcome = run_tool("guidelines", "threads=4096", cwd=tmp_path)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "threads=4096: this machine has" in outcome.err


def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = run_tool("guidelines", "out=file/here", cwd=tmp_path)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "out" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "openvino", "onnxruntime"])
def test_command(tmp_path: Path, backend: str) -> None:
    tables = [("g1", "paper"), ("g1", "equal"), ("g4", "paper")]
    if backend != "torch":
        pytest.importorskip(backend)
        tables = tables[2:]  # each cell is an export
    asked = sorted({guideline for guideline, _ in tables})
    run_tool("guidelines", *asked, f"backend={backend}", "turns=1", "processes=1", "out=found", cwd=tmp_path).ok()
    assert (tmp_path / "found/guidelines.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "found/guidelines.json").read_text())
    assert [(table["guideline"], table["widths"]) for table in found["tables"]] == tables
    for table in found["tables"]:
        seconds = np.array([cell["seconds"] for cell in table["cells"]])
        assert seconds.shape == (12, 1, 1)
        # The speeds and the verdict follow from the seconds.
        flat = seconds.reshape(4, 3)
        assert [cell["relative_speed"] for cell in table["cells"]] == pytest.approx((flat[0] / flat).ravel().tolist())
        assert table["effects"]["effect"]["ratio"] == pytest.approx(np.exp(np.log(flat[1:] / flat[0]).mean()))
    text = (tmp_path / "found/guidelines.md").read_text()
    assert text.startswith("# The guidelines on this machine")
    assert backend in text
