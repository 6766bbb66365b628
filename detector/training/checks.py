"""The values of a configuration, checked where they enter: a wrong one must not surface as a riddle an hour later."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from detector.errors import InputError
from detector.evaluation.metrics import PROTOCOLS


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any, whole: bool = False) -> bool:
    return _is_any_number(value) and math.isfinite(value) and (isinstance(value, int) or not whole)


def or_null(rule: Rule) -> Rule:
    return Rule(f"{rule.words}, or null", lambda value: value is None or rule.holds(value))


def list_of(rule: Rule) -> Rule:
    return Rule(
        f"a list [...], each {rule.words}", lambda value: isinstance(value, list) and all(map(rule.holds, value))
    )


def one_of(*choices: Any) -> Rule:
    return Rule(f"one of {', '.join(map(str, choices))}", lambda value: value in choices)


NATURAL = Rule("a whole number, 0 or more", lambda value: _is_number(value, whole=True) and value >= 0)
COUNT = Rule("a whole number, 1 or more", lambda value: _is_number(value, whole=True) and value >= 1)
POSITIVE = Rule("a number above 0", lambda value: _is_number(value) and value > 0)
NOT_NEGATIVE = Rule("a number, 0 or more", lambda value: _is_number(value) and value >= 0)
SHARE = Rule("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
BELOW_ONE = Rule("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1)
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
FOLDER = Rule(
    "the name of a folder in data.root",
    lambda value: isinstance(value, str | int) and not isinstance(value, bool) and value != "",
)
DEVICES = Rule(
    "auto, a whole number from 1, or a list of device numbers",
    lambda value: value == "auto" or COUNT.holds(value) or (bool(value) and list_of(NATURAL).holds(value)),
)
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")

RULES: dict[str, Rule] = {
    "metrics": one_of(*PROTOCOLS),
    "report": Rule("false, or report.KEY=VALUE", lambda value: value is False),
    "report.pictures": NATURAL,
    "report.properties": NATURAL,
    "report.proposals": NATURAL,
    "report.doctor": NATURAL,
    "max_proposals": or_null(COUNT),
    "seed": NATURAL,
    "workers": NATURAL,
    "resume": FLAG,
    "ema": or_null(BELOW_ONE),
    "trainer.accelerator": one_of("auto", "cpu", "gpu", "cuda"),
    "trainer.devices": DEVICES,
    "trainer.nodes": COUNT,
    "trainer.precision": one_of(*PRECISIONS),
    "trainer.accumulate": COUNT,
    "trainer.log_every": COUNT,
    "trainer.progress_every": COUNT,
    "freeze.stages": one_of(0, 1, 2, 3, 4),
    "freeze.batch_norm": FLAG,
    "data.keep_empty": FLAG,
    "data.cache": FLAG,
    "data.train.limit": or_null(COUNT),
    "data.val.limit": or_null(COUNT),
    "data.generate.seed": NATURAL,
    "data.generate.train": COUNT,
    "data.generate.val": COUNT,
    "data.generate.size": COUNT,
    # Of pre-training: the folder of a split, which is a mapping for detection.
    "data.train": FOLDER,
    "data.val": FOLDER,
    "input.size": COUNT,
    "input.resize": COUNT,
    "input.short_side": COUNT,
    "input.long_side": COUNT,
    "train.batch_size": COUNT,
    "val.batch_size": COUNT,
    "val.every": COUNT,
    "augment.flip": SHARE,
    "augment.vertical_flip": SHARE,
    "augment.rotate90": SHARE,
    "augment.photometric": SHARE,
    "augment.crop": SHARE,
    "augment.colour": SHARE,
    "augment.scale": Rule(
        "two numbers [lowest, highest] above 0", lambda value: list_of(POSITIVE).holds(value) and len(value) == 2
    ),
    "label_smoothing": BELOW_ONE,
    "optimizer.name": one_of("sgd", "adamw"),
    "optimizer.lr": POSITIVE,
    "optimizer.base_batch": or_null(COUNT),
    "optimizer.momentum": BELOW_ONE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    # A mapping has been taken apart into optimizer.lr_scales.PREFIX.
    "optimizer.lr_scales": Rule("{prefix of parameter names: factor, ...}, or null", lambda value: value is None),
    "optimizer.clip_norm": or_null(POSITIVE),
    "schedule.kind": one_of("cosine", "linear", "steps"),
    "schedule.epochs": or_null(COUNT),
    "schedule.images": or_null(COUNT),
    "schedule.milestones": list_of(SHARE),
    "schedule.warmup_steps": NATURAL,
    "schedule.warmup_factor": SHARE,
    "schedule.final_share": SHARE,
}


def check_values(config: Mapping[str, Any]) -> None:
    """Check what a configuration has of the values above; `NetworkOptions` checks the network's.

    Raises:
        InputError: names the key, its value, and what it must be.
    """
    leaves = dict(_leaves(config))
    for key, rule in RULES.items():
        if key in leaves and not rule.holds(leaves[key]):
            raise InputError(f"{key}={_show(leaves[key])}: expected {rule.words}.")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_any_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _show(value: Any) -> str:
    """As it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
