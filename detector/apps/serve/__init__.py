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
from typing import Annotated, Self

from PIL import Image
from pydantic import Field, model_validator
from pydantic.types import Strict

from detector.errors import require
from detector.inference import loading
from detector.inference.predictor import ScoreThreshold
from detector.inference.shipped import DEFAULT
from detector.options import Count, Options, Positive, Threads


class Limits(Options):
    """Bounds of one request, and of all of them together.

    What they let the server hold: for each of `queue` requests its body, which is there twice for a moment, and of a
    form above 1 MB once more in the temporary folder; of the one image that is decoded, up to 20 bytes a pixel, a
    gigabyte for 50 megapixels; and some hundred kB a connection.

    Nothing tells one client from another: who opens all `connections` keeps the others out, for `timeout` seconds at
    a time. A server for strangers belongs behind a proxy that bounds the connections of each.
    """

    max_upload_mb: Positive = 20
    """Megabytes (10^6 bytes) of a request's body."""
    max_megapixels: Positive = 50
    """Millions of pixels of an image, before it is resized."""
    queue: Count = 16
    """Requests that may be here at once, one of them in the network; more are told to come back."""
    timeout: Positive = 30
    """Seconds for a request to come, headers and all, for its upload, and for its answer."""
    connections: Count = 128
    """That may be open at once, of all clients together; at least `queue`. A proxy can bound those of each."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.connections < self.queue:
            raise ValueError(
                f"connections={self.connections}: expected a whole number, {self.queue} (that is, queue) or more."
            )
        # Above its own bound Pillow warns, and then refuses; a limit that is not reached would be a promise broken.
        if Image.MAX_IMAGE_PIXELS is not None and self.max_pixels > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"max_megapixels={self.max_megapixels:g}: expected at most {Image.MAX_IMAGE_PIXELS / 1e6:g}."
            )
        return self

    @property
    def max_bytes(self) -> int:
        return int(self.max_upload_mb * 1e6)

    @property
    def max_pixels(self) -> int:
        return int(self.max_megapixels * 1e6)


class ServerOptions(Options):
    """Where the server listens, and what it answers."""

    host: str = "127.0.0.1"
    """This machine only; 0.0.0.0 lets in everyone who can reach it."""
    names: tuple[str, ...] = ()
    """Names under which a proxy on this machine is reached, [demo.example.org]; requests for others are refused."""
    port: Annotated[int, Strict(), Field(ge=0, le=65535)] = 8000
    """0: any free one; the log says which."""
    score_threshold: ScoreThreshold = "auto"
    """For requests that name none: a number, one for each class, {car: 0.5}; auto: the checkpoint's own, or 0.3."""
    limits: Limits = Limits()
    """Bounds of a request, and of all of them together."""


class ServeOptions(ServerOptions):
    """What to serve, and where."""

    ckpt: str = DEFAULT
    """best.ckpt or last.ckpt of a run, an export, or the name of a detector of this package."""
    device: str | None = None
    """Null: of a checkpoint the GPU if there is one, of an export the CPU."""
    threads: Threads | None = None
    """Threads of the processor that one prediction may use; null: as many as the runtime likes."""


def serve(options: ServeOptions) -> None:
    """Load a detector, and answer requests until Ctrl-C or SIGTERM.

    Raises:
        InputError: an option is wrong, the port is taken, or the extra `serve` is not installed.
    """
    # Until it serves there is nothing to answer. Process 1 of a container has no default action, and would go on.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    # Starlette would miss python_multipart only when the first form comes.
    require(
        "starlette.applications",
        "uvicorn.protocols.http.h11_impl",
        "python_multipart",
        package="[serve]",
        what="The server",
    )
    from detector.apps.serve.server import run

    run(loading.load(options.ckpt, options.device, threads=options.threads), options)
