"""Rows as a text table: one form for logs, terminals and Markdown pages."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence


def markdown_table(
    heads: Sequence[str], rows: Iterable[Sequence[object]], *, align: str = "", width: int | None = 110
) -> str:
    """A Markdown table with lines of ASCII, columns as wide as what is in them. It ends without a newline.

    Args:
        heads: of the columns.
        rows: a cell for each column; None, where there is no value, is shown as "-".
        align: "l" or "r" for each column: text is on the left and folds where it is too long; numbers are on the right
            and never fold. Columns beyond its end, and all where it is empty, are numbers; the first is text then.
        width: of a line in characters, where text folds; None never folds: every row is one line, as Markdown needs it.

    >>> print(markdown_table(["class", "AP"], [["cat", "0.5"], ["dog", None]]))
    | class |  AP |
    |-------|-----|
    | cat   | 0.5 |
    | dog   |   - |
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.MARKDOWN)
    for head, side in zip(heads, (align or "l").ljust(len(heads), "r"), strict=True):
        table.add_column(
            Text(head),
            justify="left" if side == "l" else "right",
            overflow="fold",
            no_wrap=side == "r" or width is None,
        )
    for row in rows:
        # Text, because a class name such as "[b]" would be read as markup.
        table.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
    if width is None:
        width = Console(width=10_000).measure(table).maximum
    text = io.StringIO()
    Console(file=text, width=width, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())
