"""Going on with a run: from its last checkpoint, with the options that it was started with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from detector.errors import InputError
from detector.models.backbones import parse_backbone
from detector.models.backbones.contract import ClassifierOptions
from detector.models.build import NetworkOptions

if TYPE_CHECKING:
    from detector.training.trainer import RunOptions

# What a run goes on from, and what it says of itself.
STATE = {"epoch": int, "global_step": int, "optimizer_states": list, "lr_schedulers": list, "loops": dict}
RUN = {"recipe_name": str, "backbone_name": str, "overrides": list}

T = TypeVar("T", bound="RunOptions")


def read_resumable(path: str | None, entry: str, read: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """The checkpoint of a run that can go on; the arguments are those of `trainer.begin`.

    Raises:
        InputError: there is none, or it holds weights alone.
    """
    if not path:
        raise InputError("resume=true needs the checkpoint to go on from: ckpt=RUN_DIR/last.ckpt")
    checkpoint = read(path)
    about = checkpoint[entry].get("provenance")
    if "optimizer_states" not in checkpoint or not isinstance(about, dict) or "config" not in about:
        raise InputError(f"'{path}' holds no optimiser state; resume from the last.ckpt of a run.")
    recorded = about["config"] if isinstance(about["config"], dict) else {}
    for held, kinds in ((checkpoint, STATE), (recorded, RUN)):
        for key, kind in kinds.items():
            if type(held.get(key)) is not kind:
                raise InputError(
                    f"'{path}' is damaged: its {key} is a {type(held.get(key)).__name__}, expected a {kind.__name__}. "
                    "Resume from another checkpoint."
                )
    return checkpoint


def resumed_options(options: T, recorded: Mapping[str, Any], group: str) -> T:
    """The options of a run (`recorded`), with what the command line of today (`overrides`) changes.

    Raises:
        InputError: an override chooses what cannot be changed half-way.
    """
    given = options.to_dict()
    # The folder of the checkpoint is where the run lies now; it may have been moved.
    merged = copy.deepcopy(dict(recorded)) | {key: given[key] for key in ("ckpt", "resume", "run_dir")}
    for override in options.overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key == group and options.recipe_name == recorded["recipe_name"]:
            continue
        try:
            _copy_value(key.split("."), given, merged)
        except KeyError as error:
            if override not in recorded["overrides"]:
                raise InputError(
                    f"{override}: a resumed run keeps its {key} ({recorded['recipe_name']} with "
                    f"{recorded['backbone_name']}). Leave it out; or leave out resume=true, and a new run starts from "
                    "the weights of ckpt."
                ) from error
    return type(options).parse_recorded(merged)


def check_can_go_on(
    path: str, about: Mapping[str, Any], epoch: int, description: Mapping[str, Any], epochs: int
) -> None:
    """
    Args:
        path: of the checkpoint, for messages.
        about: how the checkpoint describes itself.
        epoch: the last one that it has seen.
        description: of what was built now, as the checkpoint has it (`Task.describe`).
        epochs: where the run is to end.

    Raises:
        InputError: nothing is left to do, or the network or the classes are not those of the checkpoint.
    """
    if epoch + 1 >= epochs:
        raise InputError(f"'{path}' has finished its {epochs} epochs; raise schedule.epochs to train longer.")
    recorded = _complete(about["spec"])
    for part, built in description["spec"].items():
        if built != recorded.get(part):
            raise InputError(
                f"resume=true: {part} is {built}, but the checkpoint was trained with {recorded.get(part)}. Leave "
                "the change out; or leave out resume=true, and a new run starts from the weights that fit."
            )
    if about["class_names"] != description["class_names"]:
        raise InputError(
            f"resume=true: the data set has the classes {description['class_names']}, but the checkpoint was trained "
            f"with {about['class_names']}. To fine-tune on other classes, leave out resume=true."
        )


def _complete(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's description with the options that are younger than it."""
    if "rpn" in spec:
        return NetworkOptions.parse(spec).spec()
    classifier = ClassifierOptions.parse(spec["classifier"] or {})
    return {"backbone": parse_backbone(spec["backbone"]).spec(), "classifier": classifier.to_dict()}


def _copy_value(path: list[str], source: Mapping[str, Any], target: dict[str, Any]) -> None:
    for name in path[:-1]:
        source, target = source[name], target[name]
    target[path[-1]] = source[path[-1]]
