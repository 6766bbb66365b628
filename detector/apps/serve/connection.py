"""uvicorn's connection with an end: to how many there are, and to every wait for a client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from detector.apps.serve.limits import Limits

# Seconds that a refusal may take beside Limits.timeout: what is still sent is read for a while.
MARGIN = 5.0
_TEXT = b'{"error":"The server has as many connections as it takes; try again."}'
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_TEXT), _TEXT)
)


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
