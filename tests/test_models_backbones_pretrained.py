"""Weights from torchvision's files, from disk, and what a user is told when they do not fit."""

from __future__ import annotations

import re
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from torch import Tensor, nn

from detector.errors import InputError
from detector.models.backbones import build_backbone, parse_backbone
from detector.models.backbones.classifier import ImageClassifier
from detector.models.backbones.contract import ClassifierOptions
from detector.models.backbones.input_frame import MEAN, STD
from detector.models.backbones.pretrained import load_weights
from detector.models.backbones.published import imagenet_url

CONF = Path(__file__).parents[1] / "conf" / "backbone"
TIMM = ("mobilenetv3_large_100", "densenet121", "resnet50", "seresnet50")
HALF = {
    "name": "shufflenet_v2",
    "stem_channels": 24,
    "channels": [48, 96, 192],
    "repeats": [4, 8, 4],
    "extra_depthwise": False,
    "layout": "torchvision",
    "dilate_c5": False,
}
FULL = HALF | {"channels": [116, 232, 464]}


def build(spec: dict[str, Any], **changes: Any) -> nn.Module:
    return build_backbone(parse_backbone(spec | changes))


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict()


@pytest.mark.parametrize("wrap", [False, True])
def test_a_classifier_s_file_loads(published: dict[str, Tensor], tmp_path: Path, wrap: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": published, "epoch": 3} if wrap else published, path)
    backbone = build(HALF)
    report = load_weights(backbone, path)
    assert report.matched == tuple(backbone.state_dict())
    assert len(report.matched) == 330
    assert set(report.ignored) == {key for key in published if key.startswith(("conv5.", "fc."))}
    assert report.kept == ()
    assert all(torch.equal(value, published[key]) for key, value in backbone.state_dict().items())
    assert "330 tensors from" in str(report)


def test_v2_weights_start_v2star(published: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(published, path)
    star = build(HALF, extra_depthwise=True)
    report = load_weights(star, str(path))
    assert len(report.matched) == 330
    assert len(report.kept) == 16 * 6
    assert "start as the identity" in str(report)

    torch.save(star.state_dict(), path)  # V2*'s own file has no gaps
    assert load_weights(build(HALF, extra_depthwise=True), path).kept == ()


def test_none_changes_nothing() -> None:
    backbone = build(HALF)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    report = load_weights(backbone, None)
    assert (report.matched, str(report)) == ((), "backbone: random weights")
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_a_real_file_loads_whole(shared: Path) -> None:
    report = load_weights(build(HALF), shared / "weights" / "shufflenet_v2_x0_5_backbone.pth")
    assert (len(report.matched), report.ignored, report.kept) == (330, (), ())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (FULL, r"stage2\.0\.branch1\.2\.weight is \(24, 24, 1, 1\), expected \(58, 24, 1, 1\).*and \d+ more"),
        (HALF | {"repeats": [4, 8, 5]}, r"stage4\.4\.branch2\.0\.weight is missing, expected \(96, 96, 1, 1\)"),
        (HALF | {"repeats": [4, 8, 3]}, r"stage4\.3\.branch2\.0\.weight has no place here"),
    ],
)
def test_another_architecture_is_refused(
    published: dict[str, Tensor], tmp_path: Path, spec: dict[str, Any], message: str
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(published, path)
    backbone = build(spec)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_weights(backbone, path)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_v2star_weights_do_not_lose_their_extra_part_silently(tmp_path: Path) -> None:
    path = tmp_path / "star.pth"
    torch.save(build(HALF, extra_depthwise=True).state_dict(), path)
    with pytest.raises(InputError, match=r"\.extra\.0\.weight has no place here"):
        load_weights(build(HALF), path)


def test_damaged_files_are_named(published: dict[str, Tensor], tmp_path: Path) -> None:
    whole = tmp_path / "whole.pth"
    torch.save(published, whole)
    contents = {
        "truncated.pth": whole.read_bytes()[:5000],
        "empty.pth": b"",
        "text.pth": b"<html>404 not found</html>",
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: not a whole file of torch weights.*backbone\.weights=null"):
            load_weights(build(HALF), path)
    torch.save([1, 2, 3], whole)
    with pytest.raises(InputError, match="holds no state dict"):
        load_weights(build(HALF), whole)
    with pytest.raises(InputError, match=r"absent\.pth: there is no such file"):
        load_weights(build(HALF), tmp_path / "absent.pth")
    with pytest.raises(InputError, match="there is no such file"):
        load_weights(build(HALF), tmp_path)
    with pytest.raises(InputError, match="there is no such file"):
        load_weights(build(HALF), "a" * 5000)  # longer than the name of a file may be


@pytest.mark.parametrize(
    ("spec", "weights"),
    [
        (HALF, torchvision.models.ShuffleNet_V2_X0_5_Weights),
        (FULL, torchvision.models.ShuffleNet_V2_X1_0_Weights),
        (HALF | {"channels": [176, 352, 704]}, torchvision.models.ShuffleNet_V2_X1_5_Weights),
        (HALF | {"channels": [244, 488, 976]}, torchvision.models.ShuffleNet_V2_X2_0_Weights),
    ],
)
def test_imagenet_is_the_file_of_this_width(
    spec: dict[str, Any], weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torchvision.models.get_model(weights.__name__.removesuffix("_Weights").lower(), weights=None)
    asked: list[str] = []

    def download(url: str, **_: Any) -> dict[str, Tensor]:
        asked.append(url)
        return model.state_dict()

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    backbone = build(spec)
    assert load_weights(backbone, "imagenet").matched == tuple(backbone.state_dict())
    assert asked == [weights.IMAGENET1K_V1.url]
    assert torch.equal(backbone.stage4[3].branch2[5].weight, model.stage4[3].branch2[5].weight)


def test_without_network_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(url: str, **_: Any) -> dict[str, Tensor]:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    with pytest.raises(InputError) as caught:
        load_weights(build(FULL), "imagenet")
    assert imagenet_url(build(FULL)) in str(caught.value)
    assert "backbone.weights=PATH" in str(caught.value)
    assert "backbone.weights=null" in str(caught.value)
    assert "python tools/pretrain.py backbone=NAME data.root=DIR" in str(caught.value)


def test_unpublished_width_is_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"none are published for ShuffleNetV2 with stages of \(48, 96, 200\) channels.*tools/pretrain\.py",
    ):
        load_weights(build(HALF, channels=[48, 96, 200]), "imagenet")


def randomise(network: nn.Module) -> nn.Module:
    """As after training: every tensor differs from its start, and the statistics fit the activations."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # the statistics of the one pass below
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.2)
    with torch.no_grad():
        network.train()(torch.randn(4, 3, 64, 64))
    return network.eval()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def saved(network: nn.Module, path: Path) -> Path:
    torch.save(network.state_dict(), path)
    return path


def test_what_fits_is_loaded_when_asked(published: dict[str, Tensor], tmp_path: Path) -> None:
    gap = {key: value for key, value in published.items() if not key.startswith("stage3.2.")}
    gap["stage2.1.branch2.0.weight"] = torch.zeros(3)
    gap["surplus"] = torch.zeros(1)
    path = tmp_path / "gap.pth"
    torch.save(gap, path)
    backbone = build(HALF)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(InputError, match=r"stage2\.1\.branch2\.0\.weight is \(3,\), expected \(24, 24, 1, 1\)"):
        load_weights(backbone, path)
    report = load_weights(backbone, path, partial=True)
    # Three convolutions and three BNs of a unit, less their counters, which may be absent, and one of another shape.
    assert len(report.random) == 3 + 3 * 4 + 1
    assert len(report.problems) == 3 + 3 * 4 + 1 + 1
    assert report.problems[-1] == "surplus has no place here"
    assert "16 start at random" in str(report)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, published[key] if key in report.matched else before[key])
    torch.save({"surplus": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="made for another architecture"):
        load_weights(backbone, path, partial=True)


def test_safetensors_and_data_parallel_names(published: dict[str, Tensor], tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "weights.safetensors"
    safetensors.save_file({f"module.{key}": value for key, value in published.items()}, path)
    backbone = build(HALF)
    assert len(load_weights(backbone, path).matched) == 330
    assert all(torch.equal(value, published[key]) for key, value in backbone.state_dict().items())
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(InputError, match=r"weights\.safetensors: not a whole file"):
        load_weights(build(HALF), path)


def test_raw_pixels_of_any_shufflenet_fold(published: dict[str, Tensor], tmp_path: Path) -> None:
    """A network that was trained on BGR in 0-255, under our names: the same in the middle of the stem's output."""
    path = tmp_path / "raw.pth"
    torch.save(published, path)
    plain, folded = build(HALF).eval(), build(HALF).eval()
    assert load_weights(plain, path).input_frame == "rgb_imagenet"
    assert load_weights(folded, path, input_frame="bgr255").input_frame == "bgr255"
    rgb = torch.randint(0, 256, (1, 3, 32, 32)).float()
    normalised = (rgb - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected, got = plain.conv1(rgb.flip(1)), folded.conv1(normalised)
    assert relative_error(got[..., 1:, 1:], expected[..., 1:, 1:]) < 1e-5
    with pytest.raises(InputError, match="input=rgb255 is unknown; there is rgb_imagenet and bgr255"):
        load_weights(plain, path, input_frame="rgb255")
    torch.save({key: value for key, value in published.items() if not key.startswith("conv1.")}, path)
    report = load_weights(folded, path, input_frame="bgr255", partial=True)  # nothing to convert
    assert "conv1.0.weight" in report.random


def test_a_pretrained_classifier_s_file_loads(tmp_path: Path) -> None:
    """The backbone's names beside conv5 and fc, as tools/pretrain.py writes them."""
    classifier = ImageClassifier(build(HALF), 7, ClassifierOptions(conv5_channels=16))
    content = {key.removeprefix("backbone."): value for key, value in classifier.state_dict().items()}
    path = tmp_path / "pretrained.pth"
    torch.save(content, path)
    backbone = build(HALF)
    report = load_weights(backbone, path)
    assert len(report.matched) == 330
    assert set(report.classifier) == set(report.ignored) == {key for key in content if key.startswith(("conv5", "fc"))}


def test_mobilenet_v2_is_torchvision_s(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    theirs = randomise(torchvision.models.mobilenet_v2(weights=None, num_classes=10))
    asked: list[str] = []
    monkeypatch.setattr(
        torch.hub, "load_state_dict_from_url", lambda url, **_: asked.append(url) or theirs.state_dict()
    )
    entry = yaml.safe_load((CONF / "mobilenet_v2_1.0.yaml").read_text())
    backbone = build_backbone(parse_backbone(entry))
    report = load_weights(backbone, "imagenet")
    assert asked == [torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.url]
    assert report.matched == tuple(backbone.state_dict())
    classifier = ImageClassifier(backbone, 10, ClassifierOptions(conv5_channels=1280, activation="relu6", dropout=0.2))
    missing, unexpected = classifier.load_state_dict(dict(report.classifier), strict=False)
    assert all(key.startswith("backbone.") for key in missing)
    assert not unexpected
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(classifier.eval()(images), theirs(images)) < 1e-5
    narrow = yaml.safe_load((CONF / "mobilenet_v2_0.4.yaml").read_text())
    with pytest.raises(InputError, match="none are published for MobileNetV2"):
        load_weights(build_backbone(parse_backbone(narrow)), "imagenet")


@pytest.mark.parametrize(
    ("model", "trunk"),
    [
        ("resnet18", "layer4"),
        ("mobilenet_v3_small", "features"),
        pytest.param("regnet_y_400mf", "trunk_output", marks=pytest.mark.slow),
        pytest.param("densenet121", "features", marks=pytest.mark.slow),
    ],
)
def test_torchvision_s_models_load_whole(model: str, trunk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    theirs = randomise(torchvision.models.get_model(model, weights=None))
    content = theirs.state_dict()
    if model == "densenet121":  # the published file is older than the model's names
        content = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): v for key, v in content.items()}
        assert any("denselayer1.norm.1.weight" in key for key in content)
    asked: list[str] = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **_: asked.append(url) or content)
    backbone = build_backbone(parse_backbone({"name": "torchvision", "model": model})).eval()
    report = load_weights(backbone, "imagenet")
    assert asked == [torchvision.models.get_model_weights(model).IMAGENET1K_V1.url]
    assert set(report.matched) == set(backbone.state_dict())
    assert len(report.matched) + len(report.ignored) == len(content)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    seen: list[Tensor] = []
    theirs.get_submodule(trunk).register_forward_hook(lambda *args: seen.append(args[-1].relu()))
    with torch.no_grad():
        theirs.double()(images)
        got = backbone.double()(images)["c5"]
    assert relative_error(got.relu(), seen[0]) < 1e-10


def test_a_deeper_model_does_not_pass_for_a_shallower_one(tmp_path: Path) -> None:
    """All tensors of a ResNet-18 lie in a ResNet-34's file, with the right shapes."""
    path = saved(torchvision.models.resnet34(weights=None), tmp_path / "resnet34.pth")
    with pytest.raises(InputError, match=r"layer1\.2\.conv1\.weight has no place here"):
        load_weights(build_backbone(parse_backbone({"name": "torchvision", "model": "resnet18"})), path)
    path = saved(torchvision.models.resnet18(weights=None), tmp_path / "resnet18.pth")
    for partial in (False, True):  # partial, as tools/import_weights.py always asks, is no way round
        with pytest.raises(InputError, match="input=bgr255: only for a stem like ShuffleNet V2's"):
            load_weights(
                build_backbone(parse_backbone({"name": "torchvision", "model": "resnet18"})),
                path,
                input_frame="bgr255",
                partial=partial,
            )


@pytest.mark.parametrize(
    "model",
    [
        "ese_vovnet19b_dw",  # timm joins its names with "_"
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ("mobilenetv3_large_100", "densenet121", "resnet50", "seresnet50")
        ),
    ],
)
def test_timm_s_models_load_whole(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = randomise(timm.create_model(model, pretrained=False))
    backbone = build_backbone(parse_backbone({"name": "timm", "model": model})).eval()
    report = load_weights(backbone, saved(theirs, tmp_path / "timm.pth"))
    assert report.matched == tuple(backbone.state_dict())
    assert report.format == "a whole model's names"
    assert report.kept == report.random == ()
    assert len(report.matched) + len(report.ignored) == len(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.double().forward_features(images)
        assert relative_error(backbone.double()(images)["c5"], expected) < 1e-10

    made: list[tuple[str, bool]] = []
    real = timm.create_model

    def create(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        made.append((name, pretrained))
        return theirs if pretrained else real(name, pretrained=False, **options)

    other = build_backbone(parse_backbone({"name": "timm", "model": model})).eval()
    monkeypatch.setattr(timm, "create_model", create)
    assert str(load_weights(other, "imagenet").source).startswith(f"timm's {model}")
    assert (model, True) in made
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in backbone.state_dict().items())


def test_without_network_timm_s_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    backbone = build_backbone(parse_backbone({"name": "timm", "model": "resnet18"}))

    def no_network(name: str, **_: Any) -> nn.Module:
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(InputError, match=r"timm could not get resnet18 \(Name or service.*tools/pretrain\.py"):
        load_weights(backbone, "imagenet")
