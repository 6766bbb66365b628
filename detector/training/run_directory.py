"""The directory of a run: which it is, that it is free, what is brought along and what is removed."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from detector.errors import InputError
from detector.files import check_writable, replacing
from detector.options import typed

if TYPE_CHECKING:
    from detector.training.run_options import RunOptions

log = logging.getLogger(__name__)

# The process that launches the others decides on the name of the run's folder; they find it here.
RUN_NAME_VARIABLE = "DETECTOR_RUN_NAME"
# Seconds in which the loader processes of a run that was killed end, and with them its lock.
PATIENCE = 6.0
# Everything that a run writes but config.yaml, in the order in which the log names it.
WRITTEN = (
    "best.pth",
    "best.ckpt",
    "last.ckpt",
    "metrics.csv",
    "metrics.json",
    "curves.png",
    "train_batch.png",
    "tensorboard",
)
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
    if options.run_dir and not _goes_on(options) and not options.overwrite and is_first_process():
        run_dir = Path(options.run_dir)
        if any((run_dir / name).exists() for name in WRITTEN):
            raise InputError(
                f"'{run_dir}' holds a run. Choose another run_dir; or overwrite=true, which removes that run; or "
                f"{typed('ckpt', str(run_dir / 'last.ckpt'))} resume=true, which goes on with it."
            )


def _goes_on(options: RunOptions) -> bool:
    """Whether the run stays in its directory; it may be resumed in another one."""
    here = Path(str(options.ckpt)).parent
    return bool(options.resume) and (not options.run_dir or Path(options.run_dir).resolve() == here.resolve())


@contextmanager
def run_directory(options: RunOptions, above: Path) -> Iterator[Path]:
    """Given, or the resumed run's, or <above>/<recipe>/<backbone>/<time>. Rank 0 alone writes to it, from `settle` on.

    Raises:
        InputError: it cannot be written to, or another process is writing a run there.
    """
    if options.run_dir:
        run_dir = Path(options.run_dir)
    elif options.resume:
        run_dir = Path(str(options.ckpt)).parent
    else:
        folder = above / options.recipe_name / options.backbone_name
        name = os.environ.get(RUN_NAME_VARIABLE)
        run_dir = folder / name if name else _new_folder(folder)
        os.environ[RUN_NAME_VARIABLE] = run_dir.name
    if not is_first_process():
        yield run_dir
        return
    check_writable(run_dir, "run_dir")
    with alone(run_dir):
        check_free(options)  # a run that has ended meanwhile
        yield run_dir


def settle(options: RunOptions, run_dir: Path) -> None:
    """Remove what does not belong to this run, bring what it goes on with, and write its options down."""
    if not is_first_process():
        return
    for partial in run_dir.glob(".*.partial*"):  # what a run that was killed left half written
        partial.unlink()
    if not _goes_on(options):
        _clear(run_dir)
    if options.resume:
        old = Path(str(options.ckpt)).parent
        for name in CONTINUED:
            if (old / name).is_file() and not (run_dir / name).exists():
                with replacing(run_dir / name) as partial:
                    shutil.copy2(old / name, partial)
    with replacing(run_dir / "config.yaml") as partial:
        partial.write_text(yaml.safe_dump(options.to_dict(), sort_keys=False))
    log.info("run directory: %s", run_dir)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes' runs out of a folder. The lock ends with this process, however it ends.

    Raises:
        InputError: another process holds it.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows has none
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"Another process is writing a run into '{folder}': wait for it, or choose another run_dir."
                    ) from error
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # loader processes hold it, too
    finally:
        os.close(descriptor)


@contextmanager
def dispensable(path: Path, told: set[Path]) -> Iterator[None]:
    """Go on where this file cannot be written, and say so once: neither table nor plot ends a training of hours.

    Args:
        told: of what it has been said.
    """
    try:
        yield
    except OSError as error:
        if path not in told:
            log.warning("Cannot write '%s': %s. The training goes on without it.", path, error.strerror or error)
        told.add(path)


def _new_folder(above: Path) -> Path:
    """A folder named by the time, to the second; with a number where a run has begun in the same one."""
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    if not is_first_process():
        return above / now
    check_writable(above, "run_dir")
    for number in itertools.count(1):
        folder = above / (now if number == 1 else f"{now}_{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def _clear(run_dir: Path) -> None:
    """Remove what another run has left, or its best.ckpt would pass for this one's."""
    for name in WRITTEN:
        if (run_dir / name).is_dir():
            shutil.rmtree(run_dir / name)
        else:
            (run_dir / name).unlink(missing_ok=True)
