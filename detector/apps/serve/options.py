"""The options of a request, and which of them a predictor knows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from detector.errors import InputError
from detector.inference.predictor import Predictor

NAMES = ("score_threshold", "max_proposals", "classes")
# Python's own float also takes 1_0, and digits of any script.
NUMBER = re.compile(r"([0-9]{1,4}(\.[0-9]{0,40})?|\.[0-9]{1,40})(e-?[0-9]{1,3})?")


@dataclass(frozen=True)
class Options:
    """What a request asks for.

    Attributes:
        score_threshold: detections below are left out; from 0 to 1.
        max_proposals: of each picture, the head looks at so many proposals; None: as many as the detector was made for.
        classes: names; detections of others are left out; None: all.
    """

    score_threshold: float
    max_proposals: int | None = None
    classes: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {"classes": None if self.classes is None else list(self.classes)}


@dataclass(frozen=True)
class Known:
    """What this predictor can be asked for.

    Attributes:
        score_threshold: of a request that names none.
        max_proposals: the largest that makes a difference; None: the predictor has no such option.
        class_names: label -> name.
    """

    score_threshold: float
    max_proposals: int | None
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, predictor: Predictor, score_threshold: float) -> Known:
        if not _is_share(score_threshold):
            raise InputError(f"score_threshold={score_threshold}; expected a number from 0 to 1.")
        return cls(score_threshold, predictor.proposal_limit, tuple(predictor.class_names))

    def read(self, given: Mapping[str, Sequence[str]]) -> Options:
        """The options in the fields of a form or a query: name -> every value that it was given.

        Raises:
            InputError: an unknown name, a value that cannot be, or one value too many.
        """
        for name, values in given.items():
            if name not in NAMES:
                raise InputError(f"Unknown option {name[:40]!r}; expected one of {', '.join(NAMES)}.")
            if name != "classes" and len(values) > 1:
                raise InputError(f"{name} is given {len(values)} times; once is enough.")
        return Options(
            self._threshold(given.get("score_threshold", ())),
            self._proposals(given.get("max_proposals", ())),
            self._classes(given.get("classes", ())),
        )

    def _threshold(self, values: Sequence[str]) -> float:
        for text in values:
            value = float(text) if NUMBER.fullmatch(text) else math.nan
            if not _is_share(value):
                raise InputError(f"score_threshold={text[:40]!r}; expected a number from 0 to 1.")
            return value
        return self.score_threshold

    def _proposals(self, values: Sequence[str]) -> int | None:
        for text in values:
            if self.max_proposals is None:
                raise InputError("max_proposals cannot be set on this detector; leave it out.")
            value = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
            if not 1 <= value <= self.max_proposals:
                raise InputError(
                    f"max_proposals={text[:40]!r}; expected a whole number from 1 to {self.max_proposals}."
                )
            return value
        return None

    def _classes(self, values: Sequence[str]) -> tuple[str, ...] | None:
        for text in values:
            if text not in self.class_names:
                known = ", ".join(self.class_names[:20]) + (", ..." if len(self.class_names) > 20 else "")
                raise InputError(f"classes={text[:40]!r} is not a class of this detector; there is {known}.")
        return tuple(dict.fromkeys(values)) or None


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
