"""Cost of a network in the papers' units: parameters, multiply-adds, memory access cost; and of each operation."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from detector.models.light_head_rcnn import LightHeadRCNN


def parameters(module: nn.Module) -> int:
    """Number of learned values; running statistics are not counted."""
    return sum(parameter.numel() for parameter in module.parameters())


def multiply_adds(module: nn.Module, *inputs: Any) -> int:
    """Multiply-adds of one forward pass in evaluation mode, what the papers call FLOPs.

    Convolutions and matrix products are counted; batch normalisation, activations and biases are not.

    Args:
        module: left as it is.
        inputs: what its forward takes.
    """
    module = copy.deepcopy(module).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() // 2


def detection_multiply_adds(network: LightHeadRCNN, height: int, width: int) -> int:
    """Multiply-adds of a whole detection, from an image on a canvas of this size to boxes."""

    class Detect(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: torch.Tensor, sizes: torch.Tensor) -> object:
            return self.network.detect(images, sizes)

    device = network.mean.device
    image = torch.zeros(1, 3, height, width, dtype=torch.uint8, device=device)
    return multiply_adds(Detect(), image, torch.tensor([[height, width]], device=device))


def memory_access(module: nn.Module, *inputs: Any) -> int:
    """Memory access cost of one forward pass in evaluation mode, in values (not bytes).

    What every convolution and fully connected layer reads and writes: its input, its output and its weights. Layers
    without weights are not counted (normalisation and activations are taken as fused into them).

    Source: Ma et al. 2018, section 2, G1: hw(c1 + c2) + c1 c2 for a 1x1 convolution.

    Args:
        module: left as it is.
        inputs: what its forward takes.
    """
    return sum(one.memory_access for one in operations(module, *inputs) if one.weights)


Kind: TypeAlias = Literal[
    "dense 1x1", "dense", "grouped", "depthwise", "matrix product", "element-wise", "copy", "pooling"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Parts of the names of torch's operators. What has weights is told apart by them; what is in none is element-wise.
_NAMES: dict[Kind, tuple[str, ...]] = {
    "copy": ("cat", "stack", "flatten", "reshape", "clone", "contiguous", "copy", "index", "pad", "upsample"),
    "pooling": ("pool", "mean"),
}


@dataclass(frozen=True)
class Operation:
    """What torch runs as one operation of a network, and what it costs.

    Attributes:
        name: torch's.
        kind: dense is every convolution of one group with a kernel larger than 1x1; depthwise has a group for each
            channel; what only moves values is a copy (shuffled channels, cat, padding); pooling includes averages.
        multiply_adds: of convolutions and matrix products.
        activations, weights: values that it reads and writes; biases are not counted.
    """

    name: str
    kind: Kind
    multiply_adds: int
    activations: int
    weights: int

    @property
    def memory_access(self) -> int:
        """Values read and written; of a convolution hw(c1 + c2) + c1 c2 / g, times k x k in the second part."""
        return self.activations + self.weights

    @property
    def intensity(self) -> float:
        """Multiply-adds for each byte of memory access, in float32."""
        return self.multiply_adds / (4 * self.memory_access)


def operations(module: nn.Module, *inputs: Any) -> list[Operation]:
    """The operations of one forward pass in evaluation mode, in their order, without views, which cost nothing.

    Nothing is computed: a copy without weights runs on the meta device, in 10 to 100 ms. What depends on values, the
    suppression of a detector for instance, cannot run there.

    Args:
        module: left as it is. `models.fuse.fuse` makes what runs for prediction.
        inputs: what its forward takes, on any device; the memory format decides what must be copied.
    """
    tensors = (*module.parameters(), *module.buffers())
    shadow = copy.deepcopy(module, {id(one): one.to("meta") for one in tensors}).eval()
    on_meta = [one.to("meta") for one in inputs]
    with torch.inference_mode(), _Recorder() as recorder:
        shadow(*on_meta)
    return recorder.found


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        read, written = _tensors((args, kwargs)), _tensors(output)
        places = {one.untyped_storage()._cdata for one in read}  # on the meta device no tensor has an address
        if func._schema.is_mutable or not any(one.untyped_storage()._cdata in places for one in written):
            self.found.append(_operation(func.overloadpacket.__name__, read, written))
        return output


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _operation(name: str, read: list[torch.Tensor], written: list[torch.Tensor]) -> Operation:
    activations = sum(one.numel() for one in written)
    if name not in ("conv2d", "linear"):
        kinds = (kind for kind, parts in _NAMES.items() if any(part in name for part in parts))
        values = activations + sum(one.numel() for one in read)
        return Operation(name, next(kinds, "element-wise"), 0, values, 0)
    image, weight = read[:2]
    multiply_adds = activations * weight[0].numel()
    kind: Kind
    if name == "linear":
        kind = "matrix product"
    elif image.shape[1] == weight.shape[1]:
        kind = "dense 1x1" if weight[0, 0].numel() == 1 else "dense"
    else:
        kind = "depthwise" if weight.shape[1] == 1 else "grouped"
    return Operation(name, kind, multiply_adds, activations + image.numel(), weight.numel())
