"""The contract of a backbone, one body for every file in conf/backbone/."""

from __future__ import annotations

from typing import Any

import backbone_files
import pytest
import torch
from backbone_files import CONF, entry
from torch import Tensor, nn

from detector.models.backbones import BACKBONES, Backbone, parse_backbone
from detector.models.backbones.classifier import build_classifier
from detector.models.fuse import fuse, multiply_pointwise

# A light one of every family; the others are the same code, wider and deeper, and run with the slow tests.
LIGHT = {
    "v1_0.5x", "v2_0.5x", "v2star_0.5x", "mobilenet_v1_0.25", "mobilenet_v2_0.4", "xception_0.5x", "mobilenet_v3_small",
    "torchvision", "timm",
}  # fmt: skip
FEATURES = ("c3", "c4", "c5")


def build(name: str, **changes: Any) -> Backbone:
    if entry(name)["name"] == "timm":
        pytest.importorskip("timm")
    return backbone_files.build(name, **changes)


@pytest.fixture(
    params=[
        pytest.param(path.stem, marks=[] if path.stem in LIGHT else [pytest.mark.slow])
        for path in sorted(CONF.glob("*.yaml"))
    ]
)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def settle(backbone: Backbone) -> Backbone:
    """In evaluation mode, with statistics that fit its activations: as after training, no BN is near the identity."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over the passes below
    backbone.train()
    with torch.no_grad():
        backbone(torch.randn(8, 3, 96, 96))
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    with torch.no_grad():
        backbone(torch.randn(8, 3, 96, 96))
    return backbone.eval()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_there_is_a_file_for_every_backbone_and_it_says_all() -> None:
    entries = {path.stem: entry(path.stem) for path in CONF.glob("*.yaml")}
    assert {content["name"] for content in entries.values()} == set(BACKBONES)
    for file_name, content in entries.items():
        assert {"weights", "classifier", "published"} <= set(content), file_name
        assert content["weights"] is None, file_name  # a recipe chooses
        published = content["published"]
        if published is not None:
            assert {"multiply_adds", "image_size", "source"} <= set(published), file_name


def test_maps_have_the_promised_channels_and_strides(name: str) -> None:
    backbone = build(name).eval()
    assert tuple(backbone.channels) == tuple(backbone.strides) == FEATURES
    assert tuple(backbone.strides.values()) == (8, 16, 32)
    for height, width in ((96, 128), (97, 75)):  # a size that is no multiple of 32 is rounded up at every stride
        with torch.no_grad():
            features = backbone(torch.randn(2, 3, height, width))
        assert tuple(features) == FEATURES
        for key, feature in features.items():
            stride = backbone.strides[key]
            assert feature.shape == (2, backbone.channels[key], -(-height // stride), -(-width // stride))
            assert feature.is_contiguous(memory_format=torch.channels_last)


def test_every_parameter_gets_a_gradient(name: str) -> None:
    backbone = build(name).train()
    features = backbone(torch.randn(4, 3, 96, 96))
    torch.stack([(feature * torch.randn_like(feature)).sum() for feature in features.values()]).sum().backward()
    for parameter_name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


def test_result_does_not_depend_on_the_batch(name: str) -> None:
    backbone = settle(build(name)).double()  # or rounding would hide a small dependence
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        together, alone = backbone(images), backbone(images[1:2])
    for key, feature in alone.items():
        assert feature.isfinite().all()
        assert feature.std() > 1e-3, key  # the signal has not died on its way
        assert relative_error(together[key][1:2], feature) < 1e-10


def test_dilated_c5_holds_the_plain_one(name: str) -> None:
    """Setting L of Light-Head R-CNN: every second pixel of a dilated last stage is what the strided one gives."""
    if entry(name)["name"] in ("torchvision", "timm"):
        pytest.skip("not every network of a library can be dilated: test_backbones_external")
    # Gates average over the whole map, and a dilated one has other pixels too.
    changes = {"se": False} if entry(name).get("se") else {}
    plain = settle(build(name, **changes)).double()
    dilated = build(name, **changes, dilate_c5=True).double().eval()
    dilated.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 160, 128, dtype=torch.float64)
    with torch.no_grad():
        expected, got = plain(images), dilated(images)
    assert dilated.strides == {"c3": 8, "c4": 16, "c5": 16}
    assert got["c5"].shape[-2:] == got["c4"].shape[-2:]
    assert relative_error(got["c5"][..., ::2, ::2], expected["c5"]) < 1e-10


def test_state_dict_round_trip(name: str) -> None:
    backbone, other = settle(build(name)), build(name).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)
    other.load_state_dict(backbone.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, got = backbone(images), other(images)
    assert all(torch.equal(got[key], expected[key]) for key in FEATURES)


def test_folded_for_inference_it_gives_the_same(name: str) -> None:
    backbone = settle(build(name))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        folded = fuse(backbone)
        expected, got = backbone(images), folded(images)
        multiply_pointwise(folded)
        products = folded(images)
    for key in FEATURES:
        assert relative_error(got[key], expected[key]) < 1e-4
        assert relative_error(products[key], expected[key]) < 1e-4


def test_stages_cover_it_in_order(name: str) -> None:
    """What `freeze.stages` counts: every parameter lies in exactly one stage, and later stages need earlier ones."""
    backbone = build(name)
    assert len(backbone.stages) == 4
    names = [part for stage in backbone.stages for part in stage]
    owners = {
        parameter: [part for part in names if parameter == part or parameter.startswith(f"{part}.")]
        for parameter, _ in backbone.named_parameters()
    }
    assert all(len(parts) == 1 for parts in owners.values()), owners
    # c3 comes from the stem and stage 2 alone, c4 from those and stage 3.
    features = backbone.train()(torch.randn(2, 3, 64, 64))
    for key, reach in (("c3", 2), ("c4", 3)):
        backbone.zero_grad()
        features[key].sum().backward(retain_graph=True)
        early = {part for stage in backbone.stages[:reach] for part in stage}
        reached = {owners[parameter][0] for parameter, p in backbone.named_parameters() if p.grad is not None}
        assert reached <= early, key


def test_a_classifier_on_top_has_logits(name: str) -> None:
    if entry(name)["name"] == "timm":
        pytest.importorskip("timm")
    classifier = build_classifier(parse_backbone(entry(name)), num_classes=5).train()
    logits = classifier(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in classifier.fc.parameters())
