"""From the fields of a request to the options of its prediction."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from detector.errors import InputError
from detector.inference.predictor import PredictOptions, Predictor

# The options of a prediction that a request may set: none of them makes the server open or download anything.
NAMES = ("score_threshold", "max_proposals", "classes")
# Python's own float also takes 1_0, and digits of any script.
NUMBER = re.compile(r"([0-9]{1,4}(\.[0-9]{0,40})?|\.[0-9]{1,40})(e-?[0-9]{1,3})?")
_SHOWN = 40  # characters of a request's text that a message repeats


def read_options(given: Mapping[str, Sequence[str]], predictor: Predictor, score_threshold: float) -> PredictOptions:
    """The options in the fields of a form or a query.

    Args:
        given: name -> every value that it was given.
        predictor: whose classes and proposals they are.
        score_threshold: of a request that names none.

    Raises:
        InputError: an unknown name, a value that cannot be, or one value too many.
    """
    for name, values in given.items():
        if name not in NAMES:
            raise InputError(f"Unknown option {name[:_SHOWN]!r}; expected one of {', '.join(NAMES)}.")
        if name != "classes" and len(values) > 1:
            raise InputError(f"{name} is given {len(values)} times; once is enough.")
    thresholds, numbers, classes = (given.get(name, ()) for name in NAMES)
    max_proposals, limit = None, predictor.proposal_limit
    for text in thresholds:
        score_threshold = float(text) if NUMBER.fullmatch(text) else math.nan
        if not 0 <= score_threshold <= 1:
            raise InputError(f"score_threshold={text[:_SHOWN]!r}; expected a number from 0 to 1.")
    for text in numbers:
        if limit is None:
            raise InputError("max_proposals cannot be set on this detector; leave it out.")
        max_proposals = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
        if not 1 <= max_proposals <= limit:
            raise InputError(f"max_proposals={text[:_SHOWN]!r}; expected a whole number from 1 to {limit}.")
    for text in classes:
        if text not in predictor.class_names:
            known = ", ".join(predictor.class_names[:20]) + (", ..." if len(predictor.class_names) > 20 else "")
            raise InputError(f"classes={text[:_SHOWN]!r} is not a class of this detector; there is {known}.")
    return PredictOptions(
        score_threshold=score_threshold, max_proposals=max_proposals, classes=tuple(dict.fromkeys(classes)) or None
    )
