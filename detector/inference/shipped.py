"""The trained detectors that come with the package: weights/NAME.ckpt, found by name. Loads no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detector.errors import InputError

FOLDER = Path(__file__).parents[1] / "weights"
# What is used where no checkpoint is given.
DEFAULT = "v2_1x_voc"
# Where the files of a run lay, on which machine; and metrics, which mean nothing without the images.
_LEFT_OUT = ("data", "run_dir", "ckpt", "overrides", "metrics")


def names() -> list[str]:
    """The detectors of the package, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.ckpt"))


def find(path_or_name: str | Path) -> Path:
    """The file of a detector: an existing one is itself, a name is that of a detector of the package.

    Raises:
        InputError: it is neither; the message lists the names that there are.
    """
    path = Path(path_or_name)
    if os.path.isfile(path):  # unlike pathlib's, no error for a name that no file can have
        return path
    known = names()
    if str(path_or_name) in known:
        return FOLDER / f"{path_or_name}.ckpt"
    if known:
        others = f"or the name of a detector of this package: {', '.join(known)}"
    else:
        others = "ckpt=PATH; this package holds no trained detector to take instead"
    raise InputError(
        f"No checkpoint at '{path_or_name}'. Give the path of a best.ckpt or last.ckpt that training wrote, {others}."
    )


def folder_for(path_or_name: str | Path) -> Path:
    """Where what is made of a checkpoint goes: beside it; of a detector of the package, runs/NAME."""
    path = find(path_or_name)
    return Path("runs", path.stem) if path.parent == FOLDER else path.parent


def published(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What the file of a shipped detector says of its origin: everything but places and metrics of one machine."""
    kept = {key: value for key, value in provenance.items() if key not in _LEFT_OUT}
    return {
        key: published(value) if isinstance(value, Mapping) else value
        for key, value in kept.items()
        if not (isinstance(value, str) and any(mark in value for mark in "/\\"))
    }
