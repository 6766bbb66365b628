"""What a feature of a backbone sees: the theoretical receptive field, and the part of it that counts.

Ma et al. 2018 (ShuffleNet V2), section 4, explain the lead of Xception and V2* at detection by it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from detector.files import replacing
from detector.models.backbones.contract import Backbone

FEATURES = ("c3", "c4", "c5")
WIDTHS = (2048, 8192, 32768)  # of the image row that a theoretical field is looked for in
# Luo et al. 2016 (Understanding the effective receptive field), section 3.1: a pixel belongs to it if its gradient is
# above 1 - 95.45% of that at the centre.
SHARE = 1 - 0.9545
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.GELU)
NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
GATES = ("SqueezeExcitation", "SEModule", "SqueezeExcite", "SELayer")  # a global average sees everything


@dataclass(frozen=True)
class TheoreticalField:
    """Sides in pixels of the input image; the field is a square around the feature.

    Attributes:
        stages: of "c3", "c4", "c5".
        blocks: of the blocks of stride 1 of each stage, the largest, in cells of the stage's own map: 3 for a block
            with one 3x3 convolution. Without a stage that has none.
    """

    stages: dict[str, int]
    blocks: dict[str, int]


def theoretical_field(backbone: Backbone) -> TheoreticalField:
    """The pixels that can reach one feature, whatever the weights are.

    Measured on a copy in which nothing can hide a path: every weight positive, normalisation, activations and gates
    left out, averages for maxima. Then a pixel lies in the field if, and only if, its derivative is not zero. One row
    of an image is enough: kernels and strides are the same in both directions.

    Args:
        backbone: left as it is.

    Raises:
        ValueError: the field is wider than the widest of WIDTHS.
    """
    open_copy = _open(backbone)
    for width in WIDTHS:
        field = _field_within(open_copy, width)
        if field is not None:
            return field
    raise ValueError(f"The receptive field does not fit into {WIDTHS[-1]} pixels.")


def _field_within(open_copy: Backbone, width: int) -> TheoreticalField | None:
    """None where the field reaches an end of a row of `width` pixels."""
    image = torch.ones(1, 3, 1, width, dtype=torch.float64, requires_grad=True)
    blocks: dict[str, int] = {}
    with contextlib.ExitStack() as hooks:
        for key, stage in zip(FEATURES, open_copy.stages[1:], strict=True):

            def measure(_: nn.Module, inputs: tuple[Any, ...], output: Any, key: str = key) -> None:
                given, found = _tensors(inputs), _tensors(output)
                if found[0].shape[3] == given[0].shape[3] == -(-width // open_copy.strides[key]):
                    blocks[key] = max(blocks.get(key, 0), _side(found, given))

            for block in _blocks(open_copy, stage):
                hooks.enter_context(block.register_forward_hook(measure))
        features = open_copy(image)
    stages = {key: _side([features[key]], [image]) for key in FEATURES}
    return None if max(stages.values()) > width else TheoreticalField(stages, blocks)


def effective_field(
    backbone: Backbone,
    *,
    feature: str = "c5",
    size: int = 768,
    images: int = 6,
    random_weights: bool = True,
    seed: int = 0,
) -> np.ndarray:
    """How much each pixel moves the feature in the middle, Luo et al. 2016, section 3.1.

    Args:
        backbone: left as it is.
        feature: "c3", "c4" or "c5".
        size: side of the square images.
        images: noise images that the gradient is averaged over.
        random_weights: draw every convolution anew (He et al. 2015) with statistics to match; False: as it is.
            An untrained V2* starts as V2, so that only new or trained weights tell the two apart.
        seed: of weights and images.

    Returns:
        (size, size) float64, mean absolute gradient, the largest 1.
    """
    generator = torch.Generator().manual_seed(seed)
    network = copy.deepcopy(backbone).requires_grad_(False)
    if random_weights:
        _draw_weights(network, generator)
        _settle_statistics(network, torch.randn(4, 3, size // 2, size // 2, generator=generator))
    network.eval()
    total = torch.zeros(size, size, dtype=torch.float64)
    for _ in range(images):
        image = torch.randn(1, 3, size, size, generator=generator).requires_grad_()
        x = network(image)[feature]
        centre = x[0, :, x.shape[2] // 2, x.shape[3] // 2]
        signs = torch.randn(len(centre), generator=generator)
        (gradient,) = torch.autograd.grad((centre * signs).sum(), image)
        total += gradient[0].abs().sum(0).double()
    return (total / total.max()).numpy()


def effective_side(field: np.ndarray) -> float:
    """Side in pixels of a square as large as the area where an `effective_field` exceeds SHARE of its largest value."""
    return float(np.sqrt((field > SHARE * field.max()).sum()))


def plot_receptive_fields(fields: Mapping[str, tuple[np.ndarray, int, float]], path: str | Path) -> None:
    """A panel for each backbone: how much each pixel moves the feature in the middle, on a scale of decades.

    Args:
        fields: title -> (map (h, w) with 1 as its largest value, side of the theoretical field, of the effective one).
        path: of the PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = min(4, len(fields))
    rows = -(-len(fields) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, (field, theoretical, effective)) in zip(axes, fields.items(), strict=False):
        shown = axis.imshow(np.log10(np.maximum(field, 1e-4)), cmap="magma", vmin=-4, vmax=0)
        middle_y, middle_x = (side / 2 for side in field.shape)
        for side, colour in ((theoretical, "white"), (effective, "cyan")):
            corner = (middle_x - side / 2, middle_y - side / 2)
            axis.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=1.2))
        axis.set_title(f"{title}\ntheoretical {theoretical}, effective {effective:.0f} px", fontsize=9)
        axis.set(xlim=(0, field.shape[1]), ylim=(field.shape[0], 0))
    bar = figure.colorbar(shown, ax=axes.tolist(), shrink=0.6, ticks=[-4, -3, -2, -1, 0])
    bar.set_label("gradient, powers of ten of the largest", fontsize=8)
    figure.suptitle(
        "c5: what its middle feature sees. White: theoretical field (where it fits), cyan: effective.", fontsize=10
    )
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)


def _open(backbone: Backbone) -> Backbone:
    network = copy.deepcopy(backbone).double().eval().requires_grad_(False)
    for module in list(network.modules()):
        for name, child in module.named_children():
            replacement = _open_layer(child)
            if replacement is not child:
                setattr(module, name, replacement)
    for parameter in network.parameters():
        # A mean, so that values neither grow nor vanish on the way through a deep network.
        parameter.fill_(1 / max(1, parameter[0].numel()) if parameter.dim() > 1 else 1.0)
    return network


def _open_layer(layer: nn.Module) -> nn.Module:
    if isinstance(layer, (*ACTIVATIONS, *NORMS, SqueezeExcitation)) or type(layer).__name__ in GATES:
        return nn.Identity()
    if isinstance(layer, nn.MaxPool2d):
        return nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode)
    return layer


def _side(output: Sequence[Tensor], given: Sequence[Tensor]) -> int:
    """Side of the field of the feature in the middle of maps (1, C, 1, w), in cells of what was given, maps of one
    size; more than there are if it is cut."""
    middle = [x[0, :, 0, x.shape[3] // 2].sum() for x in output]
    gradients = torch.autograd.grad(torch.stack(middle).sum(), given, retain_graph=True)
    (seen,) = torch.cat(gradients, dim=1)[0].abs().sum(dim=(0, 1)).nonzero(as_tuple=True)
    first, last, width = int(seen[0]), int(seen[-1]), given[0].shape[3]
    return width + 1 if first == 0 or last == width - 1 else last - first + 1


def _tensors(values: Any) -> list[Tensor]:
    """Those that a block takes or gives, be it one or a tuple."""
    return [values] if isinstance(values, Tensor) else [x for value in values for x in _tensors(value)]


def _blocks(backbone: Backbone, stage: Sequence[str]) -> Iterator[nn.Module]:
    """The blocks of a stage, in order: the children of a Sequential of blocks, else the modules themselves."""
    for name in stage:
        module = backbone.get_submodule(name)
        children = list(module.children())
        if isinstance(module, nn.Sequential) and children and all(list(child.children()) for child in children):
            yield from children
        else:
            yield module


def _draw_weights(network: nn.Module, generator: torch.Generator) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)


def _settle_statistics(network: nn.Module, images: Tensor) -> None:
    """Running statistics that fit the weights, so that the signal keeps its size in evaluation mode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean of the pass below
    network.train()
    with torch.no_grad():
        network(images)
