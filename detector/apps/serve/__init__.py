"""A page, and an HTTP interface, to try a detector in: `serve(predictor)`.

Needs the extra `serve`: Starlette, uvicorn and python-multipart. Knows the predictor's promises and nothing of torch,
so that an exported detector is served in the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from detector.errors import InputError

if TYPE_CHECKING:
    from detector.inference.predictor import Predictor

__all__ = ["serve"]


def serve(predictor: Predictor, **settings: Any) -> None:
    """Answer requests until Ctrl-C or SIGTERM: see `detector.apps.serve.server.run` for the settings.

    Raises:
        InputError: a setting is wrong, the port is taken, or the extra `serve` is not installed.
    """
    try:
        from detector.apps.serve.server import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "detector":
            raise
        raise InputError(
            f"{error.name} is not installed; the server needs it: pip install 'light-head-detector[serve]'."
        ) from error
    run(predictor, **settings)
