"""Files of trained tensors: read without running code, and compared with the network that they are for."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detector.errors import InputError, require
from detector.files import check_sums

# The largest value of a weight: its square must be a number in float32.
LARGEST = 1e18


class DamagedFileError(Exception):
    """These bytes are no file of tensors; the message is the reason, in one line."""


def read_tensors(path: Path) -> Any:
    """What a file of torch.save or .safetensors holds, as data; no code is run.

    Raises:
        InputError: .safetensors, and that package is missing.
        DamagedFileError: truncated, of another program, or made to take more memory than it has bytes.
    """
    try:
        if path.suffix == ".safetensors":
            return require("safetensors.torch", package="safetensors", what=f"'{path}'").load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
                if unpacked > path.stat().st_size:  # torch.save does not compress
                    raise DamagedFileError(f"it unpacks to {unpacked} bytes, more than torch.save would have written")
                check_sums(archive)
        return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # on damaged bytes both raise anything: IndexError, KeyError, TypeError ...
        raise DamagedFileError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """One line. Not torch's advice to load what may be code, nor a byte of the file, which is all that some say."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds what is neither a tensor nor a plain value, may be code, and is not loaded"
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines and len(lines[0]) > 5 else type(error).__name__


def misfits(own: Mapping[str, Tensor], given: Mapping[str, Any], named: Callable[[str], str] = str) -> dict[str, str]:
    """Why tensors of a file cannot become those of a network: name -> one phrase, in the order of the network.

    Args:
        own: a network's state dict; of tensors on the meta device only what needs no memory is compared.
        given: what a file has for it.
        named: how a name is written.
    """
    faults = {}
    for name, tensor in own.items():
        if name not in given:
            faults[name] = f"{named(name)} is missing, expected {tuple(tensor.shape)}"
        elif fault := _misfit(tensor, given[name]):
            faults[name] = f"{named(name)} {fault}"
        elif name.endswith(".running_var") and not tensor.is_meta and (given[name] < 0).any():
            faults[name] = f"{named(name)} holds variances below 0"
    return faults | {name: f"{name} has no place here" for name in given if name not in own}


def check_weights(own: Mapping[str, Tensor], given: Mapping[str, Any]) -> None:
    """Refuse what cannot become this network.

    Raises:
        InputError: names the first three tensors that do not fit (`misfits`).
    """
    if faults := misfits(own, given):
        raise InputError(first_three(faults.values()))


def first_three(faults: Collection[str]) -> str:
    """The first phrases of `misfits`, and how many more there are."""
    return "; ".join(list(faults)[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")


def _misfit(own: Tensor, given: Any) -> str | None:
    """What keeps a tensor from taking the place of another, as the rest of a sentence."""
    if not isinstance(given, Tensor):
        return f"is a {type(given).__name__}, expected a tensor"
    if given.shape != own.shape:
        return f"is {tuple(given.shape)}, expected {tuple(own.shape)}"
    if odd := oddity(given):
        return odd
    kind, expected = (str(tensor.dtype).removeprefix("torch.") for tensor in (given, own))
    if given.dtype == torch.bool or given.is_complex() or given.is_floating_point() != own.is_floating_point():
        return f"is of {kind}, expected {expected}"
    if given.is_floating_point() and given.itemsize < 2:
        return f"is of {kind}, expected {expected}: bytes need scales, which no network here has"
    if own.is_meta:
        return None
    if own.is_floating_point() and not (given.to(own.dtype).abs() < LARGEST).all():
        return f"holds NaN, infinity or more than {LARGEST:g}: the training that wrote it had failed"
    return None


def oddity(tensor: Tensor) -> str | None:
    """What makes a tensor of a file none of trained values, as the rest of a sentence; None: nothing."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return "is sparse, quantized or without values, expected a plain tensor"
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        return f"is {tuple(tensor.shape)}, but has fewer numbers than that"
    return None
