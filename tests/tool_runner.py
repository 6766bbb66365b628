"""Run the real tools as processes of their own, without paying for their imports each time.

A server process imports what the tools import, once; each run is a fork of it that runs the tool's file as __main__,
in a folder, environment and session of its own. `run_tool` starts the server when it is first needed.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
# What a launcher, or pytest-xdist around us, may have set, and what would make a child believe it is one rank of many.
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Outcome:
    """How a tool ended: exit code (minus the signal's number if it was killed) and what it printed."""

    code: int
    out: str
    err: str

    def ok(self) -> Outcome:
        assert self.code == 0, self.err[-3000:]
        return self

    def error(self) -> str:
        """The one-line message of a user's mistake."""
        assert self.code == 2, (self.code, self.err[-3000:])
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return self.err[self.err.index("error: ") :].strip()


def tool_environment(**extra: str) -> dict[str, str]:
    """For a process that runs a tool from any folder: this checkout before all else, one thread, no rank."""
    inherited = {key: value for key, value in os.environ.items() if key not in RANKS}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return inherited | threads | {"PYTHONPATH": path} | extra


def run_tool(tool: str, *overrides: str, cwd: Path, timeout: float = 240) -> Outcome:
    """tools/{tool}.py with these overrides, in the folder `cwd`; killed, with all its children, after `timeout` s."""
    return _Server.get().run(tool, overrides, cwd, timeout)


def run_process(command: list[str], cwd: Path, timeout: float = 240, **extra: str) -> Outcome:
    """A command as a user types it, all imports included. A hang is a failure: everything it started is killed."""
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        subprocess.Popen(
            command, cwd=cwd, env=tool_environment(**extra), stdout=out, stderr=err, start_new_session=True
        ) as process,
    ):
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun passes it on; its processes are in sessions of their own
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            err.seek(0)
            raise AssertionError(f"hangs: {command} runs for more than {timeout} s\n{err.read()[-3000:]}") from None
        out.seek(0)
        err.seek(0)
        return Outcome(code, out.read(), err.read())


class _Server:
    instance: _Server | None = None

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, __file__], env=tool_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.process.kill)

    @classmethod
    def get(cls) -> _Server:
        cls.instance = cls.instance or cls()
        return cls.instance

    def run(self, tool: str, overrides: tuple[str, ...], cwd: Path, timeout: float) -> Outcome:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            job = {"tool": tool, "overrides": overrides, "cwd": str(cwd), "timeout": timeout, "folder": folder}
            print(json.dumps(job), file=stdin, flush=True)
            code = json.loads(stdout.readline())
            out, err = (Path(folder, name).read_text() for name in ("out", "err"))
        if code is None:
            raise AssertionError(f"hangs: {tool} {overrides} runs for more than {timeout} s\n{err[-3000:]}")
        return Outcome(code, out, err)


def _serve(requests: IO[str]) -> None:
    import gc

    gc.freeze()  # or each child would look at all imported objects, and copy their pages, when it ends
    while line := requests.readline():
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            return _become(job)
        deadline = time.monotonic() + job["timeout"]
        status: int | None = None
        while status is None and time.monotonic() < deadline:
            pid, waited = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(waited) if pid else None
            time.sleep(0.02)
        if status is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        print(json.dumps(status), flush=True)


def _become(job: dict[str, Any]) -> None:
    """Be the process that a shell would have started for this command line."""
    import runpy

    os.setsid()
    os.chdir(job["cwd"])
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(Path(job["folder"], name), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        os.dup2(file, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    path = str(ROOT / "tools" / f"{job['tool']}.py")
    sys.argv = [path, *job["overrides"]]
    sys.path[0] = str(ROOT / "tools")
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    # What the tools import, at the start or on their way; nothing here may start a thread.
    import albumentations  # noqa: F401
    import hydra  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import tensorboard.summary  # noqa: F401
    from pycocotools import cocoeval  # noqa: F401

    import detector.training.pretrain
    import detector.training.run  # noqa: F401

    _serve(sys.stdin)
