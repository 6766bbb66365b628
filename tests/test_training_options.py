"""Which values of a training run are accepted, and that the defaults are the published recipe."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from detector import cli
from detector.cli.composition import options_of
from detector.errors import InputError
from detector.training.pretrain import PretrainOptions
from detector.training.run import TrainOptions

NETWORK: dict[str, Any] = {"backbone": {}, "neck": {}, "rpn": {}, "light_head": {}}


@pytest.mark.parametrize("recipe", options_of("recipe"))
@pytest.mark.parametrize("detector", options_of("detector"))
def test_what_is_shipped_is_accepted(recipe: str, detector: str) -> None:
    options = cli.compose("train", [f"recipe={recipe}", f"detector={detector}"]).options()
    assert isinstance(options, TrainOptions)
    assert options.recipe_name == recipe


@pytest.mark.parametrize("recipe", options_of("pretrain"))
def test_what_is_shipped_for_pretraining_is_accepted(recipe: str) -> None:
    options = cli.compose("pretrain", [f"pretrain={recipe}"]).options()
    assert isinstance(options, PretrainOptions)
    assert options.recipe_name == recipe


# What every recipe and backbone resolved to before the defaults moved from YAML into code, and what has changed since.
FROZEN: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("frozen_options.json").read_text())
CHANGED: dict[str, Any] = {
    "ckpt": ["auto"],  # null; a recipe may start from the package's detector
    "freeze.stages": [1],  # 2 in recipe=paper; the released code freezes up to stride 4. 0 in recipe=finetune, as ...
    "freeze.batch_norm": [True],  # ... false, and
    "optimizer.lr": [0.002],  # 0.001, with
    "optimizer.lr_scales": [{"backbone": 0.15}],  # null: photographs gain (docs/photographs.md)
    "schedule.images": [2_000_000, 307_200_000],  # null; not looked at where epochs are given
    "schedule.milestones": [[0.75]],  # []; not looked at but with kind=steps
}


@pytest.mark.parametrize("command_line", FROZEN)
def test_every_recipe_and_backbone_is_what_it_was(command_line: str) -> None:
    command, *words = command_line.split()
    values = cli.compose(command, words).options().to_dict()
    for key, before in FROZEN[command_line].items():
        value: Any = values
        for name in key.split("."):
            value = value[name]
        assert value == pytest.approx(before, abs=1e-6) or value in CHANGED[key], key


def test_the_defaults_are_the_papers_recipe() -> None:
    given = cli.compose("train", ["recipe=paper"]).options().to_dict()
    for name, value in TrainOptions(**NETWORK).to_dict().items():
        if name not in (*NETWORK, "data", "overrides", "recipe_name", "backbone_name"):
            assert given[name] == value, name


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
        ("trainer.precision", ["32-true", "bf16-mixed"], [32, "fp16", None, "bf16-true", "64-true"]),
        ("schedule.milestones", [[], [0.5, 0.75]], [[90], 0.5, None, ["a"]]),
        ("augment.scale", [[1, 1], [0.5, 2.0]], [[1], 1, [0, 1], None, [1, 2, 3], [2, 1]]),
        ("augment.flip", [0, 1, 0.5], [-0.1, 2, "yes"]),
        ("schedule.kind", ["linear", "cosine", "steps"], ["line", None]),
        ("freeze.stages", [0, 4], [5, -1, None]),
        ("resume", [True, False], [1, "true", None]),
        ("data.train.limit", [1, None], [0, "all"]),
        ("run_dir", ["runs/x", 2024, None], [True, []]),
    ],
)
def test_values(key: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        TrainOptions.parse(NETWORK | nested(key, value))
    for value in bad:
        with pytest.raises(InputError, match=rf"^{key}"):
            TrainOptions.parse(NETWORK | nested(key, value))


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("augment.colour", [0, 0.4, 1], [-0.1, 1.5, None]),
        ("label_smoothing", [0, 0.1], [1, -0.1, None, "some"]),
        ("input.size", [1, 224], [0, 224.0, None, 257]),
        ("data.train", ["train", 2024], ["", None, True, ["a"]]),
    ],
)
def test_values_of_pretraining(key: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        PretrainOptions.parse({"backbone": {}} | nested(key, value))
    for value in bad:
        with pytest.raises(InputError, match=rf"^{key}|^input\.resize"):
            PretrainOptions.parse({"backbone": {}} | nested(key, value))


def test_what_an_earlier_version_wrote_is_read_without_what_is_gone() -> None:
    recorded = TrainOptions(**NETWORK, seed=7).to_dict()
    recorded["trainer"]["telemetry"] = True
    recorded["horoscope"] = {"sign": "lion"}
    assert TrainOptions.parse_recorded(recorded) == TrainOptions(**NETWORK, seed=7)
    assert "horoscope" in recorded
    with pytest.raises(InputError, match=r"^seed=-1: expected "):
        TrainOptions.parse_recorded(recorded | {"seed": -1})
    with pytest.raises(InputError, match="is not an option"):
        TrainOptions.parse(recorded)


def nested(key: str, value: Any) -> dict[str, Any]:
    name, _, rest = key.partition(".")
    return {name: nested(rest, value) if rest else value}
