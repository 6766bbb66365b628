"""Backbones of other libraries, torchvision and timm, brought to the contract.

The networks are the libraries' own: torchvision's `create_feature_extractor` and timm's `features_only` give maps. What
is added: which of them are c3, c4 and c5, sizes that are rounded up, and the stages that can be frozen.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from detector.errors import InputError, require
from detector.models.backbones.contract import FEATURES, Backbone, BackboneOptions

PROBE = 64  # side of the images that channels and stages are read from
TRUNK_PROBE = 256  # large enough to tell strides by
NEEDS = "a backbone needs maps (N, C, H, W) at strides 4, 8, 16 and 32"


class External(Backbone):
    """A network of another library.

    Images are padded with zeros (the mean colour) on the right and at the bottom to multiples of 32, and the maps
    cropped, so that sizes are rounded up whatever the network does with odd ones.

    Attributes:
        body: the library's network; gives its maps at stride 4, 8, 16 and 32.
    """

    def __init__(self, body: nn.Module, *, dilate_c5: bool) -> None:
        super().__init__(dilate_c5=dilate_c5)
        self.body = body
        maps = self._probe()
        self.channels = {key: x.shape[1] for key, x in zip(FEATURES, maps[1:], strict=True)}
        self.stages = _stages(self, maps)

    def maps(self, images: Tensor) -> list[Tensor]:
        """What the network has at stride 4, 8, 16 and 32."""
        found = self.body(images)
        return list(found.values() if isinstance(found, dict) else found)

    def whole(self) -> nn.Module:
        """The library's whole model, with random weights."""
        raise NotImplementedError

    def names_of_whole(self) -> frozenset[str]:
        """Names of the whole model's tensors, of which the backbone has a part.

        So that what lies above c5 can be told from what belongs to another model, ResNet-101's third stage to
        ResNet-50's.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's Inception announces how it will start; these weights go
            try:
                with torch.device("meta"):
                    return frozenset(self.whole().state_dict())
            except NotImplementedError:  # torchvision's RegNet computes its widths with tensors
                return frozenset(self.whole().state_dict())

    def names_in_library(self) -> dict[str, str]:
        """Every name of `state_dict` -> its name in a weight file of the library's whole model."""
        return {name: name.removeprefix("body.") for name in self.state_dict()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See `Backbone.forward`."""
        height, width = images.shape[-2:]
        below, right = -height % 32, -width % 32
        if below or right:
            images = F.pad(images, (0, right, 0, below))
        maps = self.maps(images.contiguous(memory_format=torch.channels_last))
        return {
            key: x[:, :, : -(-height // stride), : -(-width // stride)].contiguous(memory_format=torch.channels_last)
            for (key, stride), x in zip(self.strides.items(), maps[1:], strict=True)
        }

    def _probe(self) -> list[Tensor]:
        """The maps of a small image, in autograd's graph."""
        sides = [PROBE // stride for stride in (4, *self.strides.values())]
        self.eval()
        try:
            with torch.enable_grad():
                maps = self.maps(torch.zeros(1, 3, PROBE, PROBE))
            fits = [x.shape[2] for x in maps] == sides
        except (RuntimeError, AssertionError):  # windows of attention: sizes are built in
            fits = False
        self.train()
        if not fits:
            raise InputError(
                f"backbone.model: its maps at strides {', '.join(map(str, self.strides.values()))} are of other sizes, "
                "or it does not take images of every size."
            )
        return maps


def _stages(backbone: Backbone, maps: Sequence[Tensor]) -> list[list[str]]:
    """The modules with parameters of their own, by the first of the maps that depends on them."""
    parameters = dict(backbone.named_parameters())
    owner: dict[int, int] = {}
    for place, x in enumerate(maps):
        gradients = torch.autograd.grad(x.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            if gradient is not None:
                owner.setdefault(id(parameter), place)
    unused = [name for name, parameter in parameters.items() if id(parameter) not in owner]
    if unused:
        raise InputError(f"backbone.model: no map depends on {unused[0]} ({len(unused)} such); choose another model.")
    stages: list[list[str]] = [[] for _ in maps]
    for name, module in backbone.named_modules():
        own = next(module.parameters(recurse=False), None)
        if own is not None:
            stages[owner[id(own)]].append(name)
    return stages


class TorchvisionOptions(BackboneOptions):
    """A classification model of torchvision."""

    name: Literal["torchvision"] = "torchvision"
    model: str
    """A name of torchvision.models: resnet50, densenet121, mobilenet_v3_large ..."""


class TorchvisionBackbone(External):
    """The trunk of a torchvision classification model, under the names of its weight files.

    c3, c4 and c5 are the trunk's last outputs at each stride, so that c5 is what the model's own classifier averages:
    MobileNet and ShuffleNet V2 end in a 1x1 convolution that widens.

    dilate_c5: ResNets of bottlenecks and MobileNet V3.

    Raises:
        InputError: there is no such model, it has no maps at these strides, or its last stage cannot be dilated.
    """

    def __init__(self, options: TorchvisionOptions) -> None:
        from torchvision.models.feature_extraction import create_feature_extractor

        model, dilate_c5 = options.model, options.dilate_c5
        stock = _torchvision_model(model)
        # Found without dilation, where strides tell the stages apart.
        taps = _taps(_trunk(stock), f"torchvision's {model}")
        if model.startswith("densenet"):
            taps[-1] = "relu"  # called as a function, after the trunk
        if dilate_c5:
            stock = _torchvision_model(model, **_dilation(model))
        extractor = create_feature_extractor(stock, dict(zip(taps, ("c2", *FEATURES), strict=True)))
        super().__init__(extractor, dilate_c5=dilate_c5)
        self.model = model
        # In checkpoints the parts have the names of the library's weight files.
        self._register_state_dict_hook(_without_body)
        self._register_load_state_dict_pre_hook(_with_body)

    def whole(self) -> nn.Module:
        """See `External.whole`."""
        from torchvision import models

        return models.get_model(self.model, weights=None)

    def to_inference(self) -> None:
        """Fold each normalisation into the convolution before it, where nothing else reads the convolution."""
        graph: Any = self.body
        modules = dict(graph.named_modules())
        runs = Counter(node.target for node in graph.graph.nodes)
        for node in graph.graph.nodes:
            before = node.args[0] if node.args else None
            if not isinstance(before, fx.Node) or len(before.users) > 1 or runs[node.target] > 1:
                continue
            norm, convolution = modules.get(str(node.target)), modules.get(str(before.target))
            if type(norm) is nn.BatchNorm2d and type(convolution) is nn.Conv2d and runs[before.target] == 1:
                graph.set_submodule(before.target, fuse_conv_bn_eval(convolution, norm))
                graph.set_submodule(node.target, nn.Identity())


def _without_body(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}body.")]:
        state[prefix + name.removeprefix(f"{prefix}body.")] = state.pop(name)


def _with_body(state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}body.{name.removeprefix(prefix)}"] = state.pop(name)


class TimmOptions(BackboneOptions):
    """A model of timm."""

    name: Literal["timm"] = "timm"
    model: str
    """A name of timm.list_models(), with or without the tag of its weights: seresnet50, resnet50.a1_in1k ..."""


class TimmBackbone(External):
    """The maps of a timm model, as its `features_only` gives them. Its normalisation is not folded for inference.

    dilate_c5: models of timm that take `output_stride`.

    Raises:
        InputError: timm is not installed, does not know the model or gives no such maps of it.
    """

    def __init__(self, options: TimmOptions) -> None:
        model, dilate_c5 = options.model, options.dilate_c5
        reductions = _timm_model(model).feature_info.reduction()
        taps = _taps(list(enumerate(reductions)), f"timm's {model}")
        body = _timm_model(model, out_indices=tuple(taps), **({"output_stride": 16} if dilate_c5 else {}))
        super().__init__(body, dilate_c5=dilate_c5)
        self.model = model

    def whole(self) -> nn.Module:
        """See `External.whole`."""
        import timm

        model: nn.Module = timm.create_model(self.model, pretrained=False)
        return model

    def names_in_library(self) -> dict[str, str]:
        """See `External.names_in_library`. timm wraps some networks in a module more, and joins a Sequential's name
        with those of its parts: "body.features_conv0.weight" is "features.conv0.weight"."""
        whole = self.names_of_whole()
        joined = {name.replace(".", "_", 1): name for name in whole}
        found = {}
        for own in self.state_dict():
            name = own.removeprefix("body.")
            name = name if name in whole or name in joined else name.partition(".")[2]
            found[own] = name if name in whole else joined[name]
        return found


def _taps(parts: Sequence[tuple[Any, int]], name: str) -> list[Any]:
    """The last parts at stride 4, 8 and 16, and the last of all at 32, from (part, stride) in the order of the pass."""
    end = max((place for place, (_, stride) in enumerate(parts) if stride == 32), default=0)
    before = {stride: part for part, stride in parts[:end]}
    if not end or not {4, 8, 16} <= set(before):
        given = ", ".join(map(str, dict.fromkeys(stride for _, stride in parts))) or "no maps"
        raise InputError(f"backbone.model: {name} gives {'strides ' * bool(parts)}{given}; {NEEDS}.")
    return [before[4], before[8], before[16], parts[end][0]]


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
    if re.match("resnet|resnext|wide_resnet", model) and model not in ("resnet18", "resnet34"):
        return {"replace_stride_with_dilation": [False, False, True]}
    if model.startswith("mobilenet_v3"):
        return {"dilated": True}
    raise InputError(
        f"backbone.dilate_c5=true: torchvision's {model} has no dilated form; ResNets of bottlenecks "
        "(resnet50 and deeper, ResNeXt, Wide ResNet) and MobileNet V3 have."
    )


def _trunk(model: nn.Module) -> list[tuple[str, int]]:
    """Name and stride of each part of a model that gives a map, in the order of the pass."""
    sides: dict[str, tuple[int, int]] = {}  # of what goes in and of what comes out

    def record(name: str, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [x for x in (inputs[0], output) if isinstance(x, Tensor) and x.dim() == 4]
        if len(tensors) == 2 and all(x.shape[2] == x.shape[3] for x in tensors):
            sides[name] = tensors[0].shape[2], tensors[1].shape[2]

    hooks = [part.register_forward_hook(partial(record, name)) for name, part in model.named_modules() if name]
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, TRUNK_PROBE, TRUNK_PROBE))
    except (RuntimeError, ValueError, AssertionError):  # takes images of one size only
        sides.clear()
    model.train()
    for hook in hooks:
        hook.remove()

    def parts(part: nn.Module, path: str) -> Iterator[tuple[str, int]]:
        for name, child in part.named_children():
            name = f"{path}{name}"
            if name not in sides:
                continue
            before, after = sides[name]
            # A Sequential that goes through more than one stride is the trunk itself.
            if type(child) is nn.Sequential and before > 2.5 * after:
                yield from parts(child, f"{name}.")
            else:
                yield name, TRUNK_PROBE // after

    return list(parts(model, ""))


def _timm_model(name: str, **options: Any) -> Any:
    timm = require("timm", package="[timm]", what="backbone=timm")
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
