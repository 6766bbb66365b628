"""The directory of a run: which it is, that it is free, what is brought along and what is removed."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from detector.errors import InputError
from detector.files import replacing

if TYPE_CHECKING:
    from detector.training.trainer import RunOptions

log = logging.getLogger(__name__)

# The process that launches the others decides on the name of the run's folder; they find it here.
RUN_NAME_VARIABLE = "DETECTOR_RUN_NAME"
# Everything that a run writes but config.yaml, in the order in which the log names it.
WRITTEN = (
    "best.pth", "best.ckpt", "last.ckpt", "metrics.csv", "metrics.json", "curves.png", "train_batch.png", "tensorboard"
)  # fmt: skip
# What a resumed run goes on with, beside its checkpoint.
CONTINUED = ("best.pth", "best.ckpt", "metrics.csv", "metrics.json", "train_batch.png")


def is_first_process() -> bool:
    """Whether this process has rank 0; known before the processes have met, whoever started them."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def check_free(options: RunOptions) -> None:
    """
    Raises:
        InputError: the run directory that is given holds a run already.
    """
    if options.run_dir and not options.resume and not options.overwrite and is_first_process():
        run_dir = Path(options.run_dir)
        if any((run_dir / name).exists() for name in WRITTEN):
            raise InputError(
                f"'{run_dir}' holds a run. Choose another run_dir; or overwrite=true, which removes that run; or "
                f"ckpt={run_dir / 'last.ckpt'} resume=true, which goes on with it."
            )


def run_directory(options: RunOptions, above: Path) -> Path:
    """Given, or the resumed run's, or <above>/<recipe>/<backbone>/<time>. Rank 0 alone writes to it, beginning here."""
    old = Path(str(options.ckpt)).parent  # of a resumed run
    if options.run_dir:
        run_dir = Path(options.run_dir)
    elif options.resume:
        run_dir = old
    else:
        folder = above / options.recipe_name / options.backbone_name
        run_dir = folder / os.environ.setdefault(RUN_NAME_VARIABLE, _free_name(folder))
    if is_first_process():
        check_writable(run_dir)
        if options.resume:
            for name in CONTINUED:
                if (old / name).is_file() and not (run_dir / name).exists():
                    shutil.copy2(old / name, run_dir / name)
        else:
            _clear(run_dir)
        with replacing(run_dir / "config.yaml") as partial:
            partial.write_text(yaml.safe_dump(options.to_dict(), sort_keys=False))
        log.info("run directory: %s", run_dir)
    return run_dir


def _free_name(folder: Path) -> str:
    """The time, to the second; with a number where a run has begun in the same one."""
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    names = itertools.chain([now], (f"{now}_{number}" for number in itertools.count(2)))
    return next(name for name in names if not (folder / name).exists())


def _clear(run_dir: Path) -> None:
    """Remove what another run has left, or its best.ckpt would pass for this one's."""
    for name in WRITTEN:
        if (run_dir / name).is_dir():
            shutil.rmtree(run_dir / name)
        else:
            (run_dir / name).unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """
    Raises:
        InputError: nothing can be written there.
    """
    try:
        with replacing(folder / f".probe-{os.getpid()}") as partial:
            partial.touch()
        (folder / f".probe-{os.getpid()}").unlink()
    except OSError as error:
        raise InputError(
            f"Cannot write to '{folder}': {error.strerror or error}. Choose another run_dir= or out=."
        ) from error
