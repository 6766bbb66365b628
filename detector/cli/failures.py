"""What ends a command: one line for an error that the user can mend, said once, whatever the number of processes."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from typing import NoReturn

from detector.errors import InputError

USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count
UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EIO,
    errno.EFBIG,
    errno.ELOOP,
    errno.EBUSY,
    errno.EXDEV,
}
# Seconds that rank 0 has to report an error that all ranks share.
GRACE = 5.0


def missing(error: ModuleNotFoundError) -> str | None:
    """One line for a package of the extra `train` that is not installed; None for a module of this package."""
    if (error.name or "").partition(".")[0] in ("detector", ""):
        return None
    return f"{error.name} is not installed; the command needs it: pip install 'light-head-detector[train]'."


def explain(error: Exception) -> str | None:
    """One line for an error that the user can mend; None for an error of this package."""
    if isinstance(error, InputError):
        return without_worker(str(error))
    if isinstance(error, ModuleNotFoundError):
        return missing(error)
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename or 'a file'}: choose another place, or change who may use this one."
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        reason = os.strerror(error.errno).lower()
        return f"cannot write {error.filename or 'a file'}: {reason}. Make room, or choose another place."
    if type(error).__name__ == "OutOfMemoryError":  # torch's; not imported for its name
        return "the GPU's memory is full: lower the batch size (batch_size, train.batch_size or val.batch_size)."
    if isinstance(error, RuntimeError) and re.search(
        r"[Cc]onnection (closed|reset) by peer|remote process exited", str(error)
    ):
        return "another process of this run has ended; its own message says why."
    if isinstance(error, RuntimeError) and re.match(r"DataLoader worker .*(killed|exited unexpectedly)", str(error)):
        first = str(error).splitlines()[0]
        return f"{first} Memory, or /dev/shm, may be full: try workers=0 (in training also data.cache=false)."
    return None


def without_worker(message: str) -> str:
    """The message of an error that torch has passed on from a loader process, wrapped in that process's traceback."""
    if not re.match(r"Caught \w+ in (DataLoader worker|pin memory)", message):
        return message
    return re.split(r"^(?:\w+\.)*InputError: ", message, flags=re.MULTILINE)[-1].strip()


def report(message: str, rank: int, parent: int) -> None:
    """Print an error of the run once, though every rank may meet it.

    Another rank waits: if rank 0 met the error too, torchrun ends this process meanwhile, or its parent has gone, which
    is rank 0 where Lightning launched it. Otherwise the error is this rank's own, and nobody else will tell.
    """
    if rank == 0:
        print(f"error: {message}", file=sys.stderr)
        return
    time.sleep(GRACE)
    if os.getppid() == parent:
        print(f"error (rank {rank}): {message}", file=sys.stderr)


def interrupted(rank: int) -> NoReturn:
    if rank == 0:
        print("interrupted", file=sys.stderr)
    sys.exit(INTERRUPTED)
