"""What RPN and head look at: the backbone's own maps, or one fused map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from detector.models.neck import ContextEnhancement, ContextEnhancementOptions, NoNeck, NoNeckOptions

CHANNELS = {"c3": 8, "c4": 12, "c5": 16}
STRIDES = {"c3": 8, "c4": 16, "c5": 32}
# Fresh normalisation has mean 0 and deviation 1 and only divides by sqrt(1 + eps).
UNIT = (1 + 1e-5) ** -0.5


def maps(height: int = 64, width: int = 96, *, c5_stride: int = 32, count: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    strides = STRIDES | {"c5": c5_stride}
    return {
        key: torch.randn(count, CHANNELS[key], height // strides[key], width // strides[key], generator=generator)
        for key in CHANNELS
    }


def test_none_passes_c4_and_c5_through() -> None:
    neck, features = NoNeck(CHANNELS, STRIDES, NoNeckOptions()), maps()
    rpn_map, head_map = neck(features)
    assert rpn_map is features["c4"]
    assert head_map is features["c5"]
    assert (neck.rpn_channels, neck.rpn_stride, neck.head_channels, neck.head_stride) == (12, 16, 16, 32)
    assert not list(neck.parameters())


@pytest.mark.parametrize("c5_stride", [32, 16])
def test_context_enhancement_by_hand(c5_stride: int) -> None:
    torch.manual_seed(0)
    neck = (
        ContextEnhancement(CHANNELS, STRIDES | {"c5": c5_stride}, ContextEnhancementOptions(width=10)).double().eval()
    )
    features = {key: value.double() for key, value in maps(c5_stride=c5_stride).items()}
    fused, same = neck(features)
    assert fused is same
    assert fused.shape == (2, 10, 4, 6)
    assert (neck.rpn_channels, neck.rpn_stride, neck.head_channels, neck.head_stride) == (10, 16, 10, 16)

    c4 = torch.einsum("oi,nihw->nohw", neck.c4[0].weight[..., 0, 0], features["c4"]) * UNIT
    c5 = torch.einsum("oi,nihw->nohw", neck.c5[0].weight[..., 0, 0], features["c5"]) * UNIT
    factor = c5_stride // 16
    c5 = c5.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    mean = features["c5"].flatten(2).mean(dim=2)
    context = mean @ neck.context.weight[..., 0, 0].T + neck.context.bias
    c3 = F.conv2d(features["c3"], neck.c3[0].weight, stride=2, padding=1) * UNIT
    total = torch.relu(c3 + c4 + c5 + context[..., None, None])
    mixed = F.conv2d(total, neck.mix[0].weight, padding=2, groups=10) * UNIT
    expected = torch.relu(F.conv2d(mixed, neck.mix[2].weight) * UNIT)
    torch.testing.assert_close(fused, expected)


def test_every_level_and_the_far_end_of_the_image_reach_every_cell() -> None:
    torch.manual_seed(0)
    neck = ContextEnhancement(CHANNELS, STRIDES, ContextEnhancementOptions(width=10)).eval()
    features = {key: value.requires_grad_() for key, value in maps(256, 256, count=1).items()}
    neck(features)[0][0, :, 0, 0].sum().backward()
    for key, feature in features.items():
        assert feature.grad.abs().sum() > 0, key
    assert features["c5"].grad[0, :, -1, -1].abs().sum() > 0  # through the global average
    assert features["c4"].grad[0, :, -1, -1].abs().sum() == 0


def test_trains_with_one_image_in_the_batch() -> None:
    neck = ContextEnhancement(CHANNELS, STRIDES, ContextEnhancementOptions(width=10)).train()
    fused, _ = neck(maps(count=1))
    fused.sum().backward()
    assert all(parameter.grad is not None for parameter in neck.parameters())
