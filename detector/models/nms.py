"""Greedy suppression by torchvision's operator, without its package, whose import takes as long as torch's own."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """As torchvision.ops.nms: places of the boxes (D, 4) that survive, best first."""
    kept: Tensor = torch.ops.torchvision.nms(boxes, scores, iou_threshold)
    return kept


def _load_operator() -> None:
    """The library of operators alone, where there is one as the wheels for Linux and macOS have it; else all."""
    found = importlib.util.find_spec("torchvision")
    if "torchvision" not in sys.modules and found is not None:
        for folder in found.submodule_search_locations or ():
            for library in Path(folder).glob("_C*.so"):
                with suppress(OSError):  # of another build of torch, which the package says better
                    torch.ops.load_library(str(library))
    if not hasattr(torch.ops.torchvision, "nms"):
        importlib.import_module("torchvision")


_load_operator()
