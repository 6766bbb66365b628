"""Downloads: what comes through, and everything that must not, against real servers on this machine."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import which

import pytest

from detector.errors import InputError
from detector.inference import remote
from detector.inference.remote import fetch, is_public

BODY = bytes(range(256)) * 300


class Handler(BaseHTTPRequestHandler):
    """One path for each behaviour."""

    protocol_version = "HTTP/1.1"
    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.path)
        path = self.path.partition("?")[0].strip("/").split("/")
        getattr(self, path[0] if hasattr(self, path[0]) else "missing")(*path[1:])

    def log_message(self, *_: object) -> None:
        pass

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def whole(self, *_: str) -> None:
        self.send(200, BODY)

    def endless(self) -> None:
        """Chunked, without a length."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        except OSError:
            self.close_connection = True

    def chunked(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"5\r\nhello\r\n0\r\n\r\n")

    def drip(self, where: str) -> None:
        """A byte every tenth of a second, in the header or in the body: each wait is short, the whole is long."""
        try:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if where == "body" else b"X-Slow: "))
            for _ in range(100):
                self.wfile.write(b"a")
                time.sleep(0.1)
        except OSError:
            pass
        self.close_connection = True

    def silent(self) -> None:
        time.sleep(3)
        self.close_connection = True

    def short(self) -> None:
        self.send(200, BODY[:100], Content_Length="1000")
        self.close_connection = True

    def old(self) -> None:
        """HTTP/1.0: the body ends with the connection."""
        self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\nhello")
        self.close_connection = True

    def zipped(self) -> None:
        self.send(200, b"\x1f\x8b", Content_Encoding="gzip")

    def empty(self) -> None:
        self.send(200)

    def nonsense(self) -> None:
        self.wfile.write(b"\x00\x01\x02 no http\r\n\r\n")
        self.close_connection = True

    def hops(self, count: str) -> None:
        left = int(count)
        self.send(302, Location=f"/hops/{left - 1}" if left else "../whole")

    def to(self, name: str) -> None:
        self.send(301, Location=self.server.targets[name])  # type: ignore[attr-defined]

    def nowhere(self) -> None:
        self.send(302)

    def missing(self, *_: str) -> None:
        self.send(404)


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[str, list[str]]]]:
    """Start a server; gives its address and the list of paths that it was asked for."""
    servers: list[ThreadingHTTPServer] = []

    def start(targets: dict[str, str] | None = None, context: ssl.SSLContext | None = None) -> tuple[str, list[str]]:
        seen: list[str] = []
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Seen", (Handler,), {"seen": seen}))
        server.targets = targets or {}  # type: ignore[attr-defined]
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return f"{'https' if context else 'http'}://127.0.0.1:{server.server_address[1]}", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def assert_refused(url: str, *parts: str, **options: object) -> None:
    with pytest.raises(InputError) as error:
        fetch(url, **options)  # type: ignore[arg-type]
    assert [part for part in parts if part not in str(error.value)] == [], str(error.value)


def test_what_comes_through(serve: Callable) -> None:
    root, seen = serve()
    assert fetch(f"{root}/whole", allow_private=True) == BODY
    assert fetch(f"{root}/whole", allow_private=True, max_bytes=len(BODY)) == BODY
    assert fetch(f"{root}/chunked", allow_private=True) == b"hello"
    assert fetch(f"{root}/old", allow_private=True) == b"hello"
    assert fetch(f"{root}/hops/4", allow_private=True) == BODY
    assert fetch(f"{root}/whole/ä b?q=ü%20[1]#part", allow_private=True) == BODY
    assert seen[-1] == "/whole/%C3%A4%20b?q=%C3%BC%20[1]"
    host = root.replace("127.0.0.1", "localhost")
    assert fetch(f"{host}/whole", allow_private=True) == BODY


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.1.2.3", "localhost", "[::1]", "0.0.0.0", "[::]", "10.0.0.7", "172.16.0.1", "192.168.1.1",
        "169.254.169.254", "100.64.0.1", "[fe80::1]", "[fd00::1]", "[::ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]",
        "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "224.0.0.1", "[ff02::1]", "240.0.0.1", "255.255.255.255",
        "2130706433", "0x7f000001", "0x7f.1", "127.1", "017700000001", "0",
    ],
)  # fmt: skip
def test_hosts_that_are_not_public_are_refused(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    def dial(*_: object) -> socket.socket:
        raise AssertionError("connected")

    monkeypatch.setattr(remote, "_dial", dial)
    assert_refused(f"http://{host}:1/a.jpg", host)
    assert_refused(f"https://{host}/a.jpg", host)


def test_a_server_here_is_not_even_asked(serve: Callable) -> None:
    root, seen = serve()
    assert_refused(f"{root}/whole", "127.0.0.1", "allow_private=True")
    assert seen == []


# Of RFC 5737, RFC 6890, RFC 6598 and the like, and some that everybody may reach.
@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8",
                                     "64:ff9b::808:808", "172.32.0.1", "11.0.0.1", "100.128.0.1"])  # fmt: skip
def test_public_addresses(address: str) -> None:
    assert is_public(address)


def answer(*addresses: str) -> list[tuple]:
    return [(socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 80)) for a in addresses]


def test_every_address_of_a_name_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer("8.8.8.8", "10.1.2.3"))
    assert_refused("http://both.example/a.jpg", "both.example", "10.1.2.3")


def test_the_name_is_asked_once_and_the_checked_address_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that answers differently the second time (DNS rebinding) is not asked a second time."""
    answers = [answer("8.8.8.8"), answer("127.0.0.1")]
    dialled: list[object] = []

    def dial(places: list[tuple[int, object]], _: object) -> socket.socket:
        dialled.extend(place for _, place in places)
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers.pop(0))
    monkeypatch.setattr(remote, "_dial", dial)
    assert_refused("http://rebind.example/a.jpg", "rebind.example", "refused")
    assert dialled == [("8.8.8.8", 80)]
    assert len(answers) == 1


def test_redirects_are_checked_like_the_first_address(serve: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = {"file": "file:///etc/passwd", "ftp": "ftp://127.0.0.1/a", "other": "//127.0.0.2:9/a", "data": "data:,a"}
    targets["none"] = "http://me:secret@[abc/x.jpg"
    root, _ = serve(targets)
    for name in ("file", "ftp", "data"):
        assert_refused(f"{root}/to/{name}", targets[name], "http and https", allow_private=True)
    assert_refused(
        f"{root}/to/none", f"{root}/to/none: redirects to http://[abc/x.jpg, which is no", allow_private=True
    )
    assert_refused(f"{root}/hops/9", "more than 5 redirects", allow_private=True)
    assert_refused(f"{root}/nowhere", "redirects to nowhere", allow_private=True)
    # As if this server were a public one: its own address passes, the next one does not.
    real = remote.is_public
    monkeypatch.setattr(remote, "is_public", lambda address: address == "127.0.0.1" or real(address))
    assert_refused(f"{root}/to/other", "127.0.0.2", "allow_private=True")


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("file:///etc/passwd", "http and https"),
        ("ftp://host/a.jpg", "http and https"),
        ("gopher://host/a", "http and https"),
        ("street.jpg", "http and https"),
        ("http:///a.jpg", "no host"),
        ("http://host:99999/a.jpg", "not an address"),
        ("http://[::1/a.jpg", "not an address"),
        ("http://user:pa/ss@host/a.jpg", "http://host/a.jpg: not an address"),
        ("http://user:pass@/a.jpg", "http:///a.jpg: names no host"),
        ("ftp://user:pass@host/a.jpg", "ftp://host/a.jpg: only addresses"),
        ("http://me:secret@host.example/a.jpg", "password"),
        ("http://no-such-host.invalid/a.jpg", "no host 'no-such-host.invalid'"),
        ("http://" + "a" * 300 + ".example/", "no host"),
    ],
)
def test_addresses_that_are_none(url: str, part: str) -> None:
    assert_refused(url, part)
    with pytest.raises(InputError) as error:
        fetch(url)
    assert "secret" not in str(error.value)


def test_bodies_that_are_not_taken(serve: Callable) -> None:
    root, _ = serve()
    assert_refused(f"{root}/whole", "larger than 0.001 MB", max_bytes=1000, allow_private=True)
    assert_refused(f"{root}/endless", "larger than 1 MB", max_bytes=1_000_000, allow_private=True)
    assert_refused(f"{root}/short", "cut short, 100 of 1000", allow_private=True)
    assert_refused(f"{root}/zipped", "compresses", allow_private=True)
    assert_refused(f"{root}/empty", "empty", allow_private=True)
    assert_refused(f"{root}/nonsense", "cannot be downloaded", allow_private=True)
    assert_refused(f"{root}/missing", "404", allow_private=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert_refused(f"http://127.0.0.1:{port}/a.jpg", "cannot be downloaded", allow_private=True)


@pytest.mark.parametrize("path", ["drip/body", "drip/header", "silent"])
def test_slow_servers_end_at_the_time_limit(serve: Callable, path: str) -> None:
    root, _ = serve()
    start = time.monotonic()
    assert_refused(f"{root}/{path}", "not there after 0.5 s", timeout=0.5, allow_private=True)
    assert 0.4 < time.monotonic() - start < 2


def test_a_name_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2) or [])
    start = time.monotonic()
    assert_refused("http://slow.example/a.jpg", "not there after 0.3 s", timeout=0.3)
    assert time.monotonic() - start < 1.5


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate of its own for 127.0.0.1, in one file."""
    if which("openssl") is None:
        pytest.skip("makes a certificate with openssl")
    path = tmp_path_factory.mktemp("tls") / "own.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=here"]
    alternative = ["-addext", "subjectAltName=IP:127.0.0.1"]
    key, own = path.with_suffix(".key"), path.with_suffix(".crt")
    subprocess.run([*make, *alternative, "-keyout", str(key), "-out", str(own)], check=True, capture_output=True)
    path.write_bytes(key.read_bytes() + own.read_bytes())
    return path


def test_certificates_are_checked(serve: Callable, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    plain, _ = serve()
    root, seen = serve({"plain": f"{plain}/whole"}, context)
    assert_refused(f"{root}/whole", "no safe connection", allow_private=True)
    assert seen == []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # what a user does with a certificate of the company
    assert fetch(f"{root}/whole", allow_private=True) == BODY
    assert_refused(f"{root}/to/plain", "not encrypted", allow_private=True)
    assert_refused(f"{root}/drip/body", "not there after 0.5 s", timeout=0.5, allow_private=True)
    assert_refused(root.replace("127.0.0.1", "localhost"), "no safe connection", allow_private=True)


def test_a_server_without_tls(serve: Callable) -> None:
    root, _ = serve()
    assert_refused(root.replace("http", "https"), "no safe connection", timeout=2.0, allow_private=True)
