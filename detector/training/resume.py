"""Going on with a run: from its last checkpoint, with the configuration that it was started with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from detector.errors import InputError
from detector.inference.detector import read_checkpoint
from detector.training.checks import check_values


def checked_config(
    config: Mapping[str, Any],
    *,
    read: Callable[[str], dict[str, Any]] = read_checkpoint,
    entry: str = "detector",
    group: str = "recipe",
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The configuration with its values checked, and the checkpoint of the run that goes on with it.

    Args:
        config: as the command line gives it; with `resume`, the run's own with today's changes is returned.
        read: reads a checkpoint.
        entry: of a checkpoint, under which it describes itself.
        group: of configuration files, whose choice a run keeps.

    Raises:
        InputError: a value is wrong, or the run cannot go on like this.
    """
    check_values(config)
    if not config["resume"]:
        return dict(config), None
    checkpoint = read_resumable(config["ckpt"], read=read, entry=entry)
    resumed = resumed_config(config, checkpoint, entry=entry, group=group)
    check_values(resumed)
    return resumed, checkpoint


def read_resumable(
    path: str | None, *, read: Callable[[str], dict[str, Any]] = read_checkpoint, entry: str = "detector"
) -> dict[str, Any]:
    """The checkpoint of a run that can go on.

    Raises:
        InputError: there is none, or it holds weights alone.
    """
    if not path:
        raise InputError("resume=true needs the checkpoint to go on from: ckpt=RUN_DIR/last.ckpt")
    checkpoint = read(path)
    if "optimizer_states" not in checkpoint or "config" not in checkpoint[entry]["provenance"]:
        raise InputError(f"'{path}' holds no optimiser state; resume from the last.ckpt of a run.")
    return checkpoint


def resumed_config(
    config: Mapping[str, Any], checkpoint: Mapping[str, Any], *, entry: str = "detector", group: str = "recipe"
) -> dict[str, Any]:
    """The configuration of the run in `checkpoint`, with what the command line of today (`overrides`) changes.

    Raises:
        InputError: an override chooses what cannot be changed half-way.
    """
    recorded = checkpoint[entry]["provenance"]["config"]
    # The folder of the checkpoint is where the run lies now; it may have been moved.
    merged = copy.deepcopy(recorded) | {key: config[key] for key in ("ckpt", "resume", "run_dir")}
    for override in config["overrides"]:
        key = override.lstrip("+~").partition("=")[0]
        if key == group and config["recipe_name"] == recorded["recipe_name"]:
            continue
        try:
            _copy_value(key.split("."), config, merged)
        except KeyError as error:
            if override not in recorded["overrides"]:
                raise InputError(
                    f"{override}: a resumed run keeps its {key} ({recorded['recipe_name']} with "
                    f"{recorded['backbone_name']}). Leave it out; or leave out resume=true, and a new run starts from "
                    "the weights of ckpt."
                ) from error
    return merged


def check_can_go_on(
    path: str, checkpoint: Mapping[str, Any], description: Mapping[str, Any], epochs: int, *, entry: str = "detector"
) -> None:
    """
    Args:
        path: of the checkpoint, for messages.
        checkpoint: what is resumed.
        description: of what was built now, as the checkpoint has it (`Detector.describe`).
        epochs: where the run is to end.
        entry: as for `checked_config`.

    Raises:
        InputError: nothing is left to do, or the network or the classes are not those of the checkpoint.
    """
    if checkpoint["epoch"] + 1 >= epochs:
        raise InputError(f"'{path}' has finished its {epochs} epochs; raise schedule.epochs to train longer.")
    about = checkpoint[entry]
    for part, ours in description["spec"].items():
        if ours != about["spec"].get(part):
            raise InputError(
                f"resume=true: {part} is {ours}, but the checkpoint was trained with {about['spec'].get(part)}. Leave "
                "the change out; or leave out resume=true, and a new run starts from the weights that fit."
            )
    if about["class_names"] != description["class_names"]:
        raise InputError(
            f"resume=true: the data set has the classes {description['class_names']}, but the checkpoint was trained "
            f"with {about['class_names']}. To fine-tune on other classes, leave out resume=true."
        )


def _copy_value(path: list[str], source: Mapping[str, Any], target: dict[str, Any]) -> None:
    for name in path[:-1]:
        source, target = source[name], target[name]
    target[path[-1]] = source[path[-1]]
