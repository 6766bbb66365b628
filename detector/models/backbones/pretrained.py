"""Pre-trained weights for a backbone: ImageNet by name, or a file of torchvision, timm, the authors or this project."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from detector.errors import InputError
from detector.models.backbones.contract import Backbone
from detector.models.backbones.external import External
from detector.models.backbones.input_frame import BGR, FRAMES, RGB, for_normalised_rgb
from detector.models.backbones.key_maps import in_order_here, is_megvii, library_names, megvii_backbone, megvii_names
from detector.models.backbones.published import REMEDY, published_weights
from detector.models.weights import DamagedFileError, first_three, misfits, oddity, read_tensors

# What a classifier of this project has on top of a backbone.
CLASSIFIER = ("conv5.", "fc.")
AUTHORS = "the authors' ShuffleNet V2"


@dataclass(frozen=True)
class WeightsReport:
    """What `load_weights` did. Names are the backbone's, except where it says otherwise.

    Attributes:
        source: where the weights came from, or None.
        format: whose names they had there: "this project's names" (torchvision's for most families), "the authors'
            ShuffleNet V2", "a whole model's names" (torchvision or timm).
        input_frame: what the weights were trained on, see `load_weights`.
        matched: tensors taken from there.
        ignored: names there, for which a backbone has no place (the classifier's).
        kept: tensors that are not there and keep their start (the identity of V2*).
        problems: with `partial`, one phrase for each tensor that is missing there, or of another shape, or unknown.
        random: with `partial`, tensors that keep their random start.
        classifier: the tensors "conv5..." and "fc..." that lie there; those of the authors under these names.
    """

    source: str | None
    format: str = ""
    input_frame: str = RGB
    matched: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    random: tuple[str, ...] = ()
    classifier: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        if self.source is None:
            return "backbone: random weights"
        text = f"backbone: {len(self.matched)} tensors from {self.source}, {len(self.ignored)} of a classifier ignored"
        text += f", {len(self.kept)} of V2* start as the identity" if self.kept else ""
        return text + (f", {len(self.random)} start at random" if self.random else "")


def load_weights(
    backbone: Backbone, source: str | Path | None, *, input_frame: str | None = None, partial: bool = False
) -> WeightsReport:
    """Fill a backbone with trained weights, in place.

    The names of its tensors tell whose file it is. V2 weights fit V2*: what V2* has more keeps its identity start. The
    authors' ShuffleNet V2 becomes this one exactly (`key_maps`), up to the border of the image (`input_frame`).

    Args:
        backbone: as built by `build_backbone`.
        source: "imagenet" (the published file, downloaded once into the cache of torch or of timm), the path of a state
            dict (or of a dict that holds one as "state_dict"; .safetensors too), or None for no weights.
        input_frame: what the weights were trained on: "rgb_imagenet", normalised RGB as we have it, or "bgr255", BGR
            pixels in 0-255. None: "bgr255" for the authors' files, else "rgb_imagenet".
        partial: load what fits, and leave the rest at random.

    Raises:
        InputError: there is no such file, no network, no published file for this backbone, or the file is damaged or
            made for another architecture. The backbone is unchanged then.
    """
    if source is None:
        return WeightsReport(None)
    if input_frame not in (None, *FRAMES):
        raise InputError(f"input={input_frame} is unknown; there is {' and '.join(FRAMES)}.")
    if source == "imagenet":
        content, source = published_weights(backbone)
    else:
        content = _read(Path(source))
    return _load(backbone, _state_dict(content, str(source)), str(source), input_frame, partial)


def _read(path: Path) -> Any:
    if not os.path.isfile(path):  # unlike pathlib's, no error for a name that no file can have
        raise InputError(f"backbone.weights={path}: there is no such file. {REMEDY}")
    try:
        return read_tensors(path)
    except DamagedFileError as error:
        raise InputError(f"backbone.weights={path}: not a whole file of torch weights ({error}). {REMEDY}") from error


def _state_dict(content: Any, source: str) -> dict[str, Tensor]:
    """Names and tensors, without the "module." of a network that was saved in its data-parallel wrapper."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"backbone.weights={source}: holds no state dict (names and tensors). {REMEDY}")
    for name, value in content.items():
        if odd := oddity(value):
            raise InputError(f"backbone.weights={source}: {name} {odd}. {REMEDY}")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _load(
    backbone: Backbone, content: dict[str, Tensor], source: str, input_frame: str | None, partial: bool
) -> WeightsReport:
    own = backbone.state_dict()
    authors = megvii_backbone(backbone, content, source) if is_megvii(content) else None
    names = library_names(backbone) if authors is None else megvii_names(authors, content)
    tensors = {names.get(name, name): value for name, value in content.items()}
    theirs = {name: other for other, name in names.items()} | {names.get(name, name): name for name in content}

    # Tensors of a classifier on top.
    whole = backbone.names_of_whole() if isinstance(backbone, External) else frozenset()
    ignored = [name for name in tensors if name not in own and (name.startswith(CLASSIFIER) or name in whole)]
    given = {name: value for name, value in tensors.items() if name not in ignored}
    kept = [name for name in own if name not in given and _may_be_absent(name, given, authors is not None)]
    expected = {name: tensor for name, tensor in own.items() if name not in kept}
    problems = misfits(expected, given, lambda name: _both_names(name, theirs.get(name, name)))
    fitting = [name for name in expected if name not in problems]
    if problems and not (partial and fitting):
        held = "" if fitting else f". The file has {len(content)} tensors: {', '.join(list(content)[:4])} ..."
        raise InputError(
            f"backbone.weights={source}: made for another architecture, or damaged: "
            f"{first_three(problems.values())}{held}. Choose the backbone, width and layout that the file was made for."
        )

    frame = input_frame or (RGB if authors is None else BGR)
    if authors is not None:
        tensors = in_order_here(tensors, authors)
    # A stem that starts at random has nothing to convert; one of another kind is refused there.
    if frame == BGR and not ("conv1.0.weight" in expected and "conv1.0.weight" not in fitting):
        tensors = for_normalised_rgb(tensors)
    backbone.load_state_dict({name: tensors[name] for name in fitting}, strict=False)
    own_names = all(theirs.get(name, name) == name for name in fitting)
    return WeightsReport(
        source,
        format=AUTHORS if authors else "this project's names" if own_names else "a whole model's names",
        input_frame=frame,
        matched=tuple(fitting),
        ignored=tuple(theirs.get(name, name) for name in ignored),
        kept=tuple(name for name in kept if ".extra." in name),
        problems=tuple(problems.values()),
        random=tuple(name for name in expected if name not in fitting and not name.endswith(".order")),
        classifier={name: value for name, value in tensors.items() if name.startswith(CLASSIFIER) and name not in own},
    )


def _both_names(name: str, theirs: str) -> str:
    return name if theirs == name else f"{theirs} (here {name})"


def _may_be_absent(name: str, given: Collection[str], authors: bool) -> bool:
    if name.endswith(".num_batches_tracked"):  # files older than torch 0.4.1
        return True
    if name.endswith(".order") and authors:  # of this project alone
        return True
    return ".extra." in name and not any(".extra." in other for other in given)
