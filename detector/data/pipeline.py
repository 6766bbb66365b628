"""The user's own albumentations pipeline, from the YAML file that `albumentations.save` writes.

The file names transforms of albumentations, and nothing else: no code comes with it.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import yaml

from detector.errors import InputError

_FORM = "the form that albumentations.save(pipeline, FILE, data_format='yaml') writes"
_NAME = "__class_fullname__"


def load_pipeline(path: str) -> Any:
    """The steps of a pipeline, one after the other; its processing of boxes and its seed are left to the caller.

    Raises:
        InputError: the file cannot be read, or an entry is no transform of albumentations with its arguments.
    """
    import albumentations as A

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"augment.pipeline={path}: this file cannot be read ({why}); give {_FORM}.") from error
    if not isinstance(content, Mapping) or "transform" not in content:
        raise InputError(f"augment.pipeline={path}: no entry `transform`; give {_FORM}.")
    try:
        built = _build(content["transform"], f"augment.pipeline={path}: transform")
    except RecursionError:
        raise InputError(f"augment.pipeline={path}: an entry contains itself; give {_FORM}.") from None
    return A.Sequential(built.transforms, p=built.p) if isinstance(built, A.Compose) else built


def _build(entry: Any, where: str) -> Any:
    """The transform of an entry; those inside it are built first, so that the innermost wrong one is named."""
    import albumentations as A

    if not isinstance(entry, Mapping) or not isinstance(entry.get(_NAME), str):
        raise InputError(f"{where}: expected a transform, `{_NAME}: NAME` with its arguments; {_FORM}.")
    inner = entry.get("transforms", [])
    for number, part in enumerate(inner if isinstance(inner, list) else [inner]):
        _build(part, f"{where}.transforms[{number}]")
    name = entry[_NAME].rpartition(".")[2]
    kind = getattr(A, name, None)
    if name == "Lambda" or not (isinstance(kind, type) and issubclass(kind, A.BasicTransform | A.BaseCompose)):
        close = difflib.get_close_matches(name, dir(A), 1)
        remedy = f"did you mean {close[0]}?" if close and close[0] != name else "name one that holds no code."
        raise InputError(f"{where}, {name}: albumentations {A.__version__} has no such transform for files; {remedy}")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            built = A.from_dict({"transform": dict(entry)})
        unknown = [str(one.message) for one in said if "are not valid" in str(one.message)]
        # Some transforms write arguments into files that they do not take again.
        if unknown and not entry.keys() <= built.to_dict()["transform"].keys():
            raise ValueError(unknown[0])
        return built
    except Exception as error:  # whatever a transform raises for its arguments
        why = " ".join(str(error).split())
        raise InputError(f"{where}, {name}: {why}; correct its arguments.") from error


@contextmanager
def failures_named(path: str | None, shape: tuple[int, ...]) -> Iterator[None]:
    """
    Raises:
        InputError: the user's pipeline fails on an image of this shape (h, w, 3).
    """
    try:
        yield
    except Exception as error:
        if path is None:
            raise
        why = " ".join(str(error).split())
        what = f"on an image of {shape[1]} x {shape[0]} pixels: {why}"
        raise InputError(f"augment.pipeline={path}: it fails {what}; change the pipeline.") from error


def check_result(image: Any) -> None:
    """
    Raises:
        ValueError: it is no image uint8 RGB (h, w, 3).
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
        kind = f"{image.dtype} {tuple(image.shape)}" if hasattr(image, "dtype") else type(image).__name__
        raise ValueError(f"it makes {kind} of it, expected uint8 (h, w, 3), without Normalize or ToTensorV2")
