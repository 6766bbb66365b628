"""Every file in conf/ composes and builds; a description that does not fit says so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from detector.data.preprocess import Preprocessing
from detector.errors import InputError
from detector.models.backbones import arguments_of
from detector.models.build import NECKS, build_network
from detector.models.light_head_rcnn import LightHeadRCNN

CONF = Path(__file__).resolve().parents[1] / "conf"


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def compose(*overrides: str) -> dict[str, Any]:
    """conf/train.yaml with these overrides, as plain values."""
    hydra = pytest.importorskip("hydra")
    from omegaconf import OmegaConf

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", list(overrides))
    # What is read from the run itself (its name, its command line) does not exist here.
    kept = [str(key) for key in config if not OmegaConf.is_interpolation(config, key)]
    return OmegaConf.to_container(OmegaConf.masked_copy(config, kept), resolve=True)


def build(config: dict[str, Any], num_classes: int = 3) -> LightHeadRCNN:
    """As training does, without ImageNet weights."""
    spec = {key: config[key] for key in ("neck", "rpn", "light_head")}
    spec["backbone"] = arguments_of(config["backbone"])
    return build_network(spec, num_classes)


@pytest.mark.parametrize("backbone", choices("backbone"))
@pytest.mark.parametrize("neck", choices("neck"))
def test_every_backbone_with_every_neck_builds(backbone: str, neck: str) -> None:
    if backbone == "timm":
        pytest.importorskip("timm")
    config = compose(f"backbone={backbone}", f"neck={neck}")
    network = build(config)
    assert network.neck.head_channels == (network.backbone.channels["c5"] if neck == "none" else 128)
    assert (network.rpn.anchors.stride, network.head.scale) == ((16, 1 / 32) if neck == "none" else (16, 1 / 16))
    assert set(choices("neck")) == set(NECKS)


@pytest.mark.parametrize("recipe", choices("recipe"))
@pytest.mark.parametrize("detector", choices("detector"))
def test_every_recipe_with_every_detector_builds(recipe: str, detector: str) -> None:
    config = compose(f"recipe={recipe}", f"detector={detector}", "backbone=v2_0.5x")
    network = build(config, 80)
    assert network.head.class_logits.out_features == 81
    assert network.rpn.test_limits.after_nms == config["rpn"]["test_limits"]["after_nms"]
    assert Preprocessing(**config["input"]).to_dict() == config["input"]


@pytest.mark.parametrize("data", choices("data"))
def test_every_data_set_composes(data: str) -> None:
    assert set(compose(f"data={data}")["data"]) == {
        "root",
        "generate",
        "train",
        "val",
        "keep_empty",
        "cache",
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
    assert (network.head.box_weight, network.head.sampling, network.head.sample_count) == (2.0, "ohem", 256)
    assert (network.rpn.train_limits.after_nms, network.rpn.test_limits.after_nms) == (2000, 1000)
    assert config["optimizer"]["lr"] == 0.01
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
        build_network(small_spec, 2)


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("backbone", "repeats"),
        ("neck", "width"),
        ("rpn", "train_limits"),
        ("rpn", "scales"),
        ("light_head", "sampling"),
    ],
)
def test_a_missing_key_is_named(small_spec: dict, part: str, key: str) -> None:
    del small_spec[part][key]
    with pytest.raises(InputError, match=key):
        build_network(small_spec, 2)


@pytest.mark.parametrize("part", ["backbone", "neck", "rpn", "light_head"])
def test_a_missing_part_is_named(small_spec: dict, part: str) -> None:
    del small_spec[part]
    with pytest.raises(InputError, match=part):
        build_network(small_spec, 2)


@pytest.mark.parametrize(("part", "known"), [("backbone", "shufflenet_v2"), ("neck", "cem")])
def test_an_unknown_name_lists_what_there_is(small_spec: dict, part: str, known: str) -> None:
    small_spec[part]["name"] = "resnet_9000"
    with pytest.raises(InputError, match=rf"resnet_9000.*{known}"):
        build_network(small_spec, 2)


def test_the_spec_is_left_as_it_was_and_the_seed_decides(small_spec: dict) -> None:
    import copy

    before = copy.deepcopy(small_spec)
    torch.manual_seed(3)
    first = build_network(small_spec, 2).state_dict()
    assert small_spec == before
    torch.manual_seed(3)
    second = build_network(small_spec, 2).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
