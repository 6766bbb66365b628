"""Weights from torchvision's files, from disk, and what a user is told when they do not fit."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from detector.backbones import build_backbone
from detector.backbones.pretrained import imagenet_url, load_weights
from detector.errors import InputError

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
    return build_backbone(**(spec | changes))


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
    assert report.matched == len(backbone.state_dict()) == 330
    assert set(report.ignored) == {key for key in published if key.startswith(("conv5.", "fc."))}
    assert report.kept == ()
    assert all(torch.equal(value, published[key]) for key, value in backbone.state_dict().items())
    assert "330 tensors from" in str(report)


def test_v2_weights_start_v2star(published: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(published, path)
    star = build(HALF, extra_depthwise=True)
    report = load_weights(star, str(path))
    assert report.matched == 330
    assert len(report.kept) == 16 * 6
    assert "start as the identity" in str(report)

    torch.save(star.state_dict(), path)  # V2*'s own file has no gaps
    assert load_weights(build(HALF, extra_depthwise=True), path).kept == ()


def test_none_changes_nothing() -> None:
    backbone = build(HALF)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    report = load_weights(backbone, None)
    assert (report.matched, str(report)) == (0, "backbone: random weights")
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_a_real_file_loads_whole(shared: Path) -> None:
    report = load_weights(build(HALF), shared / "weights" / "shufflenet_v2_x0_5_backbone.pth")
    assert (report.matched, report.ignored, report.kept) == (330, (), ())


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
    assert load_weights(backbone, "imagenet").matched == 330
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


def test_unpublished_width_is_refused() -> None:
    with pytest.raises(InputError, match=r"none are published for stages of \(48, 96, 200\) channels"):
        load_weights(build(HALF, channels=[48, 96, 200]), "imagenet")
