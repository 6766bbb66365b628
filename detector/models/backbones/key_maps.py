"""The tensors of other libraries' files under the names here, and the authors' ShuffleNet V2 in the order here.

The two networks are the same up to the order of channels (`channel_order`): so the channels of each branch are put into
the order here, and what reads them follows.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from detector.errors import InputError
from detector.models.backbones.channel_order import reads_here, reads_of_authors
from detector.models.backbones.contract import Backbone
from detector.models.backbones.external import External
from detector.models.backbones.mobilenet import MobileNetV2
from detector.models.backbones.shufflenet_v2 import DownsamplingUnit, ShuffleNetV2, Stage

# A channel by its origin: the branch that made it (PROJECTION, or the number of the unit whose main branch it was), and
# its number among the outputs of that branch.
Channel = tuple[int, int]
PROJECTION = -1
STAGES = ("stage2", "stage3", "stage4")
BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def library_names(backbone: Backbone) -> dict[str, str]:
    """The name here of each tensor of a library's whole model that has another one there, and of what is on top.

    timm's and torchvision's models say themselves what their parts are called. In torchvision's MobileNet V2,
    features.18 is conv5. Its DenseNet files write "norm.1" for what the model calls "norm1".
    """
    if isinstance(backbone, External):
        names = {there: here for here, there in backbone.names_in_library().items()}
        return {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): names[name] for name in names} | names
    if isinstance(backbone, MobileNetV2):
        names = {"features.18.0.weight": "conv5.0.weight"}
        names |= {f"features.18.1.{part}": f"conv5.1.{part}" for part in BN}
        return names | {f"classifier.1.{part}": f"fc.{part}" for part in ("weight", "bias")}
    return {}


def is_megvii(names: Iterable[str]) -> bool:
    """Whether these are the names of the authors' code, units numbered through or by stage."""
    return any(re.match(r"(features|stage[234])\.\d+\.branch_main\.", name) for name in names)


def megvii_names(backbone: ShuffleNetV2, file: Iterable[str] = ()) -> dict[str, str]:
    """The name here of each of the authors', those of a classifier included: conv_last is conv5, classifier.0 is fc.

    Args:
        file: names in a file, where units are numbered through, "features.5", or by stage, "stage3.1", as in FastestDet
            and Yolo-FastestV2, which took the authors' code.
    """
    by_stage = any(name.startswith("stage") for name in file)
    starts, number = {}, 0
    for stage in STAGES:
        starts[stage] = number
        number += len(getattr(backbone, stage))
    branches = {"branch1": "branch_proj", "branch2": "branch_main"}
    names = {f"conv_last.{rest}": f"conv5.{rest}" for rest in ("0.weight", *(f"1.{part}" for part in BN))}
    names["classifier.0.weight"] = "fc.weight"
    for here in backbone.state_dict():
        if match := re.match(r"(stage\d)\.(\d+)\.(branch\d)\.(.+)", here):
            stage, unit, branch, rest = match.groups()
            place = f"{stage}.{unit}" if by_stage else f"features.{starts[stage] + int(unit)}"
            names[f"{place}.{branches[branch]}.{rest}"] = here
        elif here.startswith("conv1."):
            names[here.replace("conv1", "first_conv", 1)] = here
    return names


def megvii_backbone(backbone: Backbone, tensors: Mapping[str, Tensor], source: str) -> ShuffleNetV2:
    """The backbone itself, if it can become the network of an authors' file.

    Args:
        tensors: of the file, under its names.
        source: the file, for the message.

    Raises:
        InputError: it is of another family, has residuals, no shuffle or four stages, or its layout has no place for a
            projection that keeps its channels.
    """
    if not isinstance(backbone, ShuffleNetV2) or len(backbone.options.channels) > 3:
        raise InputError(
            f"backbone.weights={source}: a ShuffleNet V2 of the authors' code, for backbone=v2_0.5x, v2_1x, v2_1.5x, "
            "v2_2x and their V2* variants only. Choose the one of this width."
        )
    if not backbone.options.shuffle or backbone.options.residual:
        raise InputError(
            f"backbone.weights={source}: the authors' network shuffles and has no residuals. Set backbone.shuffle=true "
            "and backbone.residual=false."
        )
    for authors, here in megvii_names(backbone, tensors).items():
        if authors in tensors and here.endswith(".0.branch1.2.weight"):
            outputs, inputs = backbone.get_parameter(here).shape[:2]
            if tensors[authors].shape[:2] == (inputs, inputs) != (outputs, inputs):
                raise InputError(
                    f"backbone.weights={source}: {authors} keeps its {inputs} channels, and layout=torchvision has "
                    f"{outputs} there. Add backbone.layout=paper: 0.5x alone is the same in both layouts."
                )
    return backbone


def in_order_here(tensors: Mapping[str, Tensor], backbone: ShuffleNetV2) -> dict[str, Tensor]:
    """The authors' tensors with their channels in the order in which the units here use them.

    c3, c4 and c5 are then the authors' up to the order of channels, and conv5 and fc, which read c5
    in that order, give the authors' logits.

    Args:
        tensors: under the names here; those that are absent, or of another shape, are left as they are.
        backbone: gives the shapes and, in an uneven pair of branches, the order. See `megvii_backbone`.
    """
    own, result = backbone.state_dict(), dict(tensors)

    def reorder(prefix: str, outputs: Sequence[int] | None = None, inputs: Sequence[int] | None = None) -> None:
        for name, tensor in tensors.items():
            if name.rpartition(".")[0] != prefix or not tensor.ndim:
                continue
            if name in own and tensor.shape != own[name].shape:
                continue
            tensor = tensor if outputs is None else tensor[list(outputs)]
            result[name] = tensor if inputs is None else tensor[:, list(inputs)]

    reads = None  # place in the authors' order of each channel that the next stage reads; None: the same order
    for name in STAGES:
        stage: Stage = getattr(backbone, name)
        outputs, inputs = stage_order(stage)
        reorder(f"{name}.0.branch1.0", outputs=reads)
        reorder(f"{name}.0.branch1.1", outputs=reads)
        reorder(f"{name}.0.branch1.2", outputs[PROJECTION], reads)
        reorder(f"{name}.0.branch1.3", outputs[PROJECTION])
        for unit, taken in enumerate([reads, *inputs[:-1]]):
            reorder(f"{name}.{unit}.branch2.0", inputs=taken)
            reorder(f"{name}.{unit}.branch2.5", outputs[unit])
            reorder(f"{name}.{unit}.branch2.6", outputs[unit])
        reads = inputs[-1]
    if "conv5.0.weight" in tensors and tensors["conv5.0.weight"].shape[1:2] == (len(reads or ()),):
        reorder("conv5.0", inputs=reads)
    if "fc.weight" in tensors and tensors["fc.weight"].ndim:  # the authors' classifier has no bias
        result.setdefault("fc.bias", tensors["fc.weight"].new_zeros(len(tensors["fc.weight"])))
    return result


def stage_order(stage: Stage) -> tuple[dict[int, list[int]], list[list[int]]]:
    """How the authors' channels have to be ordered to be those of one stage here.

    Each channel is followed through both networks. One that passes is read by a later unit, or leaves the stage; every
    branch has equally many such channels for each reader in both networks, so they are paired within branch and reader.

    Returns:
        For each branch (PROJECTION, 0, 1, ...) the authors' output at each output here. And for the readers (units 1,
        2, ..., then whatever follows the stage) the authors' input at each input here.
    """
    first = stage[0]
    assert isinstance(first, DownsamplingUnit)
    projected, width = len(first.get_parameter("branch1.2.weight")), first.outputs
    pair = np.arange(width)
    own = pair if first.order is None else first.order.numpy()

    def origin(number: int) -> Channel:
        if number < width:
            return (PROJECTION, number) if number < projected else (0, number - projected)
        unit, index = divmod(number - width, width // 2)
        return unit + 1, index

    outputs: dict[int, dict[int, int]] = defaultdict(dict)
    inputs = []
    for here, authors in zip(reads_here(own, len(stage) - 1), reads_of_authors(pair, len(stage) - 1), strict=True):
        places: dict[int, deque[int]] = defaultdict(deque)
        for place, number in enumerate(authors):
            places[origin(number)[0]].append(place)
        taken = [(*origin(number), places[origin(number)[0]].popleft()) for number in here]
        inputs.append([place for _, _, place in taken])
        for branch, index, place in taken:
            outputs[branch][index] = origin(authors[place])[1]
    return {branch: [order[i] for i in range(len(order))] for branch, order in outputs.items()}, inputs
