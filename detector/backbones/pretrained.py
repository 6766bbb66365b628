"""Pre-trained weights for a backbone: ImageNet by name, or a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detector.backbones.contract import Backbone
from detector.errors import InputError

# What a classifier has on top of a backbone.
CLASSIFIER = ("conv5.", "fc.")
REMEDY = "Give a file with backbone.weights=PATH, or start from random weights with backbone.weights=null."


@dataclass(frozen=True)
class WeightsReport:
    """What `load_weights` did.

    Attributes:
        source: where the weights came from, or None.
        matched: number of tensors taken from there.
        ignored: names there that a backbone has no place for (the classifier's).
        kept: names of the backbone that are not there and keep their start (the identity of V2*).
    """

    source: str | None
    matched: int = 0
    ignored: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.source is None:
            return "backbone: random weights"
        text = f"backbone: {self.matched} tensors from {self.source}, {len(self.ignored)} of a classifier ignored"
        return text + (f", {len(self.kept)} of V2* start as the identity" if self.kept else "")


def load_weights(backbone: Backbone, source: str | Path | None) -> WeightsReport:
    """Fill a backbone with trained weights, in place.

    V2 weights fit V2*: what V2* has more keeps its identity start.

    Args:
        backbone: as built by `build_backbone`.
        source: "imagenet" (torchvision's published file, downloaded once into torch's cache), the path of a state
            dict (or of a dict that holds one as "state_dict"), or None for no weights.

    Raises:
        InputError: there is no such file, no network, no published file for this backbone, or the file is damaged or
            made for another architecture. The backbone is unchanged then.
    """
    if source is None:
        return WeightsReport(None)
    if source == "imagenet":
        url = imagenet_url(backbone)
        return _load(backbone, _download(url), url)
    return _load(backbone, _read(Path(source)), str(source))


def imagenet_url(backbone: Backbone) -> str:
    """Address of torchvision's ImageNet weights for a ShuffleNet V2 of this width.

    Raises:
        InputError: there are none.
    """
    from torchvision import models

    published = {
        (48, 96, 192): models.ShuffleNet_V2_X0_5_Weights,
        (116, 232, 464): models.ShuffleNet_V2_X1_0_Weights,
        (176, 352, 704): models.ShuffleNet_V2_X1_5_Weights,
        (244, 488, 976): models.ShuffleNet_V2_X2_0_Weights,
    }
    widths = tuple(backbone.channels.values())
    if widths not in published:
        raise InputError(f"backbone.weights=imagenet: none are published for stages of {widths} channels. {REMEDY}")
    return published[widths].IMAGENET1K_V1.url


def _download(url: str) -> Any:
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except Exception as error:  # no network, a proxy's answer, a damaged file in the cache: one remedy
        raise InputError(f"backbone.weights=imagenet: could not get {url} ({error}). {REMEDY}") from error


def _read(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"backbone.weights={path}: there is no such file. {REMEDY}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"backbone.weights={path}: not a whole file of torch weights ({reason}). {REMEDY}") from error


def _load(backbone: Backbone, content: Any, source: str) -> WeightsReport:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"backbone.weights={source}: holds no state dict (names and tensors). {REMEDY}")
    own = backbone.state_dict()
    ignored = tuple(name for name in content if name.startswith(CLASSIFIER))
    given = {name: value for name, value in content.items() if name not in ignored}
    kept = tuple(name for name in own if name not in given and _may_be_absent(name, given))
    problems = _mismatches(own, given, kept)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(
            f"backbone.weights={source}: made for another architecture: {'; '.join(problems[:3])}{more}. "
            "Choose the backbone, width and layout that the file was made for."
        )
    backbone.load_state_dict(given, strict=False)
    return WeightsReport(source, len(given), ignored, tuple(name for name in kept if ".extra." in name))


def _may_be_absent(name: str, given: Mapping[str, Tensor]) -> bool:
    if name.endswith(".num_batches_tracked"):  # files older than torch 0.4.1
        return True
    return ".extra." in name and not any(".extra." in other for other in given)


def _mismatches(own: Mapping[str, Tensor], given: Mapping[str, Tensor], kept: tuple[str, ...]) -> list[str]:
    """One phrase for each tensor that does not fit, in the order of the network."""
    problems = []
    for name, tensor in own.items():
        expected = tuple(tensor.shape)
        if name in given and tuple(given[name].shape) != expected:
            problems.append(f"{name} is {tuple(given[name].shape)}, expected {expected}")
        elif name not in given and name not in kept:
            problems.append(f"{name} is missing, expected {expected}")
    return problems + [f"{name} has no place here" for name in given if name not in own]
