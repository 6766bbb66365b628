"""Every backbone beside its published costs: what it costs, what it sees, and how fast it is on this machine.

Ma et al. 2018 (ShuffleNet V2) compare backbones by tables 5, 6 and 8; section 2 is why the columns differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from detector.lab.cost import memory_access, multiply_adds, parameters
from detector.lab.latency import milliseconds, take_turns
from detector.lab.receptive_field import TheoreticalField, effective_field, effective_side, theoretical_field
from detector.models.backbones import BackboneOptions, build_backbone
from detector.models.backbones.classifier import build_classifier
from detector.models.fuse import fuse

CLASSES = 1000
DETECTION_SIZE = (800, 1200)  # Ma et al. 2018, table 7
BATCHES = (1, 8)  # table 8: one image on ARM, eight on the GPU


@dataclasses.dataclass
class BackboneProfile:
    """One backbone with its classifier for 1000 classes.

    Attributes:
        name: of its file in conf/backbone/.
        image_size: side of the classifier's square input: 224, or what the published figure belongs to.
        parameters, multiply_adds, memory_access: of the classifier at image_size, in millions; see `cost`.
        published: multiply-adds in millions, and who says so; None where there is none.
        source, note: where the published number is from, and why the computed one differs.
        detection_multiply_adds: of the backbone alone at 800 x 1200, in thousands of millions.
        field: theoretical receptive field; None where the network is no `Backbone`, or cannot be measured.
        effective: side of the effective receptive field of c5 in pixels, with random weights.
        effective_map: the field itself.
        milliseconds: batch size -> median time of the classifier, folded, at image_size.
    """

    name: str
    image_size: int
    parameters: float
    multiply_adds: float
    memory_access: float
    published: float | None = None
    source: str = ""
    note: str = ""
    detection_multiply_adds: float | None = None
    field: TheoreticalField | None = None
    effective: float | None = None
    effective_map: np.ndarray | None = dataclasses.field(default=None, repr=False)
    milliseconds: dict[int, float] = dataclasses.field(default_factory=dict)

    @property
    def deviation(self) -> float | None:
        """Computed over published multiply-adds, minus one."""
        return None if self.published is None else self.multiply_adds / self.published - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the map."""
        fields = None if self.field is None else {"stages": self.field.stages, "blocks": self.field.blocks}
        shown = {key: value for key, value in vars(self).items() if key not in ("field", "effective_map")}
        return shown | {"deviation": self.deviation, "receptive_field": fields}


def profile(name: str, options: BackboneOptions, *, with_field: bool) -> BackboneProfile:
    """What can be computed of a backbone without a clock.

    Args:
        name, options: of a file of conf/backbone/.
        with_field: measure the receptive fields too: seconds, minutes for the deepest.
    """
    published = options.published
    found = _profile(name, build_classifier(options, CLASSES), published.image_size if published else 224)
    if published:
        found.published, found.source, found.note = published.multiply_adds, published.source, published.note
    backbone = build_backbone(options)
    found.detection_multiply_adds = multiply_adds(backbone.to("meta"), _meta(DETECTION_SIZE)) / 1e9
    if with_field:
        backbone = build_backbone(options)
        found.field = _field(backbone)
        found.effective_map = effective_field(backbone)
        found.effective = effective_side(found.effective_map)
    return found


def alexnet_profile() -> BackboneProfile:
    """AlexNet, for its speed alone (Zhang et al. 2018, table 8, 720 M): its maps have no strides of 8, 16 and 32."""
    found = _profile("alexnet", torchvision.models.alexnet(weights=None), 224)
    found.published, found.source = 720, "Zhang et al. 2018, table 8"
    found.note = "torchvision's is the one-tower variant (Krizhevsky 2014), narrower in the second convolution"
    return found


@torch.inference_mode()
def time_classifiers(
    networks: Mapping[str, tuple[nn.Module, int]],
    turns: int,
) -> dict[str, dict[int, float]]:
    """Median milliseconds of classifiers that take turns, by name and batch size.

    Args:
        networks: name -> (classifier, side of its input); each is folded first, as for prediction.
        turns: of each network, after WARM_UP that are not counted.
    """
    ready = {name: (fuse(network), size) for name, (network, size) in networks.items()}
    found: dict[str, dict[int, float]] = {name: {} for name in networks}
    for batch in BATCHES:
        calls = {
            name: partial(network, torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last))
            for name, (network, size) in ready.items()
        }
        for name, seconds in take_turns(calls, turns, f"batch {batch}").items():
            found[name][batch] = milliseconds(seconds)
    return found


def _profile(name: str, network: nn.Module, size: int) -> BackboneProfile:
    network = network.to("meta")
    images = _meta((size, size))
    return BackboneProfile(
        name,
        size,
        parameters(network) / 1e6,
        multiply_adds(network, images) / 1e6,
        memory_access(network, images) / 1e6,
    )


def _meta(size: tuple[int, int]) -> Tensor:
    return torch.empty(1, 3, *size, device="meta")


def _field(backbone: Any) -> TheoreticalField | None:
    try:
        return theoretical_field(backbone)
    except (ValueError, RuntimeError):  # stems without padding do not take a single row
        return None
