"""The paper's speed tables: published numbers, stacks of equal cost, contests that are kept, relative speeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tool_runner import run_tool
from torchvision.models.shufflenetv2 import channel_shuffle

from detector.errors import InputError
from detector.lab import speed
from detector.lab.benchmark import BenchmarkOptions, benchmark_speed
from detector.lab.controlled import BLOCKS
from detector.lab.cost import multiply_adds
from detector.lab.networks import published_networks
from detector.lab.speed import rows_of, speed_tables, text_of
from detector.lab.speed_tables import SECTIONS, UNIT_WIDTHS, Section, Units, build_units

BY_TITLE = {section.title: section for section in SECTIONS}
TABLE_8, TABLE_7 = SECTIONS[0], SECTIONS[-1]


def published(section: Section, name: str) -> dict[tuple[str, int], float]:
    """Speeds of a network by device and batch."""
    return {(one.device, one.batch): one.speeds[name] for one in section.columns() if name in one.speeds}


@pytest.mark.parametrize(
    ("title", "name", "gpu", "arm"),
    [
        ("Table 8: ImageNet classifiers", "v2_1x", (8, 341), 24.4),
        ("Table 8: ImageNet classifiers", "mobilenet_v2_0.75", (8, 235), 15.9),
        ("Table 8: ImageNet classifiers", "mobilenet_v1_0.25", (8, 502), 36.4),
        ("Appendix, table 1 (a): classifiers at 320 x 320", "v2_0.5x", (8, 315), 28.1),
        ("Appendix, table 1 (a): classifiers at 320 x 320", "mobilenet_v2_1.4", (1, 335), 2.7),
        ("Appendix, table 1 (a): classifiers at 640 x 480", "v1_0.5x", (1, 396), 8.0),
        ("Appendix, table 1 (a): classifiers at 1080 x 720", "xception_2x", (1, 106), 0.4),
        ("Appendix, table 1 (b): 10 units on a map of 56 x 56", "mobilenet_v2_c128", (8, 125), 10.0),
        ("Appendix, table 1 (b): 10 units on a map of 28 x 28", "v1_c256", (8, 60), 13.2),
        ("Table 7: Light-Head R-CNN at 1200 x 800", "v2star_2x", (4, 83), None),
    ],
)
def test_published_speeds(title: str, name: str, gpu: tuple[int, float], arm: float | None) -> None:
    expected = {("GTX 1080 Ti", gpu[0]): gpu[1]} | ({} if arm is None else {("Snapdragon 810", 1): arm})
    assert published(BY_TITLE[title], name) == expected


def test_every_cell_has_its_speeds() -> None:
    assert TABLE_8.levels().keys() == published_networks().keys()  # those whose error table 8 gives
    assert [len(section.levels()) for section in SECTIONS] == [22, 12, 12, 16, 16, 16, 20]
    for section in SECTIONS:
        for name in section.levels():
            assert len(published(section, name)) == (1 if section is TABLE_7 else 2), name


def test_what_the_paper_says_of_table_8() -> None:
    """Section 4: at 500 M V2 is 58% faster than MobileNet V2 on the GPU, 63% than V1, 25% than Xception."""
    speeds = {name: published(TABLE_8, name)["GTX 1080 Ti", 8] for name in TABLE_8.levels()}
    for name, faster in (("mobilenet_v2_1.4", 0.58), ("v1_2x", 0.63), ("xception_2x", 0.25)):
        assert speeds["v2_2x"] / speeds[name] - 1 == pytest.approx(faster, abs=0.006)


def test_levels_are_of_about_equal_cost() -> None:
    millions = {name: one.published.multiply_adds for name, one in published_networks().items() if one.published}
    for name, level in TABLE_8.levels().items():
        assert abs(math.log(millions[name] / (40, 140, 300, 550)[level])) < 0.1, name


@pytest.mark.parametrize("family", ["v2", "v1", "mobilenet_v2", "xception"])
def test_units_cost_what_those_of_v2_cost(family: str) -> None:
    """By torch's counter. The paper says equal; its other tables allow themselves 1 to 5.5% (table 1)."""
    for width in UNIT_WIDTHS:
        with torch.device("meta"):
            units, channels = build_units(f"{family}_c{width}")
            assert len(units) == BLOCKS
            cost = multiply_adds(Units(units[0]), torch.empty(1, channels, 28, 28))
        # Ma et al. 2018, figure 3 (c): two 1x1 and a depthwise 3x3 on half of the channels.
        expected = 28**2 * (2 * (width // 2) ** 2 + 9 * width // 2)
        assert cost == (expected if family == "v2" else pytest.approx(expected, rel=0.025))


def test_units_of_v2_shuffle_once_each() -> None:
    units, channels = build_units("v2_c64")
    expected = images = torch.randn(2, channels, 5, 6)
    for unit in units.eval():
        kept, x = channel_shuffle(expected, 2).chunk(2, dim=1)
        expected = torch.cat((kept, unit.branch2(x)), dim=1)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(units(images), expected)


def planted(seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {"turns": 3, "seconds": seconds, "multiply_adds": dict.fromkeys(seconds, 10**8)}


def test_relative_speeds() -> None:
    contest = planted({"v2_1x": [1.0, 2.0, 4.0], "v1_1x": [2.0, 2.0, 2.0], "v2_50": [8.0, 8.0, 8.0]})
    rows = {row["network"]: row for row in rows_of(TABLE_8, {f"{TABLE_8.title}, batch 8": contest})}
    # Turn by turn v2_1x takes 1/2, 1 and 2 of V1's time: the median is 1.
    assert rows["v1_1x"]["here"] == {8: {"ms": 2000.0, "speed": 0.5, "relative": 1.0}}
    assert rows["v2_50"]["here"][8]["relative"] == 0.25
    assert rows["v1_1x"]["paper"][0] == {"speed": 213, "relative": 213 / 341}
    assert rows["v2_50"]["paper"] == [None, None]
    text = text_of(TABLE_8, [*rows.values()])
    assert "2000 (1.00)" in text
    assert "213 (0.62)" in text


def test_units_are_compared_at_equal_width() -> None:
    section = SECTIONS[1]
    contest = planted({"v2_c64": [1.0], "v2_c128": [3.0], "xception_c64": [2.0], "xception_c128": [3.0]})
    rows = {row["network"]: row for row in rows_of(section, {f"{section.title}, batch 1": contest})}
    relative = {name: row["here"][1]["relative"] for name, row in rows.items()}
    assert relative == {"v2_c64": 1.0, "v2_c128": 1.0, "xception_c64": 0.5, "xception_c128": 1.0}


@pytest.mark.parametrize(("power", "expected"), [(-1.0, "1.00"), (1.0, "-1.00")])
def test_rank_correlation_with_the_paper(power: float, expected: str) -> None:
    column = TABLE_8.columns()[0]
    contest = planted({name: [one**power] for name, one in column.speeds.items()})
    text = text_of(TABLE_8, rows_of(TABLE_8, {f"{TABLE_8.title}, batch 8": contest}))
    assert f"GTX 1080 Ti, batch 8: {expected} over 22 networks; {expected} among" in text
    assert "correlation with Snapdragon" not in text  # one image at a time was not measured


@pytest.fixture
def contests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Titles and turns of the contests that are run, in a table of units; a turn takes 0.1 seconds a network."""
    run: list[tuple[str, int]] = []

    def take_turns(calls: dict[str, Any], turns: int, title: str, **_: int) -> dict[str, list[float]]:
        run.append((title, turns))
        return {name: [0.1] * turns for name in calls}

    monkeypatch.setattr(speed, "take_cores", lambda _: None)
    monkeypatch.setattr(speed, "take_turns", take_turns)
    monkeypatch.setattr(speed, "_call", lambda *_: (None, 10**8))
    monkeypatch.setattr(speed, "plot", lambda *_: None)
    return run


def measure_units(out: Path, turns: int = 15) -> dict[str, Any]:
    speed_tables(["units"], {}, str(out), threads=1, turns=turns)
    found: dict[str, Any] = json.loads((out / "speed.json").read_text())
    return found


def test_a_run_goes_on(tmp_path: Path, contests: list[tuple[str, int]]) -> None:
    found = measure_units(tmp_path)
    *_, last = found["contests"]
    del found["contests"][last]
    for contest in found["contests"].values():
        contest["seconds"] = {name: [123.0] for name in contest["seconds"]}
    (tmp_path / "speed.json").write_text(json.dumps(found))
    contests.clear()
    again = measure_units(tmp_path)["contests"]
    assert [title for title, _ in contests] == [f"{last}, first turn", last]
    assert {title: contest["seconds"]["v1_c64"][0] for title, contest in again.items()} == {
        title: 0.1 if title == last else 123.0 for title in again
    }
    assert "1.23e+05 (1.00)" in (tmp_path / "speed.md").read_text()


def test_a_run_that_was_killed_has_what_was_done(
    tmp_path: Path, contests: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fine: Callable[..., Any] = speed._contest

    def killed(title: str, *rest: Any) -> Any:
        if "28 x 28" in title:
            raise KeyboardInterrupt
        return fine(title, *rest)

    monkeypatch.setattr(speed, "_contest", killed)
    with pytest.raises(KeyboardInterrupt):
        measure_units(tmp_path)
    assert len(json.loads((tmp_path / "speed.json").read_text())["contests"]) == 2


@pytest.mark.parametrize("change", ["machine", "turns"])
def test_another_machine_or_other_options_start_anew(
    tmp_path: Path, contests: list[tuple[str, int]], change: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = measure_units(tmp_path)
    found["machine"] = "a quicker one" if change == "machine" else found["machine"]
    (tmp_path / "speed.json").write_text(json.dumps(found))
    contests.clear()
    with caplog.at_level("INFO"):
        measure_units(tmp_path, turns=15 if change == "machine" else 5)
    assert len(contests) == 8
    assert f"speed.json has other values of {change}: all is measured anew." in caplog.text


@pytest.mark.parametrize(("budget", "turns"), [(1000.0, 15), (6.1, 5), (0.5, 3)])
def test_slow_contests_have_fewer_turns(
    tmp_path: Path, contests: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, budget: float, turns: int
) -> None:
    """A turn of 12 networks takes 1.2 seconds."""
    monkeypatch.setattr(speed, "BUDGET", budget)
    found = measure_units(tmp_path)
    assert {contest["turns"] for contest in found["contests"].values()} == {turns}
    assert contests[1][1] == turns


def test_what_a_user_can_get_wrong(tmp_path: Path, contests: list[tuple[str, int]]) -> None:
    def run(**values: Any) -> None:
        benchmark_speed(BenchmarkOptions.parse({"what": "speed", "out": str(tmp_path)} | values), 3)

    with pytest.raises(InputError, match=r"only=.*resnet50"):
        run(only=["resnet50"], tables="table7")
    with pytest.raises(InputError, match="one number for speed"):
        run(threads=[1, 2])
    with pytest.raises(InputError, match=r"threads=.*4096"):
        run(threads=4096)
    with pytest.raises(InputError, match="tables"):
        run(tables="table9")
    (tmp_path / "speed.json").write_text("[]")
    with pytest.raises(InputError, match="holds no contests"):
        run(tables="units")
    assert contests == []


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    words = ("speed", "only=[v2_0.5x,v2_1x]", "tables=[table8,table7]", "turns=3", "out=found")
    run_tool("benchmark", *words, cwd=tmp_path).ok()
    found = json.loads((tmp_path / "found/speed.json").read_text())
    assert {title: len(one["seconds"]["v2_1x"]) for title, one in found["contests"].items()} == {
        f"{section.title}, batch {batch}": 3 for section in (TABLE_8, TABLE_7) for batch in section.batches
    }
    assert found["contests"][f"{TABLE_8.title}, batch 1"]["multiply_adds"]["v2_1x"] == pytest.approx(144.9e6, rel=1e-3)
    # At 800 x 1200 worked out by hand, in G: 2.33 + 2.09 + 1.74 + 1.18, and the few outputs of RPN and head.
    assert found["contests"][f"{TABLE_7.title}, batch 4"]["multiply_adds"]["v2_1x"] == pytest.approx(7.34e9, rel=0.03)
    assert found["tables"][TABLE_8.title][0]["here"]["8"]["relative"] > 1  # 0.5x is faster
    assert (tmp_path / "found/speed.png").stat().st_size > 10_000
    assert "341 (1.00)" in (tmp_path / "found/speed.md").read_text()
    again = run_tool("benchmark", *words, cwd=tmp_path).ok()
    assert json.loads((tmp_path / "found/speed.json").read_text()) == found
    assert "anew" not in again.err


def test_classifiers_of_every_backbone_are_measured_and_published_networks_of_the_other_tables() -> None:
    names = ["resnet50", "v2_1x", "v2star_1x"]
    wanted = {"table8": names, "appendix": names, "table7": ["v2_1x", "v2star_1x"]}
    for section in SECTIONS:
        if section.table in wanted:
            assert sorted(speed._chosen(section, names)) == wanted[section.table], section.title
