"""What every request passes: is it meant for this server, and what may a browser do with the answer."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import re
from collections.abc import Sequence
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether a server bound to this host can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def content_security_policy(page: str) -> str:
    """Nothing but the page's own script and style, known by their hashes, images of its own, and this server."""
    script, style = (
        " ".join(f"'sha256-{_sha256(text)}'" for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL))
        for tag in ("script", "style")
    )
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Guard:
    """ASGI middleware, the outermost.

    A server on the loopback answers to its own names only: a page of another site can point its own name at 127.0.0.1
    (DNS rebinding), and would then be of one origin with this server. A POST that a browser sends for a page of another
    site is refused on any server: the page could not read the answer, but it could keep the network busy.
    """

    def __init__(self, app: ASGIApp, host: str, policy: str, names: Sequence[str] = ()) -> None:
        """
        Args:
            app: what to guard.
            host: that the server is bound to.
            policy: the Content-Security-Policy of every answer.
            names: others than the host's own, of a proxy.
        """
        self.app = app
        self.headers = HEADERS | {"Content-Security-Policy": policy}
        self.given = {name.lower() for name in names}
        self.names = {"localhost", "127.0.0.1", "::1", host.lower(), *self.given} if is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        started = False

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        if refusal := self._refusal(Headers(scope=scope)):
            return await refusal(scope, receive, send_guarded)
        try:
            await self.app(scope, receive, send_guarded)
        except asyncio.CancelledError:  # the server was told to stop, and has waited long enough
            if not started:
                await JSONResponse({"error": "The server is stopping."}, 503)(scope, receive, send_guarded)

    def _refusal(self, headers: Headers) -> JSONResponse | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.names is not None and _split(f"//{host}").hostname not in self.names:
            known = ", ".join(sorted(self.names))
            return JSONResponse({"error": f"This server does not answer to {host[:80]!r}; open it as {known}."}, 421)
        own = origin is None or _split(origin).netloc.lower() == host.lower() or _split(origin).hostname in self.given
        if not own:  # a proxy may put the name of this server in the place of its own
            return JSONResponse({"error": "Requests from pages of other sites are refused."}, 403)
        return None


def _split(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
