"""Receptive fields against sums worked out by hand, against a chain of convolutions, and against brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from detector.lab import receptive_field
from detector.lab.receptive_field import effective_field, effective_side, theoretical_field
from detector.models.backbones import Backbone, build_backbone, parse_backbone

CONF = Path(__file__).parents[1] / "conf" / "backbone"


def build(file_name: str, **changes: Any) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(parse_backbone(yaml.safe_load((CONF / f"{file_name}.yaml").read_text()) | changes))


def chain(kernels: list[tuple[int, int]]) -> int:
    """Field of convolutions in a row, each (kernel, stride): sum of (kernel - 1) * what a step is worth, plus 1."""
    side, jump = 1, 1
    for kernel, stride in kernels:
        side += (kernel - 1) * jump
        jump *= stride
    return side


def shufflenet_chain(repeats: tuple[int, ...], star: bool) -> list[tuple[int, int]]:
    """The longest path through V2: every depthwise convolution of every main branch."""
    kernels = [(3, 2), (3, 2)]
    for units in repeats:
        for unit in range(units):
            kernels += [(3, 1)] * star + [(3, 2 if unit == 0 else 1)]
    return kernels


@pytest.mark.parametrize(("file_name", "star", "block"), [("v2_0.5x", False, 3), ("v2star_0.5x", True, 5)])
def test_v2_and_v2star_by_hand(file_name: str, star: bool, block: int) -> None:
    """Ma et al. 2018, section 4: a block of V2 sees 3 x 3; one more depthwise 3x3 makes that 5."""
    field = theoretical_field(build(file_name))
    for key, repeats in (("c3", (4,)), ("c4", (4, 8)), ("c5", (4, 8, 4))):
        assert field.stages[key] == chain(shufflenet_chain(repeats, star))
    assert field.blocks == {"c3": block, "c4": block, "c5": block}


def test_a_block_of_xception_sees_seven() -> None:
    assert theoretical_field(build("xception_1x")).blocks == {"c3": 7, "c4": 7, "c5": 7}  # Ma et al. 2018, section 4


@pytest.mark.slow
def test_resnet50_by_hand() -> None:
    """torchvision gives the stride to the 3x3 convolution of a stage's first bottleneck; 3 + 4 + 6 + 3 of them."""
    stages = [(3, 1)] * 3 + [(3, 2)] + [(3, 1)] * 3 + [(3, 2)] + [(3, 1)] * 5 + [(3, 2)] + [(3, 1)] * 2
    field = theoretical_field(build("resnet50"))
    assert field.stages["c5"] == chain([(7, 2), (3, 2), *stages]) == 427
    assert field.blocks == {"c3": 3, "c4": 3, "c5": 3}


def test_what_widens_the_field_and_what_does_not() -> None:
    plain = theoretical_field(build("v2_0.5x"))
    assert theoretical_field(build("v2_0.5x", se=True, residual=True, activation="hard_swish")) == plain
    dilated = theoretical_field(build("v2_0.5x", dilate_c5=True))
    assert dilated.stages["c5"] == chain(shufflenet_chain((4, 8), star=False)) + 2 * 16 + 3 * 2 * 2 * 16


class Tiny(Backbone):
    """c3 from three strided convolutions, one with a wide kernel; small enough to try every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 5, 2, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.two, self.three, self.four = (nn.Conv2d(4, 4, 3, 2, 1) for _ in range(3))
        self.channels, self.strides = dict.fromkeys(("c3", "c4", "c5"), 4), {"c3": 8, "c4": 16, "c5": 32}
        self.stages = (("stem",), ("two",), ("three",), ("four",))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        c3 = self.two(self.stem(images))
        c4 = self.three(c3)
        return {"c3": c3, "c4": c4, "c5": self.four(c4)}


def test_against_changing_every_pixel() -> None:
    """The definition itself: which pixels of a row change the feature in the middle when they change."""
    torch.manual_seed(0)
    backbone = Tiny().double().eval()
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.uniform_(module.weight, 0.1, 1)  # positive, so that nothing cancels
    width = 256
    row = torch.linspace(1, 2, width, dtype=torch.float64)
    images = row.expand(width + 1, 3, 1, width).clone()
    images[torch.arange(width), :, 0, torch.arange(width)] += 100  # large: a maximum must not hide it
    with torch.no_grad():
        features = backbone(images)
    field = theoretical_field(backbone)
    for key, x in features.items():
        middle = x[:, :, 0, x.shape[3] // 2]
        (seen,) = (middle[:-1] != middle[-1]).any(dim=1).nonzero(as_tuple=True)
        assert field.stages[key] == int(seen[-1] - seen[0]) + 1
    assert field.stages == {"c3": 5 + 2 * 2 + 2 * 4, "c4": 17 + 2 * 8, "c5": 33 + 2 * 16}


def test_a_field_that_does_not_fit_is_not_cut_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receptive_field, "WIDTHS", (256, 2048))  # the first is too narrow for c4
    assert theoretical_field(build("v2_0.5x")).stages == {"c3": 63, "c4": 303, "c5": 527}
    monkeypatch.setattr(receptive_field, "WIDTHS", (256,))
    with pytest.raises(ValueError, match="256"):
        theoretical_field(build("v2_0.5x"))


def test_backbone_is_left_as_it_was() -> None:
    backbone = build("v2star_0.5x").train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    theoretical_field(backbone)
    effective_field(backbone, size=64, images=1)
    assert backbone.training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_effective_field_is_zero_outside_the_theoretical_one() -> None:
    field = effective_field(Tiny(), feature="c4", size=128, images=2)
    rows, columns = np.nonzero(field)
    side = 33  # by hand, above
    assert 20 < rows.max() - rows.min() + 1 <= side
    assert 20 < columns.max() - columns.min() + 1 <= side
    assert field.max() == 1
    assert 0 < effective_side(field) < side


def test_effective_side_of_a_known_area() -> None:
    field = np.zeros((40, 40))
    field[10:22, 5:17] = 0.5
    field[0, 0] = 0.02  # below 4.55 % of the largest
    assert effective_side(field) == 12


def test_v2star_sees_more_and_starts_as_v2() -> None:
    v2, star = build("v2_0.5x"), build("v2star_0.5x")
    options: dict[str, Any] = {"feature": "c4", "size": 320, "images": 2}
    drawn = [effective_side(effective_field(backbone, **options)) for backbone in (v2, star)]
    assert drawn[1] > 1.15 * drawn[0]
    star.load_state_dict(v2.state_dict(), strict=False)
    started = [effective_field(backbone, **options, random_weights=False) for backbone in (v2, star)]
    np.testing.assert_allclose(started[1], started[0], atol=1e-6)
