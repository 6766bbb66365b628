"""Parts of this package beside torchvision's, which people would use otherwise: same input, same process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader

from detector.data.collate import Batch, collate
from detector.data.dataset import DetectionDataset
from detector.data.index import AnnotationIndex
from detector.data.preprocess import Preprocessing
from detector.data.transforms import AugmentOptions, TrainTransform
from detector.lab.latency import Call, median_ratio, milliseconds, take_turns
from detector.models.backbones import build_backbone
from detector.models.backbones.shufflenet_v2 import ShuffleNetV2Options
from detector.models.build import NetworkOptions, build_network
from detector.models.fuse import fuse
from detector.models.ps_roi_align import ps_roi_align

STEPS_PER_TURN = 2


def contest(name: str, own: Call, peer: Call, turns: int) -> dict[str, Any]:
    """What was measured: "name", "ours_ms" and "peer_ms" (medians), "ratio" (how many times faster this package is)."""
    times = take_turns({"own": own, "peer": peer}, turns, name)
    return {
        "name": name,
        "ours_ms": milliseconds(times["own"]),
        "peer_ms": milliseconds(times["peer"]),
        "ratio": median_ratio(times["peer"], times["own"]),
    }


def align_contests(turns: int) -> Iterator[dict[str, Any]]:
    """PS-RoI Align against torchvision's operator: N=2, P=1000, 490 channels, 50 x 76 (an 800 x 1216 input)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 490, 50, 76, generator=generator).to(memory_format=torch.channels_last).requires_grad_()
    corner = torch.rand(2, 1000, 2, generator=generator) * torch.tensor([1000.0, 600.0])
    rois = torch.cat((corner, corner + 8 + torch.rand(2, 1000, 2, generator=generator) * 300), dim=-1)
    numbered = torch.cat((torch.arange(2.0).repeat_interleave(1000)[:, None], rois.flatten(0, 1)), dim=1)

    def own() -> Tensor:
        return ps_roi_align(features, rois, spatial_scale=1 / 16, output_size=7)

    def peer() -> Tensor:
        return torchvision.ops.ps_roi_align(features, numbered, 7, spatial_scale=1 / 16, sampling_ratio=2)

    with torch.no_grad():
        yield contest("PS-RoI Align, forward", own, peer, turns)
    name = "PS-RoI Align, forward + backward"
    yield contest(name, lambda: own().sum().backward(), lambda: peer().sum().backward(), turns)


@torch.no_grad()
def backbone_contests(turns: int) -> Iterator[dict[str, Any]]:
    """ShuffleNet V2 1x as it predicts (folded) against torchvision's module in eval mode, up to stage 4.

    Both get the same contiguous images; this package's pays for its change to channels_last itself.
    """
    peer = torchvision.models.shufflenet_v2_x1_0(weights=None).eval()
    own = build_backbone(ShuffleNetV2Options())
    _randomise_statistics(peer)
    own.load_state_dict({key: value for key, value in peer.state_dict().items() if not key.startswith(("conv5", "fc"))})
    own = fuse(own.eval())
    stages = torch.nn.Sequential(peer.conv1, peer.maxpool, peer.stage2, peer.stage3, peer.stage4)
    for name, shape in (
        ("320x320, batch 1", (1, 3, 320, 320)),
        ("320x320, batch 4", (4, 3, 320, 320)),
        ("800x1216, batch 1", (1, 3, 800, 1216)),
    ):
        images = torch.randn(shape)
        torch.testing.assert_close(own(images)["c5"], stages(images), rtol=1e-3, atol=1e-4)
        yield contest(f"backbone v2_1x, {name}", partial(own, images), partial(stages, images), turns)


def _randomise_statistics(network: torch.nn.Module) -> None:
    """Statistics of an untrained network let the signal fade; with these, equal outputs mean something."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.get_buffer("running_mean").uniform_(-0.1, 0.1)
            module.get_buffer("running_var").uniform_(0.1, 0.5)


def training_contest(
    options: NetworkOptions, augment: AugmentOptions, index: AnnotationIndex, turns: int
) -> dict[str, Any]:
    """A training step, from reading files to the optimiser, against torchvision's light two-stage detector.

    Same images, same transforms, same resize (short side 320), batch 8, two steps a turn; a third of the turns,
    because the peer takes seconds.
    """
    preprocessing = Preprocessing(short_side=320, long_side=640)
    transform = TrainTransform(preprocessing, augment, seed=0)
    batches = _batches(DetectionDataset(index, transform))
    own = build_network(options, len(index.class_names)).to(memory_format=torch.channels_last).train()
    peer = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=len(index.class_names) + 1
    ).train()
    return contest(
        "training step, batch 8 at 320",
        _steps(own, batches, own.losses),
        _steps(peer, batches, lambda batch: peer(*torchvision_targets(batch))),
        max(1, turns // 3),
    )


def _batches(dataset: DetectionDataset) -> Iterator[Batch]:
    for _ in itertools.count():
        yield from DataLoader(dataset, batch_size=8, shuffle=True, drop_last=True, collate_fn=collate)


def _steps(
    network: torch.nn.Module, batches: Iterator[Batch], losses: Callable[[Batch], Mapping[str, Tensor]]
) -> Callable[[], None]:
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

    def run() -> None:
        for batch in itertools.islice(batches, STEPS_PER_TURN):
            optimizer.zero_grad()
            torch.stack(list(losses(batch).values())).sum().backward()
            optimizer.step()

    return run


def torchvision_targets(batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images in [0, 1] without padding, and their objects, as torchvision's detectors take them."""
    images = [image[:, :h, :w] / 255 for image, (h, w) in zip(batch.images, batch.image_sizes.tolist(), strict=True)]
    targets = [
        {"boxes": boxes[labels >= 0], "labels": labels[labels >= 0] + 1}  # torchvision's background is 0
        for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
    ]
    return images, targets
