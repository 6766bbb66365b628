"""What an exported file says about itself, as text under a few keys: ONNX, OpenVINO and torch.export all carry that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from detector.data.preprocess import PADDING, STRIDE, Preprocessing, Side
from detector.errors import InputError
from detector.inference.operating_point import OperatingPoint
from detector.options import Count, Options

FORMAT = "light-head-detector-export"
VERSION = 2  # 1 took images as (N, 3, H, W)
# The folder of these keys in OpenVINO's rt_info, and the file of them inside a .pt2.
SECTION = "light_head_detector"
# Beside `format`; each holds JSON.
KEYS = ("version", "class_names", "preprocessing", "input", "precision", "spec", "provenance", "thresholds")


class _Input(Options):
    """The size of a graph's input; null: any."""

    batch: Count | None
    height: Side | None
    width: Side | None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise ValueError(f"input.height={self.height}, input.width={self.width}: both, or neither")
        return self


@dataclass(frozen=True)
class ExportInfo:
    """Everything but the graph.

    Attributes:
        class_names: label -> name.
        preprocessing: how an image becomes network input.
        batch: images that go through at once; None: any number.
        canvas: height and width of the input; None: any multiples of STRIDE.
        precision: "float32" or "int8".
        spec: what `NetworkOptions.parse` reads, for the record.
        provenance: of the checkpoint, and how the file was made.
        thresholds: of each class, see OperatingPoint.
    """

    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    batch: int | None = None
    canvas: tuple[int, int] | None = None
    precision: str = "float32"
    spec: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    thresholds: tuple[float, ...] | None = None

    def to_properties(self) -> dict[str, str]:
        """Text under each key; all but `format` are JSON."""
        height, width = self.canvas or (None, None)
        values = {
            "version": VERSION,
            "class_names": self.class_names,
            "preprocessing": {
                **self.preprocessing.to_dict(),
                # For readers without this package: what its code does.
                "colour_order": "RGB",
                "layout": "NHWC",
                "value_range": [0, 255],
                "stride": STRIDE,
                "padding": PADDING,
                "padding_place": "right and bottom",
            },
            "input": {"batch": self.batch, "height": height, "width": width},
            "precision": self.precision,
            "spec": self.spec,
            "provenance": self.provenance,
            "thresholds": self.thresholds,
        }
        return {"format": FORMAT} | {key: json.dumps(value) for key, value in values.items()}

    @classmethod
    def from_properties(cls, properties: Mapping[str, str], path: str | Path) -> ExportInfo:
        """Read what `to_properties` wrote.

        Raises:
            InputError: not an export of this project, or of another version, or damaged; the message names the file.
        """
        if properties.get("format") != FORMAT:
            raise InputError(
                f"'{path}' is no export of this project: its metadata has no format={FORMAT}. "
                "Make one with tools/export.py."
            )
        try:
            version = int(json.loads(properties["version"]))
            if version == VERSION:
                # Other tools add keys of their own.
                earlier = {"thresholds": "null"}  # not in files from before there were any
                values = {key: json.loads((earlier | dict(properties))[key]) for key in KEYS}
                given = _Input.parse({key: values["input"][key] for key in _Input.model_fields}, "input")
                sides = {key: values["preprocessing"][key] for key in Preprocessing.model_fields}
                point = OperatingPoint.parse({"thresholds": values["thresholds"]}).check(len(values["class_names"]))
                return cls(
                    tuple(map(str, values["class_names"])),
                    Preprocessing.parse(sides),
                    given.batch,
                    None if given.height is None or given.width is None else (given.height, given.width),
                    thresholds=point.thresholds,
                    **{key: values[key] for key in ("precision", "spec", "provenance")},
                )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"'{path}' is damaged: its metadata cannot be read ({error}). Export it again.") from error
        remedy = "update it" if version > VERSION else "export the checkpoint again"
        raise InputError(f"'{path}' has export version {version}; this package reads {VERSION}: {remedy}.")
