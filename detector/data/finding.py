"""What a check of a data set gives: the reader of annotation files, training and the data doctor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

ERROR, WARNING, INFO = "error", "warning", "info"
KEPT = 1000  # entries that a finding names: all that somebody would repair by hand
SHOWN = 5  # of them, where there is a line for each


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its id.
        severity: error (training refuses it, or its metrics would be wrong), warning (look at it), info.
        count: how many entries are concerned.
        message: what it is.
        examples: the first KEPT of them, with split and id or file.
        remedy: what to do; empty for info that needs nothing.
        figures: numbers behind it, plain values.
    """

    check: str
    severity: str
    count: int
    message: str
    examples: tuple[str, ...] = ()
    remedy: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> tuple[str, ...]:
        return self.examples[:SHOWN]

    def __str__(self) -> str:
        """One sentence for the log: how many, what, examples, the remedy."""
        return f"{self.count} {self.message} ({'; '.join(self.first)}): {self.remedy}."

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self)) | {"examples": list(self.examples)}


def found(
    check: str, severity: str, culprits: Sequence[str], message: str, remedy: str, count: int | None = None
) -> list[Finding]:
    """A finding about these culprits, or `count` of which they are the first; none where there are none."""
    if not culprits:
        return []
    return [Finding(check, severity, count or len(culprits), message, tuple(culprits[:KEPT]), remedy)]
