"""Going on with a run: from its last checkpoint, with the options that it was started with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from detector.errors import InputError
from detector.models.backbones import parse_backbone
from detector.models.backbones.contract import ClassifierOptions
from detector.models.build import NetworkOptions
from detector.models.weights import LARGEST, check_weights
from detector.options import shown
from detector.training.callbacks import EMA, History
from detector.training.checkpoints import KeptCheckpoint
from detector.training.schedule import build_optimizer

if TYPE_CHECKING:
    import lightning

    from detector.training.run_options import RunOptions
    from detector.training.task import Task

# What a run goes on from, and what it says of itself.
STATE = {"epoch": int, "global_step": int, "optimizer_states": list, "lr_schedulers": list, "loops": dict}
RUN = {"recipe_name": str, "backbone_name": str, "overrides": list}

T = TypeVar("T", bound="RunOptions")


def read_resumable(path: str | None, entry: str, read: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """The checkpoint of a run that can go on; the arguments are those of `trainer.begin`.

    Raises:
        InputError: there is none, or it holds weights alone.
    """
    if not path or path == "auto":  # what a recipe may say
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
    merged = copy.deepcopy(dict(recorded)) | {key: given[key] for key in ("ckpt", "resume", "run_dir", "overwrite")}
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


def classes_of_run(recorded: object, own: tuple[str, ...]) -> tuple[str, ...]:
    """The classes of a data set in the order in which a run counts them (`recorded`), where they are the same ones."""
    if isinstance(recorded, list) and len(recorded) == len(own) and all(name in recorded for name in own):
        return tuple(recorded)
    return own


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


def check_state(
    path: str, checkpoint: Mapping[str, Any], trainer: lightning.Trainer, task: Task, options: RunOptions
) -> None:
    """Try what Lightning will take up, before anything of the run is overwritten.

    Args:
        path: of the checkpoint, for messages.
        checkpoint: see STATE.
        trainer, task: of the run, as built now. Only its callbacks are changed: they take their states up twice.
        options: of the run, with what changes today.

    Raises:
        InputError: a part of it is not what this run writes.
    """
    attempts: dict[str, Callable[[], None]] = {
        "loops": lambda: _try_loops(checkpoint, trainer.fit_loop.state_dict(), path),
        "weights": lambda: _try_weights(checkpoint, task.state_dict()),
        "callbacks": lambda: _try_callbacks(checkpoint["callbacks"], trainer.callbacks),  # type: ignore[attr-defined]
        "optimiser": lambda: _try_optimiser(checkpoint, task),
    }
    for part, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:  # what odd values end in
            if part == "loops" and isinstance(error, InputError):
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            recorded = checkpoint[task.entry]["provenance"]["config"]
            if part == "optimiser" and (changed := _changed(options.to_dict(), recorded, ("optimizer", "freeze"))):
                raise InputError(
                    f"resume=true: {', '.join(changed)} does not go with the optimiser's state in '{path}' ({reason}). "
                    "Leave it out; or leave out resume=true, and a new run starts from the weights of ckpt."
                ) from error
            raise InputError(
                f"'{path}' is damaged: its {part} cannot be taken up ({reason}). Resume from another checkpoint."
            ) from error


def _changed(options: Mapping[str, Any], recorded: Mapping[str, Any], groups: Sequence[str]) -> list[str]:
    """Values of these groups that a run was not started with, as the command line writes them."""
    return [
        f"{group}.{key}={shown(value)}"
        for group in groups
        for key, value in options.get(group, {}).items()
        if key in recorded.get(group, {}) and recorded[group][key] != value
    ]


def _try_loops(checkpoint: Mapping[str, Any], own: Mapping[str, Any], path: str) -> None:
    _check_alike(own, loop := checkpoint["loops"]["fit_loop"])
    steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    at = loop["epoch_progress"]["current"]["processed"] - 1, steps
    # best.ckpt, where not each epoch is scored.
    if at == (checkpoint["epoch"] - 1, checkpoint["global_step"]) and Path(path).name != "last.ckpt":
        raise InputError(f"'{path}' was written before its epoch was over; resume from last.ckpt beside it.")
    if at != (checkpoint["epoch"], checkpoint["global_step"]):
        raise ValueError(f"epoch {at[0]} and step {at[1]}, not {checkpoint['epoch']} and {checkpoint['global_step']}")


def _try_weights(checkpoint: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    check_weights(own, checkpoint["state_dict"])
    if "current_model_state" in checkpoint or "averaging_state" in checkpoint:
        check_weights(own, checkpoint["current_model_state"])
        check_weights({"n_averaged": torch.tensor(0)}, checkpoint["averaging_state"])


def _try_callbacks(states: Mapping[str, Any], callbacks: Sequence[lightning.Callback]) -> None:
    for callback in callbacks:
        state = states.get(callback.state_key)
        if state is None and isinstance(callback, KeptCheckpoint | History):
            raise ValueError(f"there is none of {type(callback).__name__}")
        if isinstance(callback, EMA):
            _check_alike(callback.state_dict(), state or callback.state_dict())
        elif state is not None:
            callback.load_state_dict(copy.deepcopy(state))


def _try_optimiser(checkpoint: Mapping[str, Any], task: Task) -> None:
    """A step without gradients, of a copy."""
    options, schedule = task.optimizer_options, task.schedule
    assert options is not None
    assert schedule is not None
    network = copy.deepcopy(task.network)
    built = build_optimizer(network, options, 1)
    scheduler = LambdaLR(built, lambda step: schedule.factor(step, 1000))
    built.load_state_dict(copy.deepcopy(checkpoint["optimizer_states"][0]))
    scheduler.load_state_dict(copy.deepcopy(checkpoint["lr_schedulers"][0]))
    rates = [*scheduler.base_lrs, *scheduler.get_last_lr()]
    if len(rates) != 2 * len(built.param_groups) or not all(0 <= rate < LARGEST for rate in rates):
        raise ValueError(f"the learning rates are {rates}")
    if scheduler.last_epoch != checkpoint["global_step"]:
        raise ValueError(f"the schedule is at step {scheduler.last_epoch}, not {checkpoint['global_step']}")
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    built.step()
    scheduler.step()
    for name, parameter in network.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"after a step {name} is not finite")


def _check_alike(own: Mapping[str, Any], given: Mapping[str, Any], where: str = "") -> None:
    """Raises KeyError, TypeError or ValueError where `given` lacks what `own` has, or has it as another type."""
    for name, value in own.items():
        if isinstance(value, Mapping):
            _check_alike(value, given[name], f"{where}{name}.")
        elif type(given[name]) is not type(value) or given[name] < 0:
            raise ValueError(f"{where}{name} is {given[name]!r}")


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
