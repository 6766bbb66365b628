"""Download a file from an address that somebody else may have written: bounded in bytes and time, public hosts only.

The standard library alone, because what decides which machine is spoken to must be seen whole: a name is resolved once,
every address of it is checked, and the connection goes to the checked address, so that no second answer of the name
server can lead elsewhere. Proxies named in the environment are not used: they would resolve the name again.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from detector.errors import InputError

MAX_BYTES = 50_000_000
TIMEOUT = 30.0
MAX_REDIRECTS = 5
USER_AGENT = "light-head-detector"

_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
# IPv6 addresses that stand for an IPv4 address in their last 32 bits (RFC 6052).
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetch(url: str, *, max_bytes: int = MAX_BYTES, timeout: float = TIMEOUT, allow_private: bool = False) -> bytes:
    """The body of an http or https address.

    Args:
        url: without user name and password.
        max_bytes: the body may not be longer; counted while it is read, whatever the server declares.
        timeout: seconds for everything together: names, redirects, the slowest server.
        allow_private: also hosts that the public internet cannot reach: this machine, the local network.

    At most 5 redirects, each checked like the first address; from http to https, never the other way or elsewhere.

    Raises:
        InputError: any of the above is violated, the server cannot be reached, its certificate is not valid, it
            answers with an error, or the body is empty, cut short or compressed.
    """
    download = _Download(max_bytes, timeout, allow_private)
    answer: Future[bytes] = Future()

    def work() -> None:
        try:
            answer.set_result(download.follow(url))
        except Exception as error:  # raised again below, where somebody sees it
            answer.set_exception(error)

    # In a thread: the system's resolver takes no time limit, and a server that drips keeps each single wait short.
    threading.Thread(target=work, daemon=True).start()
    try:
        return answer.result(timeout)
    except TimeoutError as error:
        download.stop()
        raise InputError(
            f"{url}: not there after {timeout:g} s; the server is too slow: try again, or download it yourself."
        ) from error


def parts_of(url: str) -> SplitResult:
    """The parts of an address; all empty where it is none, which `fetch` refuses."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def without_credentials(address: str) -> str:
    """An address as messages and results show it: without user name and password.

    The latter also where it has a /, ? or # that should have been written %2F, %3F or %23: what follows the first colon
    is then no port.
    """
    return re.sub(r"^([\w+.-]+://)([^/?#]*@|[^/?#@:\[]*:(?!\d*([/?#]|$)).*@)", r"\1", address)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet: not loopback, private, link-local, shared, reserved,
    multicast, and not an IPv6 form of such an IPv4 address."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    forms: list[Any] = [parsed]
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped or parsed in _NAT64:  # the same host; the IPv6 form itself counts as reserved
            forms = [ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)]
        forms += filter(None, (parsed.sixtofour, *(parsed.teredo or ())))
    return all(one.is_global and not one.is_multicast and not one.is_reserved for one in forms)


class _Download:
    """The requests that follow one address, and how to end them from another thread."""

    def __init__(self, max_bytes: int, timeout: float, allow_private: bool) -> None:
        self.max_bytes, self.timeout, self.allow_private = max_bytes, timeout, allow_private
        self.socket: socket.socket | None = None
        self.stopped = False

    def stop(self) -> None:
        """Wake whatever waits for the server."""
        self.stopped = True
        if self.socket is not None:
            with suppress(OSError):  # closed meanwhile
                socket.socket.shutdown(self.socket, socket.SHUT_RDWR)  # SSLSocket's own would race with its reader

    def follow(self, url: str) -> bytes:
        started = url
        for _ in range(MAX_REDIRECTS + 1):
            try:
                body, target = self.request(url, _checked(url))
            except TimeoutError:
                raise
            except (OSError, http.client.HTTPException) as error:
                what = "no safe connection" if isinstance(error, ssl.SSLError) else "cannot be downloaded"
                reason = getattr(error, "reason", None) or error or type(error).__name__
                raise InputError(f"{url}: {what} ({reason}); check the address.") from error
            if target is None:
                return body
            if urlsplit(url).scheme == "https" and urlsplit(target).scheme == "http":
                raise InputError(f"{url}: redirects to {target}, which is not encrypted; give that address yourself.")
            url = target
        raise InputError(f"{started}: more than {MAX_REDIRECTS} redirects; give the address that they lead to.")

    def request(self, url: str, parts: SplitResult) -> tuple[bytes, str | None]:
        """One request: the body, or the address that it redirects to."""
        # What a browser would send for a space or an accent; what is encoded already stays.
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
        target += "?" + quote(parts.query, safe="/?%:@!$&'()*+,;=~[]") if parts.query else ""
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port or _PORTS[parts.scheme])
        connection.default_port = _PORTS[parts.scheme]  # the Host header leaves it out
        try:
            connection.sock = self.connect(url, parts)
            connection.request("GET", target, headers={"User-Agent": USER_AGENT, "Accept": "*/*"})
            with connection.getresponse() as response:
                if response.status in _REDIRECTS:
                    location = response.getheader("Location")
                    if not location:
                        raise InputError(f"{url}: redirects to nowhere; give the address that shows the image.")
                    return b"", _joined(url, location)
                if response.status != 200:
                    answer = f"{response.status} {response.reason}"
                    raise InputError(f"{url}: the server answers {answer}; check the address.")
                return self.read(response, url), None
        finally:
            connection.close()
            if self.socket is not None:  # a failed handshake left it to nobody
                self.socket.close()

    def connect(self, url: str, parts: SplitResult) -> socket.socket:
        """A connection to the first checked address of the host that takes one."""
        host, port = str(parts.hostname), parts.port or _PORTS[parts.scheme]
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise OSError(f"no host '{host}': {error}") from error
        places = [(family, place) for family, _, _, _, place in found]
        for _, place in places:
            if not self.allow_private and not is_public(str(place[0])):
                raise InputError(
                    f"{url}: leads to {place[0]}, which is this machine or a private network; if that is meant, "
                    f"allow_private=True."
                )
        self.socket = _dial(places, self.timeout)
        if parts.scheme == "https":
            context = ssl.create_default_context()
            self.socket = context.wrap_socket(self.socket, server_hostname=host, do_handshake_on_connect=False)
            self.socket.do_handshake()
        if self.stopped:
            raise TimeoutError
        return self.socket

    def read(self, response: http.client.HTTPResponse, url: str) -> bytes:
        if response.getheader("Content-Encoding", "identity").lower() != "identity":
            raise InputError(f"{url}: the server compresses its answer, which was not asked for; download it yourself.")
        declared = response.length or 0  # nothing: chunked, or until the connection closes
        body = response.read(self.max_bytes + 1) if declared <= self.max_bytes else b""
        if max(declared, len(body)) > self.max_bytes:
            raise InputError(f"{url}: larger than {self.max_bytes / 1e6:g} MB; download it and give the file.")
        if len(body) < declared:
            raise InputError(f"{url}: cut short, {len(body)} of {declared} bytes; try again.")
        if not body:
            raise InputError(f"{url}: empty; check the address.")
        return body


def _joined(url: str, location: str) -> str:
    """Where a redirect leads to."""
    try:
        return urljoin(url, location)
    except ValueError:
        shown = without_credentials(location)
        raise InputError(f"{url}: redirects to {shown}, which is no address; give the one that it means.") from None


def _checked(url: str) -> SplitResult:
    """The parts of an address that may be asked."""
    shown = without_credentials(url)
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # read now: it is checked where it is read
    except ValueError:  # its text may have a part of a password
        raise InputError(f"{shown}: not an address; expected https://HOST/PATH.") from None
    if parts.scheme not in _PORTS:
        other = parts.scheme or "others"
        raise InputError(f"{shown}: only addresses of http and https are downloaded, not {other}.")
    if not parts.hostname:
        raise InputError(f"{shown}: names no host; expected https://HOST/PATH.")
    if parts.username is not None or parts.password is not None:
        raise InputError(f"{parts.hostname}: an address with a user name or password is not taken; download it.")
    return parts


def _dial(places: Sequence[tuple[int, Any]], timeout: float) -> socket.socket:
    """A connection to the first place that takes one; no wait of it lasts longer than the timeout."""
    failure: OSError = OSError("the host has no address")
    for family, place in places:
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            connection.connect(place)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure
