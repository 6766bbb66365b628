"""Tables as text: what a Markdown reader takes for a table, whatever a class is called."""

from __future__ import annotations

from detector.evaluation.tables import markdown_table


def test_text_on_the_left_numbers_on_the_right() -> None:
    assert markdown_table(["class", "AP"], [["cat", 0.5], ["a dog", None]]).splitlines() == [
        "| class |  AP |",
        "|-------|-----|",
        "| cat   | 0.5 |",
        "| a dog |   - |",
    ]
    assert markdown_table(["n", "what"], [[10, "x"]], align="rl").splitlines()[-1] == "| 10 | x    |"


def test_long_text_folds_in_its_column_and_numbers_stay_whole() -> None:
    lines = markdown_table(["class", "AP"], [["long " * 40, "0.123456"]], width=60).splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) <= 60
    assert sum("0.123456" in line for line in lines) == 1
    assert " ".join(line.split("|")[1].strip() for line in lines[2:]).split() == ["long"] * 40


def test_without_a_width_every_row_is_one_line() -> None:
    lines = markdown_table(["class", *"abc"], [["long " * 90, 1, 2, 3], ["short", 4, 5, 6]], width=None).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert "long " * 89 in lines[2]


def test_names_are_no_markup() -> None:
    assert "[b]" in markdown_table(["[red]"], [["[b]"]])
    assert "[red]" in markdown_table(["[red]"], [["[b]"]])
