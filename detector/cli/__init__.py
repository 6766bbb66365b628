"""The command line, and the only place that knows Hydra: `light-head COMMAND`, tools/*.py, and `detector.train`.

main("train")        # what tools/train.py does: sys.argv -> compose -> TrainOptions.parse -> train(options)
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detector.cli.composition import COMMANDS, compose, groups_of
from detector.cli.failures import USAGE_ERROR, explain, interrupted, report
from detector.cli.help import docstring, help_text
from detector.cli.words import did_you_mean, nearest, refuse_unknown_flags
from detector.errors import InputError


def main(command: str) -> None:
    """Run a command on the configuration that sys.argv asks for.

    Exit codes: 0, or what the command exits with; 1 and a traceback for an error of this package; 2 and one line for
    an error of the user (InputError, an unknown option or key, a missing value, no permission, a full disk); 130 after
    Ctrl-C.
    """
    rank, parent = int(os.environ.get("LOCAL_RANK", "0")), os.getppid()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    try:
        flags = [word for word in sys.argv[1:] if word.startswith("-")]
        refuse_unknown_flags(flags)
        composed = compose(command, [word for word in sys.argv[1:] if not word.startswith("-")])
        if flags:
            print(help_text(command, composed))
            return
        options = composed.options()
    except InputError as error:
        # Every rank has the same command line: rank 0 speaks for all.
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)

    try:
        composed.run(options)
    except KeyboardInterrupt:
        interrupted(rank)
    except SystemExit as stop:
        # Lightning catches Ctrl-C, saves what it can, and exits.
        if isinstance(stop.__context__, KeyboardInterrupt):
            interrupted(rank)
        raise
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        report(message, rank, parent)
        sys.exit(USAGE_ERROR)


def light_head() -> None:
    """The console script: `light-head COMMAND ...`."""
    command, *rest = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        sys.argv = [f"light-head {command}", *rest]
        return main(command)
    if command in ("-h", "--help"):
        print("Usage: light-head COMMAND [group=option ...] [key=value ...] [--help]\n")
        for name, (module, *_) in COMMANDS.items():
            print(f"  {name:{max(map(len, COMMANDS))}}  {docstring(module).partition(chr(10))[0]}")
        return None
    guesses = did_you_mean(nearest(command, list(COMMANDS)))
    print(f"error: there is no command {command!r}{guesses} Commands: {', '.join(COMMANDS)}.", file=sys.stderr)
    sys.exit(USAGE_ERROR)


def train(recipe: str = "finetune", *, data_root: str | Path | None = None, **overrides: Any) -> Path:
    """Train a detector, as `light-head train` does, with the same recipes and, for a recipe, defaults.

    Args:
        recipe: a file of conf/recipe/: finetune, voc, demo or paper.
        data_root: the folder of the data set; None: that of the recipe.
        **overrides: groups (`backbone="v2_1x"`) and options, inner ones as dicts or by dotted name:
            `schedule={"epochs": 3}`, `**{"optimizer.lr": 0.001}`.

    Returns:
        The run directory, with best.ckpt, last.ckpt and metrics.json in it.

    Raises:
        InputError: an option, the data or a checkpoint is wrong, or the extra `train` is not installed.
    """
    return _call("train", {"recipe": recipe, "data.root": data_root}, overrides)


def evaluate(ckpt: str | Path, *, data_root: str | Path | None = None, **overrides: Any) -> dict[str, Any]:
    """Score a checkpoint or an export, as `light-head eval` does.

    Args:
        ckpt: best.ckpt or last.ckpt of a run, or an export.
        data_root: the folder of the data set; None: the one that the checkpoint was trained on.
        **overrides: options, as for `train`.

    Returns:
        The metrics by name, as in metrics.json (on several devices: of the first process).

    Raises:
        InputError: as for `train`.
    """
    return _call("eval", {"ckpt": ckpt, "data.root": data_root}, overrides)


def _call(command: str, arguments: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """Run a command from Python; arguments that are None are not given."""
    given = {key: value for key, value in arguments.items() if value is not None} | dict(overrides)
    groups = [key for key, value in given.items() if key in groups_of(command) and isinstance(value, str)]
    composed = compose(command, [f"{key}={given.pop(key)}" for key in groups], given)
    return composed.run(composed.options())
