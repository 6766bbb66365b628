"""A ShuffleNet V2 without shuffles against the one that shuffles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_export_graph import changed
from test_models_fuse import randomise
from torch import nn

from detector.models.backbones import build_backbone, parse_backbone
from detector.models.backbones.shufflenet_v2 import Stage
from detector.models.backbones.unshuffled import UnshuffledStage, plan, reorder_inputs
from detector.models.build import NetworkOptions, build_network
from detector.models.fuse import fuse
from detector.models.light_head import LightHead
from detector.models.light_head_rcnn import LightHeadRCNN
from detector.models.neck import Neck
from detector.models.rpn import RPN


def naive_reads(half: int, units: int) -> list[list[tuple[int, int]]]:
    """Figure 3 (c), channel by channel: what each unit's branch reads, and the result, as (tensor, channel)."""
    channels = [(0, c) for c in range(half)] + [(1, c) for c in range(half)]
    reads = []
    for unit in range(units):
        shuffled = [channels[group * half + c] for c in range(half) for group in (0, 1)]
        reads.append(shuffled[half:])
        channels = shuffled[:half] + [(2 + unit, c) for c in range(half)]
    return [*reads, [channels[group * half + c] for c in range(half) for group in (0, 1)]]


@pytest.mark.parametrize("half", [2, 24, 58, 116, 122, 232])
@pytest.mark.parametrize("units", [0, 1, 3, 7])
def test_the_plan_names_every_channel_that_is_read_and_no_other(half: int, units: int) -> None:
    reads, orders = plan(half, units)
    for slices, order, expected in zip(reads, orders, naive_reads(half, units), strict=True):
        listed = [(source, c) for source, start, stop in slices for c in range(start, stop)]
        assert [expected[p] for p in order] == listed
        assert len({source for source, _, _ in slices}) == len(slices)  # one slice of each tensor
    # One reader has every channel: a tensor can be split once for all.
    read = [(source, c) for slices in reads for source, start, stop in slices for c in range(start, stop)]
    assert sorted(read) == [(source, c) for source in range(2 + units) for c in range(half)]


def sharp(network: nn.Module) -> Any:
    """Other channels, other weights: nothing may look right by chance."""
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
    return randomise(network).eval()


SHUFFLENET = {
    "name": "shufflenet_v2", "stem_channels": 8, "channels": [16, 28, 44], "repeats": [1, 4, 3],
    "extra_depthwise": False, "layout": "torchvision", "dilate_c5": False,
}  # fmt: skip
NO_NECK = {"name": "none", "width": None}
NETWORKS: dict[str, dict[str, dict[str, Any]]] = {
    "cem": {},
    "no neck": {"neck": NO_NECK},
    "no neck, dense RPN, 15": {"neck": NO_NECK, "rpn": {"separable": False}},
    "V2*, dilated": {"backbone": {"extra_depthwise": True, "dilate_c5": True}},
    "paper's layout": {"backbone": {"layout": "paper"}},
    "SE": {"backbone": {"se": True}},
    "four stages": {"backbone": {"channels": [12, 16, 28, 44], "repeats": [2, 3, 2, 2]}},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_sliced_detector_gives_the_same_maps(small_spec: dict[str, Any], name: str) -> None:
    torch.manual_seed(0)
    network = sharp(
        build_network(NetworkOptions.parse(changed(small_spec | {"backbone": SHUFFLENET}, NETWORKS[name])), 3)
    ).double()
    sliced = fuse(network)
    assert not any(isinstance(part, Stage) for part in sliced.modules())
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.inference_mode():
        images = network.normalise(pixels)
        expected, got = network.backbone(images), sliced.backbone(images)
        for key, stage in (("c3", "stage2"), ("c4", "stage3"), ("c5", "stage4")):
            order = getattr(sliced.backbone, stage).order
            assert sorted(order.tolist()) == list(range(expected[key].shape[1]))
            torch.testing.assert_close(got[key], expected[key][:, order], rtol=1e-9, atol=1e-9)
        for one, other in zip(outputs(network, pixels), outputs(sliced, pixels), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-8, atol=1e-8)


def outputs(network: LightHeadRCNN, pixels: torch.Tensor) -> list[torch.Tensor]:
    rpn_map, head_map = network.features(pixels)
    objectness, deltas, _ = network.rpn(rpn_map)
    return [objectness, deltas, network.head.thin(head_map)]


@pytest.mark.parametrize("changes", [{"residual": True}, {"shuffle": False}])
def test_stages_that_need_their_order_keep_shuffling(small_spec: dict[str, Any], changes: dict[str, Any]) -> None:
    network = sharp(
        build_network(NetworkOptions.parse(small_spec | {"backbone": SHUFFLENET | {"repeats": [2, 4, 3]} | changes}), 3)
    )
    fused = fuse(network)
    assert not any(isinstance(part, UnshuffledStage) for part in fused.modules())
    pixels = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.inference_mode():
        for one, other in zip(outputs(network, pixels), outputs(fused, pixels), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3 * float(one.abs().max()))


class OwnNeck(Neck):
    """Somebody's own, that hands c4 to the RPN and makes a map of c3 and c5 for the head."""

    rpn_map = "c4"

    def __init__(self, channels: dict[str, int]) -> None:
        super().__init__()
        self.rpn_channels, self.rpn_stride = channels["c4"], 16
        self.head_channels, self.head_stride = 16, 32
        self.near, self.far = nn.Conv2d(channels["c3"], 16, 3, stride=4, padding=1), nn.Conv2d(channels["c5"], 16, 1)

    def forward(self, features: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return features["c4"], self.near(features["c3"]) + self.far(features["c5"])

    def readers(self, name: str) -> list[nn.Module]:
        return {"c3": [self.near], "c4": [], "c5": [self.far]}[name]


def test_a_neck_of_ones_own_says_what_reads_which_map(small_spec: dict[str, Any]) -> None:
    torch.manual_seed(0)
    options = NetworkOptions.parse(small_spec | {"backbone": SHUFFLENET})
    backbone = build_backbone(options.backbone)
    neck = OwnNeck(backbone.channels)
    rpn, head = RPN(neck.rpn_channels, 16, options.rpn), LightHead(16, 32, 3, options.light_head)
    network = sharp(LightHeadRCNN(backbone, neck, rpn, head)).double()
    fused = fuse(network)
    assert any(isinstance(part, UnshuffledStage) for part in fused.modules())
    pixels = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.inference_mode():
        for one, other in zip(outputs(network, pixels), outputs(fused, pixels), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-8, atol=1e-8)


def test_a_neck_that_does_not_say_it_is_refused(small_spec: dict[str, Any]) -> None:
    network = build_network(NetworkOptions.parse(small_spec | {"backbone": SHUFFLENET}), 3)
    network.neck.readers = lambda name: Neck.readers(network.neck, name)
    with pytest.raises(NotImplementedError):
        fuse(network)


def test_other_backbones_are_left_alone(small_spec: dict[str, Any]) -> None:
    backbone = {
        "name": "mobilenet_v2", "width": 0.15, "multiple_of": 4, "scale_last": False, "activation": "relu6",
        "dilate_c5": False,
    }  # fmt: skip
    network = build_network(NetworkOptions.parse(small_spec | {"backbone": backbone}), 3)
    before = {name for name, _ in network.named_modules()}
    network.to_inference()
    assert {name for name, _ in network.named_modules()} == before


def test_reordered_inputs() -> None:
    torch.manual_seed(0)
    order = torch.from_numpy(np.random.default_rng(0).permutation(6))
    depthwise, mixing = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 4, 1)
    x = torch.randn(2, 6, 5, 5)
    expected = mixing(depthwise(x))
    reorder_inputs((nn.Identity(), nn.Sequential(depthwise, mixing)), order)
    torch.testing.assert_close(mixing(depthwise(x[:, order])), expected)
    for layer in (nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1, groups=2)):
        with pytest.raises(TypeError, match="cannot reorder"):
            reorder_inputs(layer, order)


def test_fusing_twice_changes_nothing(small_spec: dict[str, Any]) -> None:
    """An export traces a detector that is fused already."""
    torch.manual_seed(0)
    once = fuse(sharp(build_network(NetworkOptions.parse(small_spec | {"backbone": SHUFFLENET}), 3)))
    pixels = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.inference_mode():
        for one, other in zip(outputs(once, pixels), outputs(fuse(once), pixels), strict=True):
            assert torch.equal(one, other)


def test_a_backbone_by_itself_keeps_the_order_of_its_channels() -> None:
    backbone = sharp(build_backbone(parse_backbone(SHUFFLENET)))
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        for key, expected in backbone(images).items():
            torch.testing.assert_close(
                fuse(backbone)(images)[key], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
            )
