"""Fused networks give what the originals give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from detector.models.backbones import build_backbone, parse_backbone
from detector.models.fuse import Pointwise, fuse, multiply_pointwise
from detector.models.light_head import LargeSeparableConv


def randomise(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, 0, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.2)
    return module


def norms(module: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


@pytest.mark.parametrize("layout", ["torchvision", "paper"])
@pytest.mark.parametrize("extra_depthwise", [False, True])
def test_fused_backbone_gives_the_same(layout: str, extra_depthwise: bool) -> None:
    backbone = build_backbone(
        parse_backbone(
            {
                "name": "shufflenet_v2",
                "stem_channels": 24,
                "channels": [116, 232, 464],
                "repeats": [4, 8, 4],
                "extra_depthwise": extra_depthwise,
                "layout": layout,
                "dilate_c5": False,
            }
        )
    )
    for part in backbone.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)  # the extra depthwise convolutions are no longer the identity
    randomise(backbone).eval()
    images = torch.randn(2, 3, 96, 128)
    fused = fuse(backbone)
    with torch.inference_mode():
        expected, got = backbone(images), fused(images)
    assert norms(backbone) > 50
    assert norms(fused) == 0
    for key in expected:
        scale = expected[key].abs().max().item()
        torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-5 * scale)


class Head(nn.Module):
    """What else a detector has: a lone convolution, a BN without convolution, a nested Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(4, 8, 3, bias=True), nn.BatchNorm2d(8), nn.ReLU())
        self.nested = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.BatchNorm2d(8, eps=0.1)))
        self.lone = nn.Conv2d(8, 8, (1, 3))
        self.norm = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
        self.plain = nn.Sequential(nn.Conv2d(8, 2, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.norm(self.lone(self.nested(self.tower(x)))))


def test_other_parts_of_a_network() -> None:
    head = randomise(Head()).train()
    before = {key: value.clone() for key, value in head.state_dict().items()}
    fused = fuse(head)
    assert head.training
    assert head.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())
    assert all(parameter.requires_grad for parameter in head.parameters())
    assert not fused.training
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert norms(fused) == 1  # that without a convolution
    # In place only where a convolution made the input.
    assert [fused.tower[1].inplace, fused.nested[0].inplace, fused.norm[1].inplace] == [True, False, False]

    x = torch.randn(3, 4, 12, 14)
    kept = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), head.eval()(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(x, kept)


def test_a_sequential_itself() -> None:
    pair = randomise(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))).eval()
    x = torch.randn(1, 3, 8, 8)
    fused = fuse(pair)
    assert len(fused) == 1
    torch.testing.assert_close(fused(x), pair(x), rtol=1e-5, atol=1e-6)


def test_batch_statistics_cannot_be_folded() -> None:
    pair = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False))
    assert norms(fuse(pair)) == 1


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: dropout and an activation after the normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def test_a_normalisation_that_does_more_is_not_lost() -> None:
    x = torch.randn(2, 3, 8, 8)
    pair = randomise(nn.Sequential(nn.Conv2d(3, 5, 3), BatchNormAct2d(5))).eval()
    fused = fuse(pair)
    assert norms(fused) == 1
    left, given = fused.state_dict(), pair.state_dict()
    assert left.keys() == given.keys()
    assert all(torch.equal(left[key], given[key]) for key in given)
    with torch.no_grad():
        # In another memory layout, and so not to the last bit: a processor without AVX-512 adds in another order there.
        torch.testing.assert_close(fused(x), pair(x), rtol=1e-5, atol=1e-6)
        assert (pair(x) == 0).any()


@pytest.mark.parametrize("extra_depthwise", [False, True])
def test_a_fused_backbone_can_be_put_into_evaluation_mode_again(extra_depthwise: bool) -> None:
    """Every prediction does: V2*'s extra layer has no normalisation left then."""
    backbone = build_backbone(parse_backbone({
        "name": "shufflenet_v2", "stem_channels": 8, "channels": [16, 32, 64], "repeats": [1, 2, 1],
        "extra_depthwise": extra_depthwise, "layout": "torchvision", "dilate_c5": False,
    }))  # fmt: skip
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, got = randomise(backbone).eval()(images)["c5"], fuse(backbone).eval()(images)["c5"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_four_linear_convolutions_as_one() -> None:
    torch.manual_seed(0)
    thin = LargeSeparableConv(12, 10, mid_channels=7, kernel_size=1).double()
    for layer in thin.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.bias)
    x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
    merged = thin.merged()
    assert sum(isinstance(layer, nn.Conv2d) for layer in merged.modules()) == 1
    with torch.no_grad():
        assert (thin(x) == 0).any()
        torch.testing.assert_close(merged(x), thin(x), rtol=1e-12, atol=1e-12)


def test_products_in_place_of_pointwise_convolutions() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(6, 8, 1, bias=False),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.Conv2d(8, 8, 1, stride=2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 5, 1), nn.ReLU(inplace=True), nn.Conv2d(5, 4, 1), nn.Hardswish()),
    )
    layers = layers.requires_grad_(False).to(memory_format=torch.channels_last)
    x = torch.randn(2, 6, 9, 11)
    expected = layers(x)
    multiply_pointwise(layers)
    kinds = [type(layer) for layer in (*layers[:5], *layers[5])]
    assert kinds == [Pointwise, nn.Conv2d, nn.Conv2d, nn.Conv2d, nn.ReLU, Pointwise, Pointwise, nn.Hardswish]
    assert [layer.relu for layer in layers[5][:2]] == [True, False]
    for memory_format in (torch.channels_last, torch.contiguous_format):
        torch.testing.assert_close(layers(x.contiguous(memory_format=memory_format)), expected)
    out = layers[0](x.contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_a_product_is_exported_as_a_convolution() -> None:
    layer = Pointwise(nn.Conv2d(6, 8, 1))
    program = torch.export.export(layer, (torch.randn(1, 6, 4, 4),))
    assert "aten.conv2d" in str(program.graph)
    assert "aten.linear" not in str(program.graph)
