"""Backbones of other libraries, torchvision and timm, brought to the contract.

The networks are the libraries' own; ours is which of their outputs are c3, c4 and c5, and what makes them fit: sizes,
stages, and the pairs that `deploy.fuse` may fold. All of it is read from the network itself, with small images.
"""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.errors import InputError
from detector.models.backbones.contract import Backbone, BackboneOptions

FEATURES = ("c3", "c4", "c5")
PROBE = 64  # side of the images that sizes are read from
MARGINS = range(129)  # no published stem without padding loses more
TRUNK_PROBE = 256  # large enough to tell strides by, whatever a stem loses
NEEDS = "a backbone needs maps (N, C, H, W) at strides 4, 8, 16 and 32"


class External(Backbone):
    """A network of another library. Subclasses build it, say `maps`, and call `_fit`.

    Most networks round sizes up at every stride. Where one does not, images are padded with zeros (the mean colour):
    to multiples of 32 on the right and at the bottom, and by `margin` on all sides alike where a stem without padding
    eats the border (Inception). The maps are cropped the same way, so that cell (i, j) lies where i * stride and
    j * stride are.

    Attributes:
        margin: pixels added in each direction, half of them on each side; None: images go in as they are.
        folds: names of convolutions and of the normalisation that alone reads their output, see `deploy.fuse`.
    """

    margin: int | None = None
    folds: tuple[tuple[str, str], ...] = ()

    def maps(self, images: Tensor) -> Sequence[Tensor]:
        """What the network has at stride 4, 8, 16 and 32, in its own sizes."""
        raise NotImplementedError

    def names_in_library(self) -> dict[str, str]:
        """Every name of `state_dict` -> its name in a weight file of the library's whole model."""
        return {name: name for name in self.state_dict()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See `Backbone.forward`."""
        height, width = images.shape[-2:]
        maps = self.maps(self._padded(images).contiguous(memory_format=torch.channels_last))
        features = {}
        for (key, stride), x in zip(self.strides.items(), maps[1:], strict=True):
            if self.margin is not None:
                x = x[:, :, _kept(height, x.shape[2], stride), _kept(width, x.shape[3], stride)]
            features[key] = x.contiguous(memory_format=torch.channels_last)
        return features

    def _padded(self, images: Tensor) -> Tensor:
        if self.margin is None:
            return images
        before = self.margin // 2
        below, right = (self.margin - before + -side % 32 for side in images.shape[-2:])
        return F.pad(images, (before, right, before, below)) if before or below or right else images

    def _fit(self, strides: Sequence[int]) -> None:
        """Read channels, margin, stages and folds from the finished network.

        Args:
            strides: of c3, c4 and c5.
        """
        self.strides = dict(zip(FEATURES, strides, strict=True))
        self.eval()
        self.margin = _margin(self, strides)
        with torch.enable_grad():
            folds, maps = _pairs(self, torch.zeros(1, 3, *2 * [PROBE + (self.margin or 0)]))
        self.train()
        self.channels = {key: x.shape[1] for key, x in zip(FEATURES, maps[1:], strict=True)}
        # What another module listens to must stay as it is: timm takes some maps by hooks.
        self.folds = tuple(pair for pair in folds if not any(self.get_submodule(name)._forward_hooks for name in pair))
        self.stages = _stages(self, _owners(self, maps))


class TorchvisionOptions(BackboneOptions):
    """A classification model of torchvision."""

    name: Literal["torchvision"] = "torchvision"
    model: str
    """A name of torchvision.models: resnet50, densenet121, mobilenet_v3_large ..."""


class TimmOptions(BackboneOptions):
    """A model of timm."""

    name: Literal["timm"] = "timm"
    model: str
    """A name of timm.list_models(), with or without the tag of its weights: seresnet50, resnet50.a1_in1k ..."""


class TorchvisionBackbone(External):
    """The trunk of a torchvision classification model, under the names of its weight files.

    c3, c4 and c5 are the trunk's last outputs at each stride, so that c5 is what the model's own classifier averages:
    MobileNet and ShuffleNet V2 end in a 1x1 convolution that widens. The result of DenseNet has the ReLU that
    torchvision calls as a function. GoogLeNet and Inception v3 were trained on images of another normalisation, and
    translate as torchvision does when it loads their weights.

    dilate_c5: ResNets of bottlenecks and MobileNet V3.

    Raises:
        InputError: there is no such model, it has no maps at these strides, or its last stage cannot be dilated.
    """

    rescale: Tensor
    shift: Tensor

    def __init__(self, options: TorchvisionOptions) -> None:
        super().__init__()
        model, dilate_c5 = options.model, options.dilate_c5
        stock = _torchvision_model(model)
        trunk = list(_trunk(stock))
        # Found without dilation, where strides tell the stages apart.
        taps = _taps([stride for _, stride in trunk], f"torchvision's {model}")
        if dilate_c5:
            stock = _torchvision_model(model, **_dilation(model))
        self.model = model
        self.path = tuple(name for name, _ in trunk[: taps[-1] + 1])
        self.taps = tuple(self.path[tap] for tap in taps)
        for name in dict.fromkeys(name.partition(".")[0] for name in self.path):
            self.add_module(name, stock.get_submodule(name))
        self.last_relu = model.startswith("densenet")
        if getattr(stock, "transform_input", False):
            # From the mean and deviation of ImageNet to 0.5 and 0.5 (torchvision/models/inception.py).
            mean, deviation = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
            self.register_buffer("rescale", (deviation / 0.5).view(1, 3, 1, 1), persistent=False)
            self.register_buffer("shift", ((mean - 0.5) / 0.5).view(1, 3, 1, 1), persistent=False)
        self._fit((8, 16, 16 if dilate_c5 else 32))

    def maps(self, images: Tensor) -> list[Tensor]:
        """See `External.maps`."""
        x = images * self.rescale + self.shift if "rescale" in self._buffers else images
        found = []
        for name in self.path:
            x = self.get_submodule(name)(x)
            if name in self.taps:
                found.append(x)
        return [*found[:-1], found[-1].relu()] if self.last_relu else found


class TimmBackbone(External):
    """The network of `timm.create_model(model, features_only=True)`, as `body`.

    Args:
        model: a name of `timm.list_models()`.
        dilate_c5: the last stage keeps stride 16, for models of timm that take `output_stride`.

    Raises:
        InputError: timm is not installed, does not know the model or gives no such maps of it.
    """

    def __init__(self, options: TimmOptions) -> None:
        super().__init__()
        model, dilate_c5 = options.model, options.dilate_c5
        dilation = {"output_stride": 16} if dilate_c5 else {}
        body = _timm_model(model, **dilation)
        strides = body.feature_info.reduction()
        taps = _taps(strides, f"timm's {model}", last=16 if dilate_c5 else 32)
        if taps[-1] < len(strides) - 1:  # without what comes after c5
            body = _timm_model(model, out_indices=tuple(taps), **dilation)
            taps = list(range(len(taps)))
        self.model, self.body, self.taps = model, body, tuple(taps)
        self._fit((8, 16, 16 if dilate_c5 else 32))

    def maps(self, images: Tensor) -> list[Tensor]:
        """See `External.maps`."""
        found = self.body(images)
        return [found[tap] for tap in self.taps]

    def names_in_library(self) -> dict[str, str]:
        """See `External.names_in_library`. timm wraps some networks in a module more, and joins a Sequential's name
        with those of its parts: "body.features_conv0.weight" is "features.conv0.weight"."""
        with torch.device("meta"):
            whole = set(_timm().create_model(self.model, pretrained=False).state_dict())
        joined = {name.replace(".", "_", 1): name for name in whole}
        found = {}
        for own in self.state_dict():
            name = own.removeprefix("body.")
            name = name if name in whole or name in joined else name.partition(".")[2]
            found[own] = name if name in whole else joined[name]
        return found


def _taps(strides: Sequence[int], name: str, *, last: int = 32) -> list[int]:
    """Places of the last outputs at stride 4, 8 and 16, and of the last one of all at stride `last`."""
    end = max((place for place, stride in enumerate(strides) if stride == last), default=0)
    before = {stride: place for place, stride in enumerate(strides[:end])}
    if not end or not {4, 8, 16} <= set(before):
        given = ", ".join(map(str, dict.fromkeys(strides))) or "no maps"
        wanted = f"{NEEDS[:-2]}16 with dilate_c5" if last == 16 else NEEDS
        raise InputError(f"backbone.model: {name} gives {'strides ' * bool(strides)}{given}; {wanted}.")
    return [before[4], before[8], before[16], end]


# torchvision


def _torchvision_model(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise InputError(f"backbone.model={name!r} is not in torchvision; {_closest(name, known)}")
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True, "transform_input": True}
    return models.get_model(name, weights=None, **options)


def _dilation(model: str) -> dict[str, Any]:
    """torchvision's option for a last stage of stride 16."""
    if model.startswith(("resnet", "resnext", "wide_resnet")) and model not in ("resnet18", "resnet34"):
        return {"replace_stride_with_dilation": [False, False, True]}
    if model.startswith("mobilenet_v3"):
        return {"dilated": True}
    raise InputError(
        f"backbone.dilate_c5=true: torchvision's {model} has no dilated form; ResNets of bottlenecks "
        "(resnet50 and deeper, ResNeXt, Wide ResNet) and MobileNet V3 have."
    )


def _trunk(stock: nn.Module) -> list[tuple[str, int]]:
    """Name and stride of each part in the order of the pass: the children of a model up to its pooling or classifier.

    Ends early where a part gives no map.
    """
    stock.eval()
    x, found = torch.zeros(1, 3, TRUNK_PROBE, TRUNK_PROBE), []
    for name, part in stock.named_children():
        if name in ("avgpool", "classifier", "fc"):
            break
        try:
            with torch.no_grad():
                x, parts = _parts(name, part, x)
        except (RuntimeError, ValueError, AssertionError, TypeError):  # tokens, windows: no map goes through this
            break
        if x.dim() != 4 or x.shape[2] != x.shape[3]:  # channels at the end
            break
        found += parts
    stock.train()
    # The nearest power of two: borders that a stem eats make maps a little smaller.
    return [(name, 1 << (TRUNK_PROBE // side * 3 // 2).bit_length() - 1) for name, side in found]


def _parts(name: str, part: nn.Module, x: Tensor) -> tuple[Tensor, list[tuple[str, int]]]:
    """The output of a part, and its name with the side of the output.

    A Sequential that goes through more than one stride is the trunk itself: its own parts are named instead.
    """
    if type(part) is not nn.Sequential:
        y = part(x)
        return y, [(name, y.shape[-1])]
    y, inner = x, []
    for key, child in part.named_children():
        y, more = _parts(f"{name}.{key}", child, y)
        inner += more
    return y, inner if x.shape[-1] > 2.5 * y.shape[-1] else [(name, y.shape[-1])]


# timm


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise InputError(f"backbone timm: {error.name} is missing; pip install 'light-head-detector[timm]'.") from error
    return timm


def _timm_model(name: str, **options: Any) -> Any:
    timm = _timm()
    if not timm.is_model(name):
        raise InputError(f"backbone.model={name!r} is not in timm; {_closest(name, timm.list_models())}")
    try:
        body = timm.create_model(name, pretrained=False, features_only=True, **options)
    except Exception as error:  # whatever a model does not support, it raises as it likes
        asked = " with dilate_c5" if "output_stride" in options else ""
        raise InputError(f"backbone.model={name}: timm gives no maps of it{asked} ({error}).") from error
    layout = getattr(body, "output_fmt", "NCHW")
    if str(getattr(layout, "value", layout)) != "NCHW":
        raise InputError(f"backbone.model={name}: timm gives maps with channels at the end; {NEEDS}.")
    return body


def _closest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"it has {len(known)} others."


# Reading a network


def _kept(side: int, have: int, stride: int) -> slice:
    """The cells of an image's side in a map of the padded image: the middle of what there is, then from the left."""
    start = (have - -(-side // 32) * 32 // stride) // 2
    return slice(start, start - (-side // stride))


def _margin(network: External, strides: Sequence[int]) -> int | None:
    """The smallest margin with which every map is large enough; None where sizes are rounded up anyway."""

    def sizes(side: int) -> list[int]:
        try:
            return [x.shape[2] for x in network.maps(torch.zeros(1, 3, side, side))[1:]]
        except (RuntimeError, AssertionError):  # too small, or branches whose sizes differ by one (HRNet, DLA)
            return [0, 0, 0]

    def rounded_up(side: int) -> bool:
        return sizes(side) == [-(-side // stride) for stride in strides]

    def enough(margin: int, side: int = PROBE) -> bool:
        return all(have >= side // stride for have, stride in zip(sizes(side + margin), strides, strict=True))

    with torch.no_grad():
        if rounded_up(PROBE) and rounded_up(PROBE + 1):
            return None
        margin = 0 if enough(0) else bisect_left(MARGINS, True, key=enough)
        if not enough(margin, PROBE + 32):  # windows of attention: sizes are built in
            raise InputError(
                f"backbone.model: its maps at strides {', '.join(map(str, strides))} are too small, or it does not "
                "take images of every size."
            )
    return margin


def _pairs(network: External, images: Tensor) -> tuple[list[tuple[str, str]], Sequence[Tensor]]:
    """Names of convolution and normalisation where nothing else reads the convolution's output, and the maps.

    Followed in autograd's graph, which sees functions too, not only modules.
    """
    made: dict[Any, str] = {}  # the node that a convolution made -> its name
    read: dict[str, str] = {}  # convolution -> normalisation
    runs: Counter[str] = Counter()
    names = {module: name for name, module in network.named_modules()}

    def after(module: nn.Module, _: Any, output: Tensor) -> None:
        runs[names[module]] += 1
        if type(module) is nn.Conv2d:
            made[output.grad_fn] = names[module]

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].grad_fn in made:
            read[made[inputs[0].grad_fn]] = names[module]

    layers = [module for module in names if type(module) is nn.Conv2d or _foldable(module)]
    hooks = [layer.register_forward_hook(after) for layer in layers]
    hooks += [layer.register_forward_pre_hook(before) for layer in layers if _foldable(layer)]
    maps = network.maps(images)
    for hook in hooks:
        hook.remove()
    readers = Counter(x.grad_fn for x in maps)
    for node in _nodes(maps):
        readers.update(following for following, _ in node.next_functions)
    alone = {name for node, name in made.items() if readers[node] == 1 and runs[name] == 1}
    return [(conv, norm) for conv, norm in read.items() if conv in alone and runs[norm] == 1], maps


def _foldable(module: nn.Module) -> bool:
    """BatchNorm2d, also timm's with an activation inside."""
    return type(module) is nn.BatchNorm2d or type(module).__name__ == "BatchNormAct2d"


def _nodes(maps: Sequence[Tensor]) -> Iterator[Any]:
    """Every node of autograd's graph below these maps, once."""
    todo: list[Any] = [x.grad_fn for x in maps]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        fresh = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= fresh
        todo += fresh


def _owners(network: External, maps: Sequence[Tensor]) -> dict[str, int]:
    """Name of each parameter -> the first of the maps that depends on it."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    owners: dict[str, int] = {}
    for place, x in enumerate(maps):
        for node in _nodes([x]):
            if hasattr(node, "variable"):
                owners.setdefault(names[node.variable], place)
    unused = sorted(set(names.values()) - set(owners))
    if unused:
        raise InputError(f"backbone.model: no map depends on {unused[0]} ({len(unused)} such); choose another model.")
    return owners


def _stages(backbone: nn.Module, owners: dict[str, int]) -> tuple[tuple[str, ...], ...]:
    """The largest submodules whose parameters belong to one map alone, by map."""
    stages: list[list[str]] = [[] for _ in range(1 + len(FEATURES))]
    todo = list(backbone.named_children())
    while todo:
        name, part = todo.pop(0)
        found = {owners[f"{name}.{key}"] for key, _ in part.named_parameters()}
        if len(found) == 1:
            stages[found.pop()].append(name)
        elif found:
            todo = [(f"{name}.{key}", child) for key, child in part.named_children()] + todo
    return tuple(map(tuple, stages))
