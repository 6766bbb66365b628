"""Download a file from an address that somebody else may have written: bounded in bytes and time, public hosts only.

The standard library alone, because what decides which machine is spoken to must be seen whole: a name is resolved once,
every address of it is checked, and the connection goes to the checked address, so that no second answer of the name
server can lead elsewhere. Proxies named in the environment are not used: they would resolve the name again.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import quote, urljoin, urlsplit

from detector.errors import InputError

MAX_BYTES = 50_000_000
TIMEOUT = 30.0
MAX_REDIRECTS = 5
USER_AGENT = "light-head-detector"

_REDIRECTS = (301, 302, 303, 307, 308)
_PIECE = 1 << 16
# IPv6 addresses that stand for an IPv4 address in their last 32 bits (RFC 6052).
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


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
    started, deadline = url, _Deadline.after(timeout)
    try:
        for _ in range(MAX_REDIRECTS + 1):
            body, target = _request(_Address.parse(url), max_bytes, deadline, allow_private)
            if target is None:
                return body
            if urlsplit(url).scheme == "https" and urlsplit(target).scheme == "http":
                raise InputError(f"{url}: redirects to {target}, which is not encrypted; give that address yourself.")
            url = target
    except TimeoutError as error:
        raise InputError(
            f"{url}: not there after {timeout:g} s; the server is too slow: try again, or download it yourself."
        ) from error
    except ssl.SSLError as error:  # among them SSLCertVerificationError
        raise InputError(f"{url}: no safe connection ({error.reason or error}); check the address.") from error
    except (OSError, http.client.HTTPException) as error:
        raise InputError(
            f"{url}: cannot be downloaded ({error or type(error).__name__}); check the address."
        ) from error
    raise InputError(f"{started}: more than {MAX_REDIRECTS} redirects; give the address that they lead to.")


def without_credentials(address: str) -> str:
    """An address as messages and results show it: without user name and password.

    The latter also where it has a /, ? or # that should have been written %2F, %3F or %23: what follows the first colon
    is then no port.
    """
    return re.sub(r"^([\w+.-]+://)([^/?#]*@|[^/?#@:\[]*:(?!\d*([/?#]|$)).*@)", r"\1", address)


@dataclass(frozen=True)
class _Address:
    """A checked URL, in parts."""

    url: str
    scheme: str
    host: str
    port: int
    target: str  # what the request line names

    @classmethod
    def parse(cls, url: str) -> _Address:
        shown = without_credentials(url)
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:  # its text may have a part of a password
            raise InputError(f"{shown}: not an address; expected https://HOST/PATH.") from None
        if parts.scheme not in ("http", "https"):
            other = parts.scheme or "others"
            raise InputError(f"{shown}: only addresses of http and https are downloaded, not {other}.")
        if not parts.hostname:
            raise InputError(f"{shown}: names no host; expected https://HOST/PATH.")
        if parts.username is not None or parts.password is not None:
            raise InputError(f"{parts.hostname}: an address with a user name or password is not taken; download it.")
        # What a browser would send for a space or an accent; what is encoded already stays.
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (
            "?" + quote(parts.query, safe="/?%:@!$&'()*+,;=~[]") if parts.query else ""
        )
        return cls(url, parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80), target)


@dataclass(frozen=True)
class _Deadline:
    end: float

    @classmethod
    def after(cls, seconds: float) -> _Deadline:
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds; raises TimeoutError when there are none."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time is up")
        return left


def _request(address: _Address, max_bytes: int, deadline: _Deadline, allow_private: bool) -> tuple[bytes, str | None]:
    """One request: the body, or the address that it redirects to."""
    connection = _Connection(address, deadline, allow_private)
    try:
        connection.request("GET", address.target, headers={"User-Agent": USER_AGENT, "Accept": "*/*"})
        with connection.getresponse() as response:
            if response.status in _REDIRECTS:
                location = response.getheader("Location")
                if not location:
                    raise InputError(f"{address.url}: redirects to nowhere; give the address that shows the picture.")
                return b"", urljoin(address.url, location)
            if response.status != 200:
                answer = f"{response.status} {response.reason}"
                raise InputError(f"{address.url}: the server answers {answer}; check the address.")
            return _read_body(response, address.url, max_bytes), None
    finally:
        connection.close()


def _read_body(response: http.client.HTTPResponse, url: str, max_bytes: int) -> bytes:
    if (response.getheader("Content-Encoding") or "identity").lower() != "identity":
        raise InputError(f"{url}: the server compresses its answer, which was not asked for; download it yourself.")
    declared = response.length  # None: chunked, or until the connection closes
    too_large = InputError(f"{url}: larger than {max_bytes / 1e6:g} MB; download it and give the file.")
    if declared is not None and declared > max_bytes:
        raise too_large
    body = bytearray()
    while piece := response.read(_PIECE):
        body += piece
        if len(body) > max_bytes:
            raise too_large
    if declared is not None and len(body) < declared:
        raise InputError(f"{url}: cut short, {len(body)} of {declared} bytes; try again.")
    if not body:
        raise InputError(f"{url}: empty; check the address.")
    return bytes(body)


class _Connection(http.client.HTTPConnection):
    """To the first checked address that answers; every wait ends at the deadline."""

    def __init__(self, address: _Address, deadline: _Deadline, allow_private: bool) -> None:
        super().__init__(address.host, address.port)
        # The Host header leaves out the port that the scheme implies.
        self.default_port = 443 if address.scheme == "https" else 80
        self._address, self._deadline, self._allow_private = address, deadline, allow_private

    def connect(self) -> None:
        places = _resolve(self._address.host, self._address.port, self._deadline)
        if not self._allow_private:
            _refuse_private(self._address.url, places)
        raw = _dial(places, self._deadline)
        if self._address.scheme == "https":
            raw.settimeout(self._deadline.left())
            raw = ssl.create_default_context().wrap_socket(raw, server_hostname=self._address.host)
        self.sock = cast(socket.socket, _TimedSocket(raw, self._deadline))


def _resolve(host: str, port: int, deadline: _Deadline) -> list[tuple[int, Any]]:
    """(family, socket address) of every address of a host. In a thread: the system's resolver takes no time limit."""
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(deadline.left())
    if not answer:
        raise TimeoutError("the name server does not answer")
    if isinstance(answer[0], Exception):
        raise OSError(f"no host '{host}': {answer[0]}") from answer[0]
    return [(family, place) for family, _, _, _, place in answer[0]]


def _refuse_private(url: str, places: list[tuple[int, Any]]) -> None:
    for _, place in places:
        if not is_public(place[0]):
            raise InputError(
                f"{url}: leads to {place[0]}, which is this machine or a private network; if that is meant, "
                f"allow_private=True."
            )


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet: not loopback, private, link-local, shared, reserved,
    multicast, and not an IPv6 form of such an IPv4 address."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return all(one.is_global and not one.is_multicast and not one.is_reserved for one in _all_forms(parsed))


def _all_forms(address: IPAddress) -> list[IPAddress]:
    """The address, and the IPv4 addresses inside it."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:  # the same host; the IPv6 form itself counts as reserved
        return [address.ipv4_mapped]
    forms: list[IPAddress] = [address]
    if address.sixtofour is not None:
        forms.append(address.sixtofour)
    if address.teredo is not None:
        forms += address.teredo
    if address in _NAT64:
        forms = [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    return forms


def _dial(places: list[tuple[int, Any]], deadline: _Deadline) -> socket.socket:
    """A connection to the first place that takes one."""
    failure: OSError = OSError("the host has no address")
    for family, place in places:
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(deadline.left())
            connection.connect(place)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure


class _TimedSocket:
    """What http.client needs of a socket, with every wait cut at the deadline: a server that drips ends there too."""

    def __init__(self, raw: socket.socket, deadline: _Deadline) -> None:
        self._raw, self._deadline = raw, deadline

    def sendall(self, data: bytes) -> None:
        self._raw.settimeout(self._deadline.left())
        self._raw.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        return io.BufferedReader(_TimedReader(self._raw, self._deadline))

    def close(self) -> None:
        self._raw.close()


class _TimedReader(io.RawIOBase):
    def __init__(self, raw: socket.socket, deadline: _Deadline) -> None:
        # Keeps the socket open after http.client has closed its own handle, as makefile promises.
        self._raw, self._file, self._deadline = raw, raw.makefile("rb", buffering=0), deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._raw.settimeout(self._deadline.left())
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()
