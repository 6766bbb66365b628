"""Every file in conf/ composes and builds; a description that does not fit says so."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import yaml

from detector import cli
from detector.cli.composition import options_of
from detector.data.preprocess import Preprocessing
from detector.errors import InputError
from detector.files import CONF
from detector.models.build import NECKS, NetworkOptions, build_network
from detector.models.light_head_rcnn import LightHeadRCNN


def compose(*overrides: str) -> dict[str, Any]:
    """The options of a training with these overrides, as plain values."""
    return cli.compose("train", overrides).options().to_dict()


def build(config: dict[str, Any], num_classes: int = 3) -> LightHeadRCNN:
    """As training does, without ImageNet weights."""
    return build_network(
        NetworkOptions.parse({part: config[part] for part in NetworkOptions.model_fields}), num_classes
    )


@pytest.mark.parametrize(
    "backbone",
    [pytest.param(name, marks=[pytest.mark.slow] if name == "densenet121" else []) for name in options_of("backbone")],
)
@pytest.mark.parametrize("neck", options_of("neck"))
def test_every_backbone_with_every_neck_builds(backbone: str, neck: str) -> None:
    if backbone == "timm":
        pytest.importorskip("timm")
    config = compose(f"backbone={backbone}", f"neck={neck}")
    with torch.device("meta"):
        network = build(config)
    assert network.neck.head_channels == (network.backbone.channels["c5"] if neck == "none" else 128)
    assert (network.rpn.anchors.stride, network.head.scale) == ((16, 1 / 32) if neck == "none" else (16, 1 / 16))
    assert set(options_of("neck")) == set(NECKS)


@pytest.mark.parametrize("recipe", options_of("recipe"))
@pytest.mark.parametrize("detector", options_of("detector"))
def test_every_recipe_with_every_detector_builds(recipe: str, detector: str) -> None:
    config = compose(f"recipe={recipe}", f"detector={detector}", "backbone=v2_0.5x")
    network = build(config, 80)
    assert network.head.class_logits.out_features == 81
    assert network.rpn.options.test_limits.after_nms == config["rpn"]["test_limits"]["after_nms"]
    assert Preprocessing(**config["input"]).to_dict() == config["input"]


@pytest.mark.parametrize("data", options_of("data"))
def test_every_data_set_composes(data: str) -> None:
    assert set(compose(f"data={data}")["data"]) == {
        "root",
        "format",
        "generate",
        "train",
        "val",
        "val_share",
        "split_seed",
        "difficult",
        "keep_empty",
        "cache",
        "exif_boxes",
        "missing",
    }


def test_the_papers_recipe_has_the_papers_numbers() -> None:
    """Li et al. 2017, sections 3.2, 3.3, 4.1; the recipe must win over the groups that it overrides."""
    config = compose("recipe=paper", "backbone=v2star_1x")
    assert config["neck"] == {"name": "none"}
    assert config["input"] == {"short_side": 800, "long_side": 1200}
    assert config["backbone"]["extra_depthwise"] is True
    assert config["backbone"]["weights"] == "imagenet"
    network = build(config, 80)
    assert network.rpn.anchors.per_cell == 15
    assert network.rpn.hidden[0].weight.shape == (256, 232, 3, 3)
    assert network.head.thin.column_row[0].weight.shape == (64, 464, 15, 1)
    assert network.head.thin.column_row[1].out_channels == 490
    assert network.head.hidden.weight.shape == (2048, 490)
    assert network.head.box_deltas.out_features == 4
    assert (network.head.options.box_weight, network.head.options.sampling, network.head.options.sample_count) == (
        2.0,
        "ohem",
        256,
    )
    assert (network.rpn.options.train_limits.after_nms, network.rpn.options.test_limits.after_nms) == (2000, 1000)
    assert config["optimizer"]["lr"] == 0.01
    # "Stage 1 and 2" are ResNet's, to stride 4 (released code: conv1 and block1); here that is the first stage.
    assert config["freeze"] == {"stages": 1, "batch_norm": True}
    network.backbone.freeze(**config["freeze"])
    frozen = {name.split(".")[0] for name, value in network.backbone.named_parameters() if not value.requires_grad}
    assert network.backbone.conv1[0].weight.requires_grad is False
    assert network.backbone.stage2[0].branch2[0].weight.requires_grad is True
    assert network.rpn.options.inside_only
    assert frozen == {"conv1", "stage2", "stage3", "stage4"}  # of the stages, their normalisation
    assert config["schedule"]["images"] == 2_000_000


def commands_of_table_7() -> list[str]:
    page = (CONF.parent / "docs/table7.md").read_text()
    return re.findall(r"\| `python tools/train\.py (recipe=paper backbone=\S+(?: backbone\.weights=\S+)?)` \|", page)


@pytest.mark.parametrize("command", commands_of_table_7())
def test_every_cell_of_table_7_builds(command: str) -> None:
    config = compose(*command.split())
    with torch.device("meta"):
        network = build(config, 80)
    assert tuple(network.backbone.strides.values()) == (8, 16, 32)
    assert config["backbone"]["weights"]  # ImageNet's, published or our own: Ma et al. 2018, section 4


def test_table_7_has_its_twenty_cells() -> None:
    """Five rows at 40, 140, 300 and 500 M; each close to its level (V1 0.5x has 38, V2 2x 591: table 8)."""
    commands = commands_of_table_7()
    assert len(set(commands)) == 20
    costs = []
    for command in commands:
        name = command.split()[1].removeprefix("backbone=")
        entry = yaml.safe_load((CONF / "backbone" / f"{name.replace('v2star', 'v2')}.yaml").read_text())
        assert entry["published"]["image_size"] == 224
        costs.append(entry["published"]["multiply_adds"])
    for place, cost in enumerate(costs):
        assert cost == pytest.approx((40, 140, 300, 500)[place % 4], rel=0.2)


def test_setting_l_is_wider_and_dilated() -> None:
    network = build(compose("recipe=paper", "detector=light_head_l", "backbone=v2_0.5x"))
    assert network.rpn.hidden[0].out_channels == 512
    assert network.head.thin.column_row[0].out_channels == 256
    assert network.head.scale == 1 / 16


@pytest.mark.parametrize("part", ["backbone", "neck", "rpn", "light_head"])
def test_an_unknown_key_is_named(small_spec: dict, part: str) -> None:
    small_spec[part]["shortside"] = 3
    with pytest.raises(InputError, match="shortside"):
        build_network(NetworkOptions.parse(small_spec), 2)


def test_without_any_option_it_is_the_published_network() -> None:
    """Li et al. 2017, setting S, on ShuffleNet V2 1x: what recipe=paper trains."""
    options = NetworkOptions()
    with torch.device("meta"):
        assert build_network(options, num_classes=20).head.class_logits.out_features == 21
        default = build_network(options, 80).state_dict()
        paper = build(compose("recipe=paper", "backbone=v2_1x"), 80).state_dict()
    assert {key: value.shape for key, value in default.items()} == {key: value.shape for key, value in paper.items()}


def test_a_description_survives_a_checkpoint(small_spec: dict) -> None:
    """What lies in older checkpoints fits: without the options that are younger, with those that are no network."""
    old = NetworkOptions.parse(small_spec)
    assert "se" not in small_spec["backbone"]
    assert old.spec()["backbone"]["se"] is False
    assert NetworkOptions.parse(old.spec()) == old
    entry = small_spec["backbone"] | {"weights": "imagenet", "classifier": None, "published": None}
    assert NetworkOptions.parse(small_spec | {"backbone": entry}).spec() == old.spec()


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("rpn", "scales", [0, 32], "a list"),
        ("rpn", "scales", [], "a list"),
        ("rpn", "test_limits", {"before_nms": 6000, "after_nms": 0}, "rpn.test_limits.after_nms=0: expected a whole"),
        ("rpn", "background_iou", 0.8, "rpn.background_iou=0.8 is above rpn.foreground_iou=0.7"),
        ("light_head", "score_threshold", -0.1, "light_head.score_threshold=-0.1: expected a number from 0 to 1"),
        ("light_head", "class_agnostic", "no", "light_head.class_agnostic=no: expected true or false"),
        ("light_head", "kernel_size", 4, "it must be odd"),
        ("neck", "width", 0, "neck.width=0: expected a whole number from 1 to"),
        ("backbone", "repeats", [4, 0, 4], "backbone.repeats=.*a whole number from 1 to"),
    ],
)
def test_a_value_that_does_not_fit_is_named(small_spec: dict, part: str, key: str, value: Any, message: str) -> None:
    small_spec[part][key] = value
    with pytest.raises(InputError, match=message):
        NetworkOptions.parse(small_spec)


@pytest.mark.parametrize(("part", "known"), [("backbone", "shufflenet_v2"), ("neck", "cem")])
def test_an_unknown_name_lists_what_there_is(small_spec: dict, part: str, known: str) -> None:
    small_spec[part]["name"] = "resnet_9000"
    with pytest.raises(InputError, match=rf"resnet_9000.*{known}"):
        build_network(NetworkOptions.parse(small_spec), 2)


def test_the_spec_is_left_as_it_was_and_the_seed_decides(small_spec: dict) -> None:
    import copy

    before = copy.deepcopy(small_spec)
    torch.manual_seed(3)
    first = build_network(NetworkOptions.parse(small_spec), 2).state_dict()
    assert small_spec == before
    torch.manual_seed(3)
    second = build_network(NetworkOptions.parse(small_spec), 2).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
