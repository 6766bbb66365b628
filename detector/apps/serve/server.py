"""Bind, say where, and answer until a signal, on connections that end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from detector.apps.serve import Limits, ServerOptions
from detector.apps.serve.app import build_app
from detector.apps.serve.guard import is_loopback
from detector.errors import InputError
from detector.inference.predictor import Predictor

log = logging.getLogger(__name__)

# Seconds that requests may still take after a signal.
GRACE = 5
# Seconds that a refusal may take beside Limits.timeout: what is still sent is read for a while.
MARGIN = 5.0
_TEXT = b'{"error":"The server has as many connections as it takes; try again."}'
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_TEXT), _TEXT)
)


def run(predictor: Predictor, options: ServerOptions) -> None:
    """Serve until Ctrl-C or SIGTERM; requests that are under way then are answered.

    Args:
        predictor: what looks at the images.
        options: of the hosts only 127.0.0.1, ::1 and localhost keep other machines out.

    Raises:
        InputError: the port is taken, or the host is none of this machine.
    """
    host = options.host
    # It warns of every form that it cannot read, and whoever sends one chooses how often.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    app = build_app(predictor, options)
    # uvicorn ends the process itself where it cannot bind, and names no remedy.
    with _bind(host, options.port) as listener, _ended_by_signal():
        # The first call is slow; let no visitor pay for it. A detector that cannot predict is found out here.
        side = predictor.preprocessing.short_side
        predictor.predict([np.full((side, side, 3), 127, np.uint8)])
        if not is_loopback(host):
            log.warning(
                "host=%s: everyone who can reach this machine can use the detector; there is no password and no "
                "encryption.",
                host,
            )
        log.info("http://%s:%d  open this page; Ctrl-C stops the server.", _in_url(host), listener.getsockname()[1])
        server_of(app, options.limits).run(sockets=[listener])
    log.info("stopped")


def server_of(app: ASGIApp, limits: Limits) -> uvicorn.Server:
    """What answers with this application; `run(sockets=[...])` until a signal, or until `should_exit` is set."""
    config = uvicorn.Config(
        app,
        http=partial(Connection, limits=limits),  # type: ignore[arg-type]  # called as a class, and never looked into
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE,
    )
    return uvicorn.Server(config)


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """Ctrl-C and SIGTERM are the ordinary end of this block.

    uvicorn catches both, answers what is under way, and raises them again for whoever was there before it.
    """
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if in_main else None
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"Cannot listen on {host}, port {port}: {reason}. Choose another, or port=0 for any."
        ) from error


def _in_url(host: str) -> str:
    """What a browser on this machine is to be told."""
    if host in ("0.0.0.0", "::"):
        return "localhost"
    return f"[{host}]" if ":" in host else host


class Connection(H11Protocol):
    """One client's connection.

    uvicorn alone waits for ever for the first request, for headers that come byte by byte, for the rest of a body that
    no route reads, and for a client that does not read its answer. Here each of them ends with the connection, and a
    connection above `Limits.connections` is told so and closed. Those that are there already are served on.
    """

    def __init__(self, *args: Any, limits: Limits, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            transport.write(FULL)
            transport.close()
        else:
            self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._await_request()  # first: the next request may be here already, and begins in uvicorn's method
        super().on_response_complete()

    def _await_request(self) -> None:
        self._set_timer(self._limits.timeout, self._end_unless_asked)

    def _end_unless_asked(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
        else:  # the upload and the answer have their timeouts; who does not read the answer has none
            self._set_timer(2 * self._limits.timeout + MARGIN, self.transport.abort)

    def _set_timer(self, seconds: float, then: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = self.loop.call_later(seconds, then)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
