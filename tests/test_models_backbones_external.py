"""torchvision's and timm's networks give the maps of the stock models, for the same weights."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from detector.data.collate import Batch
from detector.errors import InputError
from detector.lab.cost import multiply_adds, parameters
from detector.models.backbones import build_backbone, parse_backbone
from detector.models.backbones.classifier import ImageClassifier
from detector.models.backbones.contract import ClassifierOptions
from detector.models.backbones.external import (
    External,
    TimmBackbone,
    TimmOptions,
    TorchvisionBackbone,
    TorchvisionOptions,
)
from detector.models.build import NetworkOptions, build_network
from detector.models.fuse import fuse

CONF = Path(__file__).parents[1] / "conf" / "backbone"
NAMED = {
    "resnet50": "ResNet50_Weights",
    "resnext50": "ResNeXt50_32X4D_Weights",
    "densenet121": "DenseNet121_Weights",
    "mobilenet_v3_large": "MobileNet_V3_Large_Weights",
    "mobilenet_v3_small": "MobileNet_V3_Small_Weights",
}
# Model -> nodes of torchvision's own feature extractor, read from its source: the ends of the stages.
TORCHVISION = {
    "resnet18": ("layer2", "layer3", "layer4"),
    "regnet_y_400mf": ("trunk_output.block2", "trunk_output.block3", "trunk_output.block4"),
    "mobilenet_v2": ("features.6", "features.13", "features.18"),
    "mobilenet_v3_small": ("features.3", "features.8", "features.12"),
    "mnasnet0_5": ("layers.9", "layers.11", "layers.16"),
    "shufflenet_v2_x0_5": ("stage2", "stage3", "conv5"),
    "efficientnet_b0": ("features.3", "features.5", "features.8"),
    "densenet121": ("features.denseblock2", "features.denseblock3", "relu"),
    "googlenet": ("inception3b", "inception4e", "inception5b"),
    "resnext50_32x4d": ("layer2", "layer3", "layer4"),
    "wide_resnet50_2": ("layer2", "layer3", "layer4"),
    "convnext_tiny": ("features.3", "features.5", "features.7"),
    "vgg11_bn": ("features.20", "features.27", "features.28"),
}
# Model -> modules of timm's whole model that end stride 8 and 16; c5 is what its forward_features gives.
TIMM = {
    "mobilenetv1_100": ("blocks.2", "blocks.3"),
    "mobilenetv3_large_100": ("blocks.2", "blocks.4"),
    "legacy_seresnet18": ("layer2", "layer3"),
    "convnext_atto": ("stages.1", "stages.2"),
    "densenet121": ("features.denseblock2", "features.denseblock3"),
    "seresnet50": ("layer2", "layer3"),
    "resnext50_32x4d": ("layer2", "layer3"),
    "nasnetalarge": ("cell_5", "cell_11"),
    "legacy_senet154": ("layer2", "layer3"),
}
HEAVY = {
    "mobilenet_v2", "resnext50_32x4d", "wide_resnet50_2", "convnext_tiny", "vgg11_bn",
    "densenet121", "googlenet", "efficientnet_b0", "nasnetalarge", "legacy_senet154", "seresnet50", "resnet50",
    "resnext50",
}  # fmt: skip
HEAD = ("fc.", "classifier.", "AuxLogits.", "aux1.", "aux2.")


def models(names: Any, *heavy: str) -> list[Any]:
    """Parameters of a test; those of HEAVY and `heavy` are marked slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in HEAVY or name in heavy else []) for name in names]


def randomise(module: nn.Module) -> nn.Module:
    """Statistics that fit the activations, and weights of normalisation that are not one; evaluation mode."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.2)
        norm.momentum = None
    if norms:
        module.train()
        with torch.no_grad():
            module(torch.randn(4, 3, 96, 96))
    return module.eval()


@cache
def torchvision_backbone(model: str) -> TorchvisionBackbone:
    torch.manual_seed(0)
    return randomise(TorchvisionBackbone(TorchvisionOptions(model=model)))


@cache
def timm_backbone(model: str) -> TimmBackbone:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    return randomise(TimmBackbone(TimmOptions(model=model)))


@cache
def entry(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())


def stock(model: str) -> nn.Module:
    options = {"aux_logits": False, "init_weights": False} if model in ("googlenet", "inception_v3") else {}
    whole = torchvision.models.get_model(model, weights=None, **options)
    # torchvision sets this with its weights.
    whole.transform_input = model in ("googlenet", "inception_v3")
    return whole.eval()


def assert_equal_maps(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Of float64, in which a difference is more than rounding."""
    for key, x in expected.items():
        assert found[key].shape == x.shape
        assert x.std() > 1e-3
        torch.testing.assert_close(found[key], x, rtol=1e-5, atol=1e-5 * x.abs().max().item())


def load(whole: nn.Module, backbone: External) -> list[str]:
    """Give the whole model the backbone's weights, by the library's names. Returns the names that are its own."""
    given = {theirs: backbone.state_dict()[ours] for ours, theirs in backbone.names_in_library().items()}
    state = whole.state_dict()
    missing = [name for name in state if name not in given]
    state.update(given)  # in its own dict, because MNASNet's holds a version
    whole.load_state_dict(state)
    return missing


@pytest.mark.parametrize("model", models(TORCHVISION, "regnet_y_400mf"))
def test_maps_are_those_of_torchvision(model: str) -> None:
    backbone, whole = torchvision_backbone(model), stock(model)
    assert all(name.startswith(HEAD) for name in load(whole, backbone))
    backbone, whole, images = (
        copy.deepcopy(backbone).double().eval(),
        whole.double(),
        torch.randn(1, 3, 64, 96).double(),
    )
    theirs = create_feature_extractor(whole, dict(zip(TORCHVISION[model], ("c3", "c4", "c5"), strict=True)))
    with torch.no_grad():
        assert_equal_maps(backbone(images), theirs(images))


@pytest.mark.parametrize(
    "model", models(["densenet121", "googlenet", "mobilenet_v3_small", "mobilenet_v2"], "densenet121")
)
def test_c5_is_what_the_models_own_classifier_takes(model: str) -> None:
    backbone, whole = torchvision_backbone(model), stock(model)
    load(whole, backbone)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        classify = whole.classifier if hasattr(whole, "classifier") else whole.fc
        torch.testing.assert_close(classify(backbone(images)["c5"].mean((2, 3))), whole(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", models(TIMM, "densenet121"))
def test_maps_are_those_of_timm(model: str) -> None:
    timm = pytest.importorskip("timm")
    backbone = timm_backbone(model)
    whole = timm.create_model(model, pretrained=False).eval()
    assert len(load(whole, backbone)) <= 8  # of the head
    backbone, whole, images = (
        copy.deepcopy(backbone).double().eval(),
        whole.double(),
        torch.randn(1, 3, 64, 96).double(),
    )
    expected: dict[str, Tensor] = {}
    for key, name in zip(("c3", "c4"), TIMM[model], strict=True):
        whole.get_submodule(name).register_forward_hook(
            # A cell of NASNet gives its own output and the one before.
            lambda _, __, y, key=key: expected.update({key: y[0].relu() if isinstance(y, tuple) else y})
        )
    with torch.no_grad():
        expected["c5"] = whole.forward_features(images)
        if model == "nasnetalarge":
            expected |= {key: expected[key].relu() for key in ("c3", "c4")}
        assert_equal_maps(backbone(images), expected)


@pytest.mark.parametrize("model", models(TORCHVISION, "densenet121"))
def test_contract_of_torchvisions(model: str) -> None:
    assert_contract(copy.deepcopy(torchvision_backbone(model)).eval())


@pytest.mark.parametrize("model", models(TIMM, "densenet121"))
def test_contract_of_timms(model: str) -> None:
    assert_contract(copy.deepcopy(timm_backbone(model)))


def assert_contract(backbone: External) -> None:
    """Odd sizes, independence of the batch, folding, stages, gradients."""
    images = torch.randn(2, 3, 97, 130)
    with torch.no_grad():
        features, alone = backbone(images), backbone(images[1:])
    for key, stride, height, width in (("c3", 8, 13, 17), ("c4", 16, 7, 9), ("c5", 32, 4, 5)):
        assert backbone.strides[key] == stride
        assert features[key].shape == (2, backbone.channels[key], height, width)
        assert features[key].is_contiguous(memory_format=torch.channels_last)
        assert (features[key][1:] - alone[key]).norm() < 1e-4 * alone[key].norm()
    # Exact in float64, so that nothing but the arithmetic is compared.
    double, small = backbone.double(), images[:1, :, :64, :64].double()
    folded = fuse(double)
    with torch.no_grad():
        for key, x in double(small).items():
            torch.testing.assert_close(folded(small)[key], x, rtol=1e-8, atol=1e-8 * x.abs().max().item())
    # Every parameter belongs to one stage and gets a gradient.
    names = [name for stage in backbone.stages for name in stage]
    maps = double.train()(images[:, :, :64, :64].double())
    sum(x.square().mean() for x in maps.values()).backward()
    for name, parameter in backbone.named_parameters():
        assert names.count(name.rpartition(".")[0]) == 1, name
        assert parameter.grad is not None, name


@pytest.mark.parametrize(
    ("model", "folded", "left"),
    [
        ("resnet18", 20, 0),
        ("mobilenet_v3_small", 34, 0),
        pytest.param(
            "densenet121", 59, 62, marks=pytest.mark.slow
        ),  # a normalisation before the convolution stays: one for each 1x1, transition, the last
    ],
)
def test_what_is_folded(model: str, folded: int, left: int) -> None:
    backbone = torchvision_backbone(model)
    before, after = (sum(isinstance(part, nn.BatchNorm2d) for part in x.modules()) for x in (backbone, fuse(backbone)))
    assert (before - after, after) == (folded, left)


def test_state_dicts_have_the_names_of_weight_files() -> None:
    """Those of checkpoints of older versions, too."""
    backbone = torchvision_backbone("resnet18")
    state = {name: x for name, x in stock("resnet18").state_dict().items() if not name.startswith("fc.")}
    assert list(backbone.state_dict()) == list(state)
    other = TorchvisionBackbone(TorchvisionOptions(model="resnet18"))
    other.load_state_dict(state)
    assert all(torch.equal(x, state[name]) for name, x in other.state_dict().items())
    nested = nn.ModuleDict({"backbone": other}).state_dict()
    assert list(nested) == [f"backbone.{name}" for name in state]
    nn.ModuleDict({"backbone": other}).load_state_dict(nested)


@pytest.mark.parametrize("model", models(["resnet18", "googlenet", "vgg11_bn"]))
def test_cells_lie_where_their_stride_says(model: str) -> None:
    """The centre of what cell (i, j) sees is within one stride of the cell's own pixels."""
    backbone = torchvision_backbone(model)
    side = 384
    images = torch.randn(1, 3, side, side, requires_grad=True)
    for key, x in backbone(images).items():
        stride, cell = backbone.strides[key], x.shape[2] // 2
        (gradient,) = torch.autograd.grad(x[0, :, cell, cell].sum(), images, retain_graph=True)
        weight = gradient.abs().sum((0, 1, 2)).double()
        centre = ((weight * torch.arange(side)).sum() / weight.sum()).item()
        assert abs(centre - (cell + 0.5) * stride) < stride, (key, centre)


@pytest.mark.parametrize("name", models(NAMED, "densenet121"))
def test_costs_are_those_that_torchvision_publishes(name: str) -> None:
    content = entry(name)
    published, meta = content["published"], getattr(torchvision.models, NAMED[name]).IMAGENET1K_V1.meta
    # Millions here, thousands of millions there.
    assert published["multiply_adds"] == pytest.approx(1000 * meta["_ops"])
    assert published["parameters"] == pytest.approx(meta["num_params"] / 1e6, abs=5e-4)
    images = torch.zeros(1, 3, 224, 224)
    whole = torchvision.models.get_model(content["model"], weights=None)
    expected = multiply_adds(whole, images)
    assert expected / 1e9 == pytest.approx(meta["_ops"], abs=5e-4)
    backbone = build_backbone(parse_backbone(content))
    head = whole.classifier if hasattr(whole, "classifier") else whole.fc
    trunk = multiply_adds(backbone, images)
    assert trunk + multiply_adds(head, torch.zeros(1, backbone.channels["c5"])) == expected
    classifier = ImageClassifier(backbone, 1000, parse_backbone(content).classifier or ClassifierOptions())
    found = trunk + multiply_adds(classifier.fc, torch.zeros(1, backbone.channels["c5"]))
    if "note" not in published:
        assert parameters(classifier) == meta["num_params"]
        assert found == expected
    else:  # 960 -> 1280 -> 1000 there, 960 -> 1000 here, and so on
        inputs, hidden = backbone.channels["c5"], head[0].out_features
        less = (inputs + 1000) * hidden - inputs * 1000
        assert found == expected - less


@pytest.mark.parametrize("name", models([*NAMED, "torchvision", "timm"], "densenet121"))
@pytest.mark.parametrize("neck", [{"name": "cem", "width": 16}, {"name": "none"}])
def test_a_detector_learns_on_it(
    name: str, neck: dict[str, Any], small_spec: dict[str, Any], make_batch: Callable[..., Batch]
) -> None:
    if entry(name)["name"] == "timm":
        pytest.importorskip("timm")
    torch.manual_seed(0)
    network = build_network(NetworkOptions.parse(small_spec | {"backbone": entry(name), "neck": neck}), 3).train()
    losses = network.losses(make_batch([[(5, 5, 40, 40, 1)], [(30, 10, 90, 60, 2)]]))
    total = torch.stack(list(losses.values())).sum()
    assert total.isfinite()
    total.backward()
    without = [key for key, parameter in network.named_parameters() if parameter.grad is None]
    assert not without


@pytest.mark.parametrize(
    ("library", "model"), [("torchvision", "mobilenet_v3_small"), ("timm", "mobilenetv3_small_050")]
)
def test_dilated_c5_keeps_its_size(library: Any, model: str) -> None:
    if library == "timm":
        pytest.importorskip("timm")
    options = {"name": library, "model": model}
    plain = randomise(build_backbone(parse_backbone(options)))
    dilated = build_backbone(parse_backbone(options | {"dilate_c5": True})).eval()
    assert dilated.strides == {"c3": 8, "c4": 16, "c5": 16}
    assert dilated.stages == plain.stages
    dilated.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        expected, found = plain(images), dilated(images)
    torch.testing.assert_close(found["c3"], expected["c3"])
    torch.testing.assert_close(found["c4"], expected["c4"])
    assert found["c5"].shape == (1, plain.channels["c5"], 8, 6)


@pytest.mark.slow
def test_a_dilated_resnet_has_at_every_second_pixel_what_it_would_have() -> None:
    plain = randomise(TorchvisionBackbone(TorchvisionOptions(model="resnet50")))
    dilated = TorchvisionBackbone(TorchvisionOptions(model="resnet50", dilate_c5=True)).eval()
    dilated.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        expected, found = plain(images)["c5"], dilated(images)["c5"]
    torch.testing.assert_close(found[:, :, ::2, ::2], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("library", "options", "message"),
    [
        ("torchvision", {"model": "resnet_50"}, r"resnet_50.*resnet50"),
        ("torchvision", {"model": "squeezenet1_1"}, r"strides 2, 4, 8, .*; a backbone needs"),
        ("torchvision", {"model": "vit_b_16"}, r"vit_b_16 gives"),
        ("torchvision", {"model": "swin_t"}, r"swin_t gives"),
        ("torchvision", {"model": "inception_v3"}, r"inception_v3 gives|of other sizes"),
        ("torchvision", {"model": "resnet18", "dilate_c5": True}, r"no dilated form"),
        ("torchvision", {"model": "mnasnet0_5", "dilate_c5": True}, r"no dilated form"),
        ("timm", {"model": "legacy_se_resnet18"}, r"legacy_se_resnet18.*legacy_seresnet18"),
        ("timm", {"model": "hf-hub:someone/else"}, r"not in timm"),
        ("timm", {"model": "vit_tiny_patch16_224"}, r"gives strides 16;"),
        ("timm", {"model": "swin_tiny_patch4_window7_224"}, r"channels at the end"),
        ("timm", {"model": "maxvit_rmlp_pico_rw_256"}, r"images of every size"),
        ("timm", {"model": "densenet121", "dilate_c5": True}, r"densenet121.*dilate_c5"),
        ("timm", {"model": "resnet18", "patch": 3}, r"patch"),
    ],
)
def test_what_cannot_be_used_says_why(library: str, options: dict[str, Any], message: str) -> None:
    if library == "timm":
        pytest.importorskip("timm")
    with pytest.raises(InputError, match=message):
        build_backbone(parse_backbone(dict(name=library, **options)))


def test_without_timm_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"timm.*pip install 'light-head-detector\[timm\]'"):
        TimmBackbone(TimmOptions(model="mobilenetv1_100"))
