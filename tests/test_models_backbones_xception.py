"""The light Xception against the same drawn again, and against the published costs and receptive field."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbone_files import build, entry, randomise
from torch import Tensor
from torch.nn import functional as F

from detector.errors import InputError
from detector.lab.cost import multiply_adds
from detector.models.backbones import parse_backbone
from detector.models.backbones.classifier import ImageClassifier
from detector.models.backbones.contract import ClassifierOptions


def naive(state: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    """Stem, then blocks of three separable convolutions and a shortcut, one layer after another."""

    def conv_bn(x: Tensor, name: str, first: int, **options: Any) -> Tensor:
        x = F.conv2d(x, state[f"{name}.{first}.weight"], **options)
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{name}.{first + 1}.{key}"] for key in keys), training=False, eps=1e-5)

    def separable(x: Tensor, name: str, first: int, stride: int) -> Tensor:
        x = conv_bn(x, name, first, groups=x.shape[1], padding=1, stride=stride)
        return conv_bn(x, name, first + 2)

    x = F.relu(conv_bn(images, "stem", 0, stride=2, padding=1))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    maps = []
    for stage, blocks in (("stage2", 4), ("stage3", 8), ("stage4", 4)):  # Li et al. 2017, table 7
        for number in range(blocks):
            name, stride = f"{stage}.{number}", 1 if number else 2
            y = F.relu(separable(x, f"{name}.branch", 0, 1))
            y = F.relu(separable(y, f"{name}.branch", 5, 1))
            y = separable(y, f"{name}.branch", 10, stride)
            x = F.relu(y + (x if number else conv_bn(x, f"{name}.shortcut", 0, stride=2)))
        maps.append(x)
    return dict(zip(("c3", "c4", "c5"), maps, strict=True))


def test_equals_the_same_drawn_again() -> None:
    ours = randomise(build("xception_0.5x")).double().eval()
    for size in ((96, 64), (75, 97)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            expected, got = naive(ours.state_dict(), images), ours(images)
        for key, feature in got.items():
            assert feature.std() > 1e-3
            torch.testing.assert_close(feature, expected[key], rtol=1e-9, atol=1e-9)


# Ma et al. 2018, table 8, millions of multiply-adds at 224 x 224; the block is not published.
@pytest.mark.parametrize(("width", "published"), [("0.5x", 40), ("1x", 145), ("1.5x", 305), ("2x", 525)])
def test_costs_are_near_the_published_ones(width: str, published: int) -> None:
    settings = entry(f"xception_{width}")
    with torch.device("meta"):
        network = ImageClassifier(
            build(f"xception_{width}"), 1000, parse_backbone(settings).classifier or ClassifierOptions()
        )
    cost = multiply_adds(network, torch.zeros(1, 3, 224, 224, device="meta")) / 1e6
    assert cost == pytest.approx(published, rel=0.015)


def test_channels_are_those_of_table_7() -> None:
    """Li et al. 2017, table 7: 24, then 144, 288, 576 in 4, 8, 4 blocks."""
    backbone = build("xception_1x")
    assert backbone.channels == {"c3": 144, "c4": 288, "c5": 576}
    assert backbone.stem[0].out_channels == 24
    assert [len(backbone.get_submodule(f"stage{number}")) for number in (2, 3, 4)] == [4, 8, 4]


@pytest.mark.parametrize("stage", ["stage2", "stage3", "stage4"])
def test_a_block_sees_seven_cells(stage: str) -> None:
    """Ma et al. 2018, section 4: the receptive field of an Xception block is 7. Cells with a gradient, counted."""
    block = randomise(build("xception_0.5x")).double().eval().get_submodule(f"{stage}.1").branch
    image = torch.randn(1, block[0].in_channels, 21, 21, dtype=torch.float64, requires_grad=True)
    block(image)[0, :, 10, 10].sum().backward()
    seen = image.grad.abs().sum(dim=(0, 1)) > 0
    assert seen.any(dim=0).nonzero().flatten().tolist() == list(range(7, 14))
    assert seen.any(dim=1).nonzero().flatten().tolist() == list(range(7, 14))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": [72, 144]}, "give three"),
        ({"repeats": [4, 0, 4]}, "from 1 to"),
        ({"bottleneck": 100}, "no more than the channels"),
        ({"se": True}, "se"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build("xception_0.5x", **changes)
