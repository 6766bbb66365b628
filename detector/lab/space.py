"""The detectors that `search` chooses from: ShuffleNet V2 of other widths, depths and units, inputs and heads.

A point is a dict, the name of a choice -> its value; the values published for ShuffleNet V2 are among the choices.

The guidelines of Ma et al. 2018 (section 2) are the prior. By the unit itself: convolutions of equal width on both
sides (G1), none in groups but depthwise ones (G2), one branch that computes (G3), no sum (G4). By the choices: widths
whose halves are multiples of 8 or 16 (or V2 1x's), and few units, each of which costs calls whatever it computes (G3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detector.data.preprocess import STRIDE, Preprocessing
from detector.models.build import NetworkOptions

Point = dict[str, Any]
STAGES = ("c3", "c4", "c5")
# Chosen by this project: about half to twice of what ShuffleNet V2 1x has, in steps of a tenth to a quarter.
BACKBONE: dict[str, tuple[Any, ...]] = {
    "stem": (8, 16, 24, 32),
    "c3": (48, 64, 80, 96, 112, 116, 128, 144, 160, 176),
    "c4": (96, 128, 160, 192, 224, 232, 256, 288, 320, 352),
    "c5": (192, 256, 320, 384, 448, 464, 512, 576, 640, 704),
    "units_c3": (1, 2, 3, 4, 5),
    "units_c4": (1, 2, 3, 4, 5, 6, 7, 8, 9),
    "units_c5": (1, 2, 3, 4, 5),
    # Share of the units of a stage that are V2*, from its last on. Which of them they are changes neither cost, but for
    # the first, nor what a stage sees: so a number for each stage, and no choice for each unit.
    "star_c3": (0.0, 0.5, 1.0),
    "star_c4": (0.0, 0.5, 1.0),
    "star_c5": (0.0, 0.5, 1.0),
}
INPUT = {"input": (0.75, 0.875, 1.0, 1.125, 1.25)}  # times the sides of the hand-made detector's input
HEADS = {  # part of the options, option, values
    "neck": ("neck", "width", (64, 96, 128, 160, 192)),
    "rpn": ("rpn", "channels", (64, 128, 192, 256)),
    "mid": ("light_head", "mid_channels", (64, 96, 128, 192)),
    "thin": ("light_head", "thin_channels", (3, 5, 7, 10)),
    "hidden": ("light_head", "hidden_channels", (256, 384, 512, 768, 1024)),
}


class DetectorOptions(NetworkOptions):
    """A network and the size of its input."""

    input: Preprocessing = Preprocessing()
    """How an image becomes network input."""


def choices(base: DetectorOptions, *, everything: bool) -> dict[str, tuple[Any, ...]]:
    """What may be chosen, by name.

    Args:
        base: the hand-made detector; its heads are among the choices.
        everything: also the heads and the size of the input; else they stay as they are.
    """
    found = BACKBONE | (INPUT if everything else {"input": (1.0,)})
    if everything:
        own = {name: _head_of(base, name) for name in HEADS}
        found |= {name: tuple(sorted({*HEADS[name][2], one})) for name, one in own.items() if one is not None}
    return found


def _head_of(options: DetectorOptions, name: str) -> int | None:
    part, key, _ = HEADS[name]
    if name == "mid" and options.light_head.kernel_size == 1:
        return None  # folded into one convolution: it would cost nothing
    return getattr(getattr(options, part), key, None)  # neck=none has no width


def point_of(options: DetectorOptions, names: Mapping[str, Any]) -> Point:
    """The point at which a detector with a ShuffleNet V2 of three stages lies, input times 1.

    Args:
        options: of the detector.
        names: of the choices.
    """
    backbone: Any = options.backbone
    point: Point = {"stem": backbone.stem_channels, "input": 1.0}
    for at, stage in enumerate(STAGES):
        units, extra = backbone.repeats[at], backbone.extra_depthwise
        stars = units * extra if isinstance(extra, bool) else extra[at]
        point |= {stage: backbone.channels[at], f"units_{stage}": units, f"star_{stage}": stars / units}
    return {name: point[name] if name in point else _head_of(options, name) for name in names}


def changes(point: Point, base: DetectorOptions) -> dict[str, dict[str, Any]]:
    """What a point changes in the hand-made detector: part -> option -> value.

    Anchors are resized with the input: they stay as large on the original image.
    """
    stars = [round(point[f"star_{stage}"] * point[f"units_{stage}"]) for stage in STAGES]
    found: dict[str, dict[str, Any]] = {
        "backbone": {
            "name": "shufflenet_v2",
            "stem_channels": point["stem"],
            "channels": [point[stage] for stage in STAGES],
            "repeats": [point[f"units_{stage}"] for stage in STAGES],
            "extra_depthwise": stars,
        }
    }
    for name, (part, key, _) in HEADS.items():
        if name in point:
            found.setdefault(part, {})[key] = point[name]
    sides = {name: STRIDE * round(side * point["input"] / STRIDE) for name, side in base.input.to_dict().items()}
    if point["input"] == 1:
        sides = base.input.to_dict()
    scale = sides["short_side"] / base.input.short_side
    found["input"] = sides
    found.setdefault("rpn", {})["scales"] = [round(scale * one, 2) for one in base.rpn.scales]
    return found


def detector_options(point: Point, base: DetectorOptions) -> DetectorOptions:
    """The detector at a point."""
    values = {name: getattr(base, name).to_dict() for name in DetectorOptions.model_fields}
    changed = changes(point, base)
    values |= {part: keys if part == "backbone" else values[part] | keys for part, keys in changed.items()}
    return DetectorOptions.parse(values)
