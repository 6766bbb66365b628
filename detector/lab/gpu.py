"""Training steps and predictions on a GPU, beside torchvision's light two-stage detector; loading is not in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from detector.data.collate import Batch, collate
from detector.data.dataset import DetectionDataset
from detector.data.index import AnnotationIndex
from detector.data.preprocess import Preprocessing
from detector.data.transforms import AugmentOptions, TrainTransform
from detector.lab.latency import milliseconds, take_turns
from detector.lab.peers import torchvision_targets
from detector.models.build import NetworkOptions, build_network
from detector.models.fuse import fuse

STEPS_PER_TURN = 4
SIZE = 320  # of the images' sides: what torchvision's detector is made for
BATCHES = (16, 64)
PEER = "fasterrcnn_mobilenet_v3_large_320_fpn"


class Contestant(NamedTuple):
    """A network as it runs: whose, how its maps lie in memory, and in which precision it computes."""

    name: str
    memory: str
    precision: str


OWN = [
    Contestant("this package", memory, precision)
    for precision in ("float32", "bf16")
    for memory in ("channels last", "contiguous")
]
OTHERS = [Contestant(f"torchvision {PEER}", "contiguous", precision) for precision in ("float32", "bf16")]


def measure(options: NetworkOptions, index: AnnotationIndex, device: torch.device, turns: int) -> list[dict[str, Any]]:
    """What was measured: "what", "batch", the parts of a Contestant, "ms" (median) and "images_per_second".

    Args:
        options: of this package's network; torchvision's is as it comes, with as many classes. Both start at random.
        index: of training images of SIZE, at least as many as the largest of BATCHES.
        device: where images lie before the clock starts.
    """
    contestants, rows = [*OWN, *OTHERS], list[dict[str, Any]]()
    for size in BATCHES:
        batch = _batch(index, size).to(device)
        for what, make in (("training step", _training), ("prediction", _prediction)):
            calls = {
                " ".join(contestant): partial(_repeat, make(options, len(index.class_names), batch, contestant, device))
                for contestant in contestants
            }
            times = take_turns(calls, turns, f"{what}, batch {size}").values()
            rows += [_row(what, size, *found) for found in zip(contestants, times, strict=True)]
    return rows


def _row(what: str, size: int, contestant: Contestant, seconds: list[float]) -> dict[str, Any]:
    spent = milliseconds(seconds) / STEPS_PER_TURN
    return (
        {"what": what, "batch": size} | contestant._asdict() | {"ms": spent, "images_per_second": 1000 * size / spent}
    )


def _repeat(call: Callable[[], object]) -> None:
    for _ in range(STEPS_PER_TURN):
        call()


def _batch(index: AnnotationIndex, size: int) -> Batch:
    transform = TrainTransform(Preprocessing(short_side=SIZE, long_side=SIZE), AugmentOptions(), seed=0)
    samples = DetectionDataset(index, transform)
    return collate([samples[i] for i in range(size)])


def _network(options: NetworkOptions, classes: int, contestant: Contestant, device: torch.device) -> Any:
    network: nn.Module
    if contestant in OWN:
        network = build_network(options, classes)
    else:
        network = getattr(torchvision.models.detection, PEER)(
            weights=None, weights_backbone=None, num_classes=classes + 1
        )
    layout = torch.channels_last if _last(contestant) else torch.contiguous_format
    return network.to(device).to(memory_format=layout)


def _last(contestant: Contestant) -> bool:
    return contestant.memory == "channels last"


def _as_it_lies(network: Any, contestant: Contestant) -> Any:
    """This package's network makes maps channels last from the start: not this one, where it is to be contiguous."""
    normalise = network.normalise
    network.normalise = normalise if _last(contestant) else lambda images: normalise(images).contiguous()
    return network


def _training(
    options: NetworkOptions, classes: int, batch: Batch, contestant: Contestant, device: torch.device
) -> Callable[[], None]:
    """A step of SGD: forward pass, losses, backward pass, new weights."""
    network = _network(options, classes, contestant, device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    targets = torchvision_targets(batch)
    losses: Any = partial(network, *targets)
    if contestant in OWN:
        losses = partial(_as_it_lies(network, contestant).losses, batch)

    def step() -> None:
        optimizer.zero_grad()
        with _precision(contestant, device):
            parts: Mapping[str, Tensor] = losses()
        torch.stack([part.float() for part in parts.values()]).sum().backward()
        optimizer.step()

    return step


def _prediction(
    options: NetworkOptions, classes: int, batch: Batch, contestant: Contestant, device: torch.device
) -> Callable[[], object]:
    """From images of one size to boxes in its frame; this package's network folded (`fuse`), no more."""
    network = _network(options, classes, contestant, device).eval()
    if contestant in OWN:
        network = _as_it_lies(fuse(network), contestant)
        images: tuple[Any, ...] = (batch.images, batch.image_sizes)
        run = network.detect
    else:
        images, run = (torchvision_targets(batch)[0],), torch.inference_mode()(network)

    def predict() -> object:
        with _precision(contestant, device):
            return run(*images)

    return predict


def _precision(contestant: Contestant, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=contestant.precision == "bf16")
