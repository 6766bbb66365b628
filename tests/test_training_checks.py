"""Which values of a configuration are accepted."""

from __future__ import annotations

import math
from typing import Any

import launch
from launch import compose_config, plain, resolve

import pytest

from detector.errors import InputError
from detector.training.checks import check_values

RECIPES = sorted(path.stem for path in (launch.CONF / "recipe").glob("*.yaml"))
PRETRAINING = sorted(path.stem for path in (launch.CONF / "pretrain").glob("*.yaml"))


def nested(key: str, value: Any) -> dict[str, Any]:
    name, _, rest = key.partition(".")
    return {name: nested(rest, value) if rest else value}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("detector", ["light_head_s", "light_head_l"])
def test_what_is_shipped_is_accepted(recipe: str, detector: str) -> None:
    cfg, _ = compose_config("train", [f"recipe={recipe}", f"detector={detector}"])
    resolve(cfg)
    check_values(plain(cfg))


@pytest.mark.parametrize("recipe", PRETRAINING)
def test_what_is_shipped_for_pretraining_is_accepted(recipe: str) -> None:
    cfg, _ = compose_config("pretrain", [f"pretrain={recipe}"])
    resolve(cfg)
    check_values(plain(cfg))


def test_the_evaluation_configuration_is_accepted() -> None:
    cfg, _ = compose_config("eval", ["ckpt=best.ckpt"])
    resolve(cfg)
    check_values(plain(cfg))


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("train.batch_size", [1, 64], [0, -1, 2.0, "8", True, None]),
        ("workers", [0, 8], [-1, None, "two"]),
        ("schedule.epochs", [1, None], [0, -1, 1.5, math.inf]),
        ("optimizer.lr", [1e-4, 1], [0, -0.1, math.nan, math.inf, "1e-4", None, True]),
        ("optimizer.clip_norm", [10, 0.1, None], [0, -1, "no"]),
        ("optimizer.lr_scales", [None, {}, {"backbone": 0.1}], ["backbone", [1], 3]),
        ("ema", [None, 0.0, 0.998], [1, 1.5, -0.1, True]),
        ("trainer.devices", ["auto", 1, 8, [0], [0, 3]], [0, -1, [], ["a"], "all", None, 1.5]),
        ("trainer.precision", ["32-true", "bf16-mixed"], [32, "fp16", None]),
        ("schedule.milestones", [[], [0.5, 0.75]], [[90], 0.5, None, ["a"]]),
        ("augment.scale", [[1, 1], [0.5, 2.0]], [[1], 1, [0, 1], None, [1, 2, 3]]),
        ("augment.flip", [0, 1, 0.5], [-0.1, 2, "yes"]),
        ("augment.colour", [0, 0.4, 1], [-0.1, 1.5, None]),
        ("label_smoothing", [0, 0.1], [1, -0.1, None, "some"]),
        ("input.size", [1, 224], [0, 224.0, None]),
        ("data.train", ["train", 2024], ["", None, True, ["a"]]),
        ("schedule.kind", ["linear", "cosine", "steps"], ["line", None]),
        ("resume", [True, False], [1, "true", None]),
    ],
)
def test_values(key: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        check_values(nested(key, value))
    for value in bad:
        with pytest.raises(InputError, match=rf"^{key}=.*: expected "):
            check_values(nested(key, value))


def test_values_are_shown_as_they_are_typed() -> None:
    with pytest.raises(InputError, match=r"^workers=null: expected a whole number, 0 or more\.$"):
        check_values({"workers": None})
    with pytest.raises(InputError, match=r"^workers=abc: "):
        check_values({"workers": "abc"})
    with pytest.raises(InputError, match=r"^augment\.scale=\[1\.5\]: "):
        check_values({"augment": {"scale": [1.5]}})


def test_every_rule_is_about_a_value_that_exists() -> None:
    """A key that is renamed in conf/ takes its rule with it."""
    from detector.training.checks import RULES

    known: set[str] = set()
    runs = [("train", f"recipe={recipe}") for recipe in RECIPES]
    runs += [("pretrain", f"pretrain={recipe}") for recipe in PRETRAINING]
    for tool, *choices in (*runs, ("eval",)):
        cfg, _ = compose_config(tool, choices)
        known |= set(launch.dotted_keys(plain_without_resolving(cfg)))
    assert set(RULES) <= known


def plain_without_resolving(cfg: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=False)
