"""A page to try a detector in, and an HTTP interface: images in, boxes out.

python tools/serve.py ckpt=RUN_DIR/best.ckpt              then open http://127.0.0.1:8000
python tools/serve.py ckpt=RUN_DIR/best.ckpt port=9000
curl -F image=@street.jpg http://127.0.0.1:8000/predict   the same from the command line

Ctrl-C or SIGTERM ends it, with exit code 0, when what is under way is answered; while it still loads, at once. Needs
the extra `serve`: Starlette, uvicorn and python-multipart. An exported detector is served in the same way, without
torch.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from detector.apps.serve.limits import Limits, ServerOptions
from detector.errors import InputError
from detector.inference import loading
from detector.inference.predictor import Predictor
from detector.options import Count

__all__ = ["Limits", "ServeOptions", "ServerOptions", "serve", "serve_predictor"]


class ServeOptions(ServerOptions):
    """What to serve, and where."""

    ckpt: str
    """best.ckpt or last.ckpt of a run, or an export."""
    device: str | None = None
    """Null: the GPU if there is one."""
    threads: Count | None = None
    """Threads of the processor that one prediction may use; null: as many as the runtime likes."""


def serve(options: ServeOptions) -> None:
    """Load a detector, and answer requests until Ctrl-C or SIGTERM.

    Raises:
        InputError: an option is wrong, the port is taken, or the extra `serve` is not installed.
    """
    # Until it serves there is nothing to answer. Process 1 of a container has no default action, and would go on.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    run = _import_run()
    run(loading.load(options.ckpt, options.device, threads=options.threads), options)


def serve_predictor(predictor: Predictor, options: ServerOptions | None = None) -> None:
    """Answer requests with a predictor that is there already, until Ctrl-C or SIGTERM.

    Raises:
        InputError: an option is wrong, the port is taken, or the extra `serve` is not installed.
    """
    _import_run()(predictor, options or ServerOptions())


def _import_run() -> Callable[[Predictor, ServerOptions], None]:
    try:
        from detector.apps.serve.server import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "detector":
            raise
        raise InputError(
            f"{error.name} is not installed; the server needs it: pip install 'light-head-detector[serve]'."
        ) from error
    return run
