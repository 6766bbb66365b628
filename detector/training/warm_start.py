"""A detector as the start of another: its network wins, and its classes are matched with the data set's by name."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from detector.data.rules import show
from detector.errors import InputError
from detector.evaluation.tables import markdown_table
from detector.files import CONF
from detector.inference.detector import Detector
from detector.inference.shipped import names
from detector.models.build import NetworkOptions
from detector.models.weights import first_three, misfits
from detector.options import shown

if TYPE_CHECKING:
    from detector.training.run import TrainOptions

T = TypeVar("T", bound="TrainOptions")
log = logging.getLogger(__name__)

# ckpt=auto: the package's detector with this backbone, if there is one.
AUTO = "auto"
# Options that change no weight's shape or meaning: how a training goes, and which boxes survive. A run has its own.
FREE = {
    "rpn": {
        "foreground_iou", "background_iou", "inside_only", "sample_count", "foreground_share", "smooth_l1_beta",
        "nms_threshold", "train_limits", "test_limits",
    },
    "light_head": {
        "sampling", "sample_count", "foreground_share", "foreground_iou", "box_weight", "smooth_l1_beta",
        "score_threshold", "nms_threshold", "max_detections", "objectness",
    },
}  # fmt: skip
# V2 weights are a start for V2*, whose extra layers begin as the identity.
EXTRA = "backbone.extra_depthwise"
# Pascal VOC's names of classes that COCO's authors call otherwise.
SAME = {"aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch", "tvmonitor": "tv"}
# The layers that know classes.
BY_CLASS = ("head.class_logits.", "head.box_deltas.")


def find_start(options: T) -> tuple[T, Detector | None]:
    """The detector that a training starts from, and the options with its network; None: there is none.

    Raises:
        InputError: `ckpt` is no detector, or another network than its was asked for.
    """
    if options.resume or not options.ckpt:
        return options, None
    ckpt, why = (options.ckpt, "") if options.ckpt != AUTO else _of_this_package(options)
    if not why:
        start = Detector.load(ckpt, "cpu", fused=False)
        if not (why := _conflict(options, start)):
            return _with_network_of(start, options.model_copy(update={"ckpt": ckpt})), start
        if options.ckpt != AUTO:
            raise InputError(f"{why} of ckpt={ckpt}, whose network is kept. Leave one of the two out (ckpt=null).")
    weights = options.backbone.weights
    log.info("ckpt=auto: %s; from %s instead", why, f"backbone.weights={weights}" if weights else "random weights")
    return options.model_copy(update={"ckpt": None}), None


def _of_this_package(options: TrainOptions) -> tuple[str, str]:
    """The name of the package's detector with this backbone, and why there is none."""
    if asked := _asked_weights(options):
        return "", f"{asked[-1]} is given"
    known = [name for name in names() if name.startswith(f"{options.backbone_name}_")]
    return (known[0], "") if known else ("", f"this package has no detector with backbone={options.backbone_name}")


def _conflict(options: TrainOptions, start: Detector) -> str:
    """What was asked for and contradicts the network of a detector, as the beginning of a sentence."""
    differences = _differences(options, start.options)
    if _is_v2_for_v2_star(options, start.options):
        differences.pop(EXTRA)
    for word, keys in _asked(options.overrides):
        if word == f"backbone={_backbone_name(start)}":  # it was made from this file, with changes
            continue
        found = [name for name in differences if any(f"{name}.".startswith(f"{key}.") for key in keys)]
        if found:
            own, other = differences[found[0]]
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            return f"{word} asks for {found[0]}={shown(own)}{more}, but it is {shown(other)} in the detector"
    return ""


def _differences(options: NetworkOptions, theirs: NetworkOptions) -> dict[str, tuple[Any, Any]]:
    """What decides shape or meaning of a weight: dotted name -> here, there; None: there is no such option."""
    own, other = (
        {
            f"{part}.{name}": value
            for part, values in one.spec().items()
            for name, value in values.items()
            if name not in FREE.get(part, ())
        }
        for one in (options, theirs)
    )
    return {key: (own.get(key), other.get(key)) for key in own | other if own.get(key) != other.get(key)}


def _is_v2_for_v2_star(options: TrainOptions, theirs: NetworkOptions) -> bool:
    """Whether V2* was asked for, and the detector has the V2 of it."""
    changed = {key for key in _differences(options, theirs) if key.startswith("backbone.")}
    asked = any({"backbone", EXTRA} & set(keys) for _, keys in _asked(options.overrides))
    return asked and changed == {EXTRA} and not theirs.backbone.spec().get("extra_depthwise")


def _asked(words: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """Each word of a command line, and the dotted names of what it sets; a whole part by its name alone."""
    for word in words:
        key, _, text = word.lstrip("+~").partition("=")
        if key == "detector":  # a file of conf/ that changes several parts
            file = CONF / key / f"{text}.yaml"
            yield word, _names(yaml.safe_load(file.read_text()) if file.is_file() else {})
        elif text.startswith("{"):
            yield word, _names({key: yaml.safe_load(text.replace(":", ": "))})
        else:
            yield word, (key,)


def _asked_weights(options: TrainOptions) -> list[str]:
    """The words of a command line that set `backbone.weights`."""
    return [word for word, keys in _asked(options.overrides) if "backbone.weights" in keys]


def _names(tree: Any, prefix: str = "") -> list[str]:
    """The dotted names of the values in dicts of dicts."""
    if not isinstance(tree, Mapping):
        return [prefix.rstrip(".")] if prefix else []
    return [name for key, value in tree.items() for name in _names(value, f"{prefix}{key}.")]


def _backbone_name(start: Detector) -> str:
    """The file of conf/backbone/ that a detector was made from; the family where it does not say one."""
    recorded = start.provenance.get("config")
    name = recorded.get("backbone_name") if isinstance(recorded, dict) else None
    family: str = start.options.backbone.name
    return name if isinstance(name, str) and name in {path.stem for path in CONF.glob("backbone/*.yaml")} else family


def _with_network_of(start: Detector, options: T) -> T:
    """The options with the network of a detector, and with what is free as they have it."""
    theirs = start.options
    differences = _differences(options, theirs)
    parts: dict[str, Any] = {"backbone": theirs.backbone, "neck": theirs.neck}
    if _is_v2_for_v2_star(options, theirs) or not any(key.startswith("backbone.") for key in differences):
        parts["backbone"] = options.backbone.model_copy(update={"weights": None})
        differences.pop(EXTRA, None)
    else:
        parts["backbone_name"] = _backbone_name(start)
    for part, free in FREE.items():
        own = getattr(options, part)
        parts[part] = getattr(theirs, part).model_copy(update={name: getattr(own, name) for name in free})
    if differences:
        changed = [f"{key} {shown(other)} (not {shown(own)})" for key, (own, other) in differences.items()]
        log.info("the network is that of %s: %s", options.ckpt, first_three(changed))
    if _asked_weights(options):
        log.info("backbone.weights=%s is not read: %s has a backbone", options.backbone.weights, options.ckpt)
    return options.model_copy(update=parts)


def warm_start(detector: Detector, start: Detector) -> str:
    """Take over the weights of a detector with the same network (`find_start`), and the rows of the classes by name.

    Names are compared as `matched` says. New classes: see `LightHead.take_classes`.

    Returns:
        A table of what was kept, what is new, and which classes were left out.

    Raises:
        InputError: the weights are those of another network.
    """
    own, given = detector.network.state_dict(), start.network.state_dict()
    shared = {key: value for key, value in given.items() if not key.startswith(BY_CLASS)}
    needed = {key: value for key, value in own.items() if not key.startswith(BY_CLASS)}
    new = [key for key in needed if key not in shared and key.startswith("backbone.") and ".extra." in key]
    if faults := misfits({key: value for key, value in needed.items() if key not in new}, shared):
        raise InputError(f"The weights of the detector do not fit this network: {first_three(faults.values())}.")
    detector.network.load_state_dict(own | shared)
    labels = matched(detector.class_names, start.class_names)
    detector.network.head.take_classes(start.network.head, labels)
    rows: list[list[str | None]] = []
    for part, _ in detector.network.named_children():
        fresh = sum(key.startswith(f"{part}.") for key in new)
        kept = sum(key.startswith(f"{part}.") for key in shared)
        if kept:
            rows.append([part, f"{kept} tensors", f"{fresh} tensors, the identity" if fresh else None, None])
    kept_names = [name for name, label in zip(detector.class_names, labels, strict=True) if label is not None]
    new_names = [name for name, label in zip(detector.class_names, labels, strict=True) if label is None]
    left = [name for label, name in enumerate(start.class_names) if label not in labels]
    classes = [f"background, {show(kept_names)}" if kept_names else "background", show(new_names), show(left)]
    rows.append(["classes", *(text or None for text in classes)])
    return markdown_table(("part", "kept", "new", "left out"), rows, align="llll")


def matched(class_names: Sequence[str], theirs: Sequence[str]) -> list[int | None]:
    """For each class the label that its name has there; None: there is no such class.

    As it is written, else without regard to case, spaces, hyphens and underscores, with VOC's and COCO's names as one.
    """
    exact = {name: label for label, name in enumerate(theirs)}
    alike = {_plain(name): label for name, label in exact.items()}
    return [exact.get(name, alike.get(_plain(name))) for name in class_names]


def _plain(name: str) -> str:
    plain = re.sub(r"[\s_-]", "", name.casefold())
    return SAME.get(plain, plain)
