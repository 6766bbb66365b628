"""ShuffleNet V2 and V2* against torchvision, against the paper, and against the papers' figures drawn again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from backbone_files import build, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from detector.errors import InputError
from detector.lab.cost import multiply_adds, parameters
from detector.models.backbones.channel_order import uneven_order
from detector.models.backbones.classifier import ImageClassifier
from detector.models.backbones.contract import ClassifierOptions
from detector.models.backbones.pretrained import load_weights
from detector.models.backbones.shufflenet_v2 import interleave

STAGES = ("stage2", "stage3", "stage4")
V2 = {"0.5x": "x0_5", "1x": "x1_0", "1.5x": "x1_5", "2x": "x2_0"}  # our file name -> torchvision's


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("width", V2)
def test_equals_torchvision(width: str) -> None:
    theirs = randomise(getattr(torchvision.models, f"shufflenet_v2_{V2[width]}")(weights=None)).eval()
    v2, v2star = build(f"v2_{width}").eval(), build(f"v2star_{width}").eval()
    for ours in (v2, v2star):
        load_weights_of(ours, theirs)
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        plain, extra = v2(images), v2star(images)
        # In float64: two layouts in memory, as the two networks have, may round float32 differently.
        theirs, v2, images = theirs.double(), v2.double(), images.double()
        x = theirs.maxpool(theirs.conv1(images))
        expected = {"c3": theirs.stage2(x)}
        expected["c4"] = theirs.stage3(expected["c3"])
        expected["c5"] = theirs.stage4(expected["c4"])
        features = v2(images)
    for name, x in expected.items():
        assert relative_error(features[name], x) < 1e-12
        assert torch.equal(plain[name], extra[name])  # V2* starts as V2, bit for bit


def load_weights_of(ours: nn.Module, theirs: nn.Module) -> None:
    keys = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert all(".extra." in key for key in keys.missing_keys)
    assert all(key.startswith(("conv5.", "fc.")) for key in keys.unexpected_keys)


def classifier(file_name: str, **changes: Any) -> ImageClassifier:
    conv5_channels = 2048 if file_name.endswith("_2x") else 1024  # table 5
    return ImageClassifier(build(file_name, **changes), 1000, ClassifierOptions(conv5_channels=conv5_channels))


# Ma et al. 2018, table 5, and the same computed to more digits from the authors' code and from torchvision's.
@pytest.mark.parametrize(
    ("width", "table_5", "paper", "torchvision_layout", "extra", "count"),
    [
        ("0.5x", (41, 1.4), 40.48, 40.48, 2.41, 1_366_792),
        ("1x", (146, 2.3), 145.81, 144.91, 4.87, 2_278_604),
        ("1.5x", (299, 3.5), 298.97, 295.76, 7.04, 3_503_624),
        ("2x", (591, 7.4), 590.78, 583.25, 9.50, 7_393_996),
    ],
)
def test_costs_are_the_published_ones(
    width: str, table_5: tuple[float, float], paper: float, torchvision_layout: float, extra: float, count: int
) -> None:
    images = torch.zeros(1, 3, 224, 224)
    theirs, ours, star = (
        classifier(f"v2_{width}", layout="paper"),
        classifier(f"v2_{width}"),
        classifier(f"v2star_{width}"),
    )
    assert round(multiply_adds(theirs, images) / 1e6, 2) == pytest.approx(paper, abs=0.011)
    assert multiply_adds(theirs, images) / 1e6 == pytest.approx(table_5[0], rel=0.015)
    assert multiply_adds(ours, images) / 1e6 == pytest.approx(torchvision_layout, abs=0.01)
    assert (multiply_adds(star, images) - multiply_adds(ours, images)) / 1e6 == pytest.approx(extra, abs=0.01)
    assert round(parameters(theirs) / 1e6, 1) == table_5[1]
    assert parameters(ours) == count
    assert count == parameters(getattr(torchvision.models, f"shufflenet_v2_{V2[width]}")(weights=None))


def test_cost_with_se_is_near_the_published_one() -> None:
    """Ma et al. 2018, table 8: 597 M for 2x with SE. Pooling and scaling, 1.7 M more, are not counted here."""
    cost = multiply_adds(classifier("v2_2x", layout="paper", se=True), torch.zeros(1, 3, 224, 224)) / 1e6
    assert cost == pytest.approx(597, rel=0.006)
    assert cost > 590.78 + 2.9  # two full-width layers per unit: 2 * (4 * 122^2 + 8 * 244^2 + 4 * 488^2) = 2.98 M


def test_interleave_is_the_channel_shuffle_of_two_groups() -> None:
    first, second = torch.randn(2, 2, 6, 5, 7).unbind()
    assert torch.equal(interleave(first, second), torch.nn.functional.channel_shuffle(torch.cat((first, second), 1), 2))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_v2star_starts_as_v2_in_both_modes(mode: str) -> None:
    plain, star = randomise(build("v2_0.5x")), build("v2star_0.5x")
    star.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(4, 3, 96, 128)
    for backbone in (plain, star):
        backbone.train(mode == "train")
    with torch.no_grad():
        expected, got = plain(images), star(images)
    for key in expected:
        assert torch.equal(got[key], expected[key])


def test_extra_depthwise_learns_and_stays_what_it_is_when_saved() -> None:
    star = build("v2star_0.5x").train()
    optimizer = torch.optim.SGD(star.parameters(), lr=0.1)
    before = {key: value.clone() for key, value in star.state_dict().items() if ".extra." in key}
    sum(x.square().mean() for x in star(torch.randn(4, 3, 64, 64)).values()).backward()
    optimizer.step()
    after = star.state_dict()
    statistics = [key for key in before if "running" in key]
    assert all(torch.equal(before[key], after[key]) for key in statistics)
    assert all(not torch.equal(before[key], after[key]) for key in before if key.endswith(("weight", "bias")))
    restored = build("v2star_0.5x").eval()
    restored.load_state_dict(after)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(restored(images)["c5"], star.eval()(images)["c5"])


def test_extra_depthwise_in_some_units_of_each_stage() -> None:
    """Counted from the last unit of a stage on; the same network as V2* where all are."""
    some = build("v2_1x", extra_depthwise=[0, 4, 4])
    found = {stage: [len(unit.extra.state_dict()) > 0 for unit in getattr(some, stage)] for stage in STAGES}
    assert found == {"stage2": [False] * 4, "stage3": [False] * 4 + [True] * 4, "stage4": [True] * 4}
    every, star = build("v2_1x", extra_depthwise=[4, 8, 4]), build("v2star_1x")
    assert every.state_dict().keys() == star.state_dict().keys()
    assert build("v2_1x", extra_depthwise=[0, 0, 0]).state_dict().keys() == build("v2_1x").state_dict().keys()
    for wrong in ([0, 4], [0, 9, 0]):
        with pytest.raises(InputError, match="extra_depthwise"):
            build("v2_1x", extra_depthwise=wrong)


def test_v2star_starts_as_v2_with_real_weights(shared: Path) -> None:
    weights = shared / "weights" / "shufflenet_v2_x0_5_backbone.pth"
    plain, star = build("v2_0.5x").train(), build("v2star_0.5x").train()
    load_weights(plain, weights)
    load_weights(star, weights)
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(star(images)["c5"], plain(images)["c5"])


def naive_unit(
    unit: nn.Module, x: Tensor, *, residual: bool, se: bool, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """A unit of stride 1 on the shuffled map, as the figures of the appendix draw it; the output is not shuffled."""
    kept, inputs = x.chunk(2, dim=1)
    state = unit.branch2.state_dict()

    def convolve(x: Tensor, place: int, groups: int = 1) -> Tensor:
        weight = state[f"{place}.weight"]
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=groups)
        norm = [state[f"{place + 1}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *norm)

    y = activation(convolve(inputs, 0))
    y = convolve(convolve(y, 3, groups=y.shape[1]), 5)
    y = y if residual else activation(y)
    if se:
        place = 7 if residual else 8
        fc1, fc2 = ((state[f"{place}.fc{i}.weight"][:, :, 0, 0], state[f"{place}.fc{i}.bias"]) for i in (1, 2))
        y = y * torch.sigmoid(F.linear(F.relu(F.linear(y.mean((2, 3)), *fc1)), *fc2))[:, :, None, None]
    y = activation(inputs + y) if residual else y
    return torch.cat((kept, y), dim=1)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("se", [False, True])
@pytest.mark.parametrize(("activation", "function"), [("relu", F.relu), ("hard_swish", F.hardswish)])
def test_variants_of_the_appendix(
    residual: bool, se: bool, activation: str, function: Callable[[Tensor], Tensor]
) -> None:
    """A stage with SE and residuals (appendix, figure 2) against the same in plain functions."""
    backbone = build("v2_0.5x", se=se, residual=residual, activation=activation, repeats=[3, 1, 1])
    stage = randomise(backbone).double().eval().stage2
    images = torch.rand(2, 24, 10, 12, dtype=torch.float64)
    with torch.no_grad():
        x = torch.cat(stage[0](images), dim=1)
        for unit in list(stage)[1:]:
            shuffled = F.channel_shuffle(x, 2)
            x = naive_unit(unit, shuffled, residual=residual, se=se, activation=function)
        torch.testing.assert_close(stage(images), F.channel_shuffle(x, 2), rtol=1e-10, atol=1e-12)


def test_without_shuffle_the_halves_never_meet() -> None:
    """Zhang et al. 2018, table 3: what the ablation takes away."""
    backbone = randomise(build("v2_0.5x", shuffle=False)).double().eval()
    stage = backbone.stage3
    x = torch.rand(1, 48, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        projected, main = stage[0](x)
        for unit in list(stage)[1:]:
            main = unit.branch2(main)
        assert torch.equal(stage(x), torch.cat((projected, main), dim=1))


@pytest.mark.parametrize("channels", [16, 116, 176, 244, 340])
def test_uneven_branches_are_split_as_in_the_authors_code(channels: int) -> None:
    """Both networks told with labels in place of channels: a label is used up in the same unit by both."""
    order = uneven_order(channels).tolist()
    theirs, ours = list(range(channels)), (order[: channels // 2], order[channels // 2 :])
    assert sorted(order) == theirs
    for _ in range(8):
        used_by_them, theirs = set(theirs[1::2]) - {-1}, theirs[::2]
        halves = [torch.tensor(half).view(1, -1, 1, 1) for half in ours]
        shuffled = F.channel_shuffle(torch.cat(halves, dim=1).double(), 2).flatten().long().tolist()
        kept, used = shuffled[: channels // 2], shuffled[channels // 2 :]
        assert set(used) - {-1} == used_by_them
        new = [-1] * (channels // 2)  # what the main branch gives; its own order is free
        theirs, ours = theirs + new, (kept, new)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "resnet"}, r"name=resnet: expected one of .*shufflenet_v2"),
        ({"layout": "tensorflow"}, "layout=tensorflow: expected torchvision or paper"),
        ({"channels": [48, 96]}, "three of each"),
        ({"channels": [48, 98, 192]}, "multiples of 4"),
        ({"repeats": [4, 0, 4]}, "from 1 to"),
        ({"wdith": 2}, "wdith"),
        ({"activation": "swiss"}, "activation=swiss: expected relu or .*hard_swish"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build("v2_0.5x", **changes)
