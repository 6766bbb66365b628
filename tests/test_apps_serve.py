"""The HTTP interface in-process: what it answers, what it refuses, and that no bytes from outside break it."""

from __future__ import annotations

import errno
import gc
import http.client
import io
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detector.data.preprocess import Prepared, Preprocessing
from detector.errors import InputError
from detector.inference.detections import Found
from detector.inference.detector import Detector
from detector.inference.predictor import Predictor

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("python_multipart", reason="needs the extra serve")

from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from detector.apps.serve import Limits, ServeOptions, ServerOptions, serve
from detector.apps.serve import server as server_module
from detector.apps.serve.app import build_app
from detector.apps.serve.guard import Guard, is_loopback
from detector.apps.serve.server import run, server_of

ROOT = Path(__file__).resolve().parents[1]
LOOPBACK = "http://127.0.0.1:8000"
LIMITS = Limits(max_upload_mb=0.2, max_megapixels=0.1, queue=4, timeout=10)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def noise(height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height)))


class Ruler(Predictor):
    """Finds, by rule, one object for each proposal: number i is i pixels wide and has the score 1 - i / 10.

    With `block`, it waits for the event inside the network.
    """

    class_names = ("odd", "even")
    preprocessing = Preprocessing(short_side=32, long_side=64)
    proposal_limit: int | None = 8

    def __init__(self, block: threading.Event | None = None) -> None:
        self.block, self.calls, self.running = block, 0, 0

    def detect(self, prepared: Prepared, max_proposals: int | None = None) -> list[Found]:
        self.calls += 1
        self.running += 1
        assert self.running == 1, "two threads have the network"
        if self.block is not None:
            assert self.block.wait(10)
        self.running -= 1
        number = np.arange(1, (max_proposals or 8) + 1)
        boxes = np.stack([0 * number, 0 * number, number, 0 * number + 4], axis=1).astype(np.float32)
        return [Found(boxes, (1 - number / 10).astype(np.float32), (number + 1) % 2)] * len(prepared)


class FixedRuler(Ruler):
    """As an export: the number of proposals cannot be chosen."""

    proposal_limit = None


class BrokenRuler(Ruler):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def detect(self, prepared: Prepared, max_proposals: int | None = None) -> list[Found]:
        raise self.error


def client_of(predictor: Predictor, limits: Limits = LIMITS, **settings: Any) -> TestClient:
    return TestClient(
        build_app(predictor, ServerOptions(limits=limits, **settings)), base_url=LOOPBACK, raise_server_exceptions=False
    )


@pytest.fixture
def client(small_detector: Detector) -> Iterator[TestClient]:
    with client_of(small_detector) as client:
        yield client


@pytest.fixture(scope="module")
def ruler() -> Iterator[TestClient]:
    with client_of(Ruler()) as client:
        yield client


def post(client: TestClient, data: bytes | None = None, *, form: dict[str, Any] | None = None, query: str = "") -> Any:
    files = {"image": ("picture.png", encoded(noise()) if data is None else data)}
    return client.post(f"/predict{query}", files=files, data=form or {})


def assert_refused(response: Any, status: int, *parts: str) -> None:
    """A message in JSON, with this status and these parts."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    assert [part for part in parts if part not in response.json()["error"]] == [], response.text


# ---- answers


def test_a_form_and_raw_bytes_give_what_the_detector_finds(client: TestClient, small_detector: Detector) -> None:
    pixels = noise()
    [expected] = small_detector.predict(pixels, score_threshold=0.2)
    assert len(expected) > 2
    form = post(client, encoded(pixels), form={"score_threshold": "0.2"})
    raw = client.post("/predict?score_threshold=.2", content=encoded(pixels), headers={"Content-Type": "image/png"})
    for response in (form, raw):
        assert response.status_code == 200, response.text
        answer = response.json()
        assert (answer["height"], answer["width"]) == (60, 80)
        np.testing.assert_array_equal(np.float32(answer["boxes"]), expected.boxes)
        np.testing.assert_array_equal(np.float32(answer["scores"]), expected.scores)
        assert answer["labels"] == expected.labels.tolist()
        assert answer["names"] == expected.names


def test_options_by_query_and_by_form(ruler: TestClient) -> None:
    # By Ruler's rule: scores 0.9, 0.8, ..., 0.2, with labels 0, 1, 0, 1 ...
    assert post(ruler).json()["scores"] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    assert len(post(ruler, query="?score_threshold=0").json()["scores"]) == 8
    assert len(post(ruler, query="?score_threshold=1e-9").json()["scores"]) == 8
    assert post(ruler, query="?max_proposals=2").json()["scores"] == pytest.approx([0.9, 0.8])
    answer = post(ruler, form={"score_threshold": "0.65", "classes": "even"}).json()
    assert answer["names"] == ["even"]
    assert answer["options"] == {"score_threshold": 0.65, "max_proposals": None, "classes": ["even"]}
    both = post(ruler, form={"classes": ["even", "odd"]}, query="?max_proposals=4").json()
    assert both["names"] == ["odd", "even", "odd", "even"]


def test_the_time_of_the_parts_is_the_time_of_the_whole(ruler: TestClient) -> None:
    times = post(ruler).json()["milliseconds"]
    assert times["total"] == pytest.approx(times["queue"] + times["decode"] + times["inference"], abs=0.01)
    assert min(times.values()) >= 0


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_every_promised_format(ruler: TestClient, kind: str) -> None:
    response = post(ruler, encoded(noise(20, 30), kind))
    assert response.status_code == 200, response.text
    assert (response.json()["height"], response.json()["width"]) == (20, 30)


@pytest.mark.parametrize("kind", ["ICO", "PCX", "TGA"])
def test_no_other_format(ruler: TestClient, kind: str) -> None:
    """Pillow reads them, and many more, some with the help of other programs."""
    Image.open(io.BytesIO(encoded(noise(20, 30), kind))).load()
    assert_refused(post(ruler, encoded(noise(20, 30), kind)), 422, "Not an image of a known format")


def test_animations_give_their_first_frame_and_exif_turns(client: TestClient, small_detector: Detector) -> None:
    first, second = Image.fromarray(noise(seed=1)), Image.fromarray(noise(seed=2))
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=[second])
    [expected] = small_detector.predict(Image.open(io.BytesIO(file.getvalue())), score_threshold=0)
    answer = post(client, file.getvalue(), query="?score_threshold=0").json()
    np.testing.assert_array_equal(np.float32(answer["boxes"]), expected.boxes)

    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = post(client, encoded(noise(40, 90), "JPEG", exif=exif)).json()
    assert (turned["height"], turned["width"]) == (90, 40)


def test_what_the_server_says_of_itself(client: TestClient, ruler: TestClient) -> None:
    info = client.get("/info").json()
    assert info["class_names"] == ["cat", "dog", "bird"]
    assert info["preprocessing"] == {"short_side": 64, "long_side": 96}
    assert info["limits"]["max_upload_bytes"] == 200_000
    assert info["limits"]["max_pixels"] == 100_000
    assert info["limits"]["queue"] == 4
    assert "provenance" not in str(info)
    assert ruler.get("/info").json()["options"]["max_proposals"] == {"minimum": 1, "maximum": 8}
    assert client.get("/health").json() == {"status": "ok"}


def test_answers_fit_the_published_schema(client: TestClient, ruler: TestClient) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    for some in (client, ruler):
        document = some.get("/schema").json()
        assert document["openapi"].startswith("3.1")
        found, info, health, error = (
            jsonschema.Draft202012Validator(document | {"$ref": f"#/components/schemas/{name}"})
            for name in ("Detections", "Info", "Health", "Error")
        )
        answers = [
            (found, post(some).json()),
            (found, post(some, query=f"?classes={some.get('/info').json()['class_names'][0]}").json()),
            (info, some.get("/info").json()),
            (health, some.get("/health").json()),
            (error, post(some, b"?").json()),
        ]
        for validator, answer in answers:
            validator.check_schema(validator.schema)
            validator.validate(answer)
        for broken in ({"scores": [2.0]}, {"names": ["cow"]}, {"labels": [3]}):
            assert not found.is_valid(post(some).json() | broken)
    parameters = {name["name"] for name in document["paths"]["/predict"]["post"]["parameters"]}
    assert parameters == {"score_threshold", "max_proposals", "classes"}


def test_a_detector_without_a_choice_of_proposals_says_so() -> None:
    with client_of(FixedRuler()) as client:
        assert client.get("/info").json()["options"]["max_proposals"] is None
        operation = client.get("/schema").json()["paths"]["/predict"]["post"]
        assert [option["name"] for option in operation["parameters"]] == ["score_threshold", "classes"]
        assert_refused(post(client, query="?max_proposals=3"), 422, "max_proposals cannot be set")
        assert len(post(client).json()["scores"]) == 7


# ---- refusals


@pytest.mark.parametrize(
    ("query", "parts"),
    [
        ("score_threshold=nan", ["score_threshold='nan'", "from 0 to 1"]),
        ("score_threshold=inf", ["score_threshold='inf'"]),
        ("score_threshold=-0.1", ["from 0 to 1"]),
        ("score_threshold=1.01", ["from 0 to 1"]),
        ("score_threshold=1e999", ["from 0 to 1"]),
        ("score_threshold=", ["from 0 to 1"]),
        ("score_threshold=.", ["from 0 to 1"]),
        ("score_threshold=0_1", ["from 0 to 1"]),
        ("score_threshold=%D9%A0", ["from 0 to 1"]),  # a zero in Arabic script
        ("score_threshold=" + "9" * 9000, ["from 0 to 1"]),
        ("score_threshold=0.1&score_threshold=0.2", ["given 2 times"]),
        ("max_proposals=0", ["from 1 to 8"]),
        ("max_proposals=9", ["from 1 to 8"]),
        ("max_proposals=" + "9" * 9000, ["from 1 to 8"]),
        ("max_proposals=2.5", ["from 1 to 8"]),
        ("max_proposals=NaN", ["from 1 to 8"]),
        ("classes=cow", ["classes='cow'", "odd, even"]),
        ("classes=", ["classes=''"]),
        ("classes=%FF%FE%00", ["is not a class"]),
        ("path=/etc/passwd", ["Unknown option 'path'"]),
        ("source=http://127.0.0.1/", ["Unknown option 'source'"]),
        ("%ED%A0%80=1", ["Unknown option"]),
    ],
)
def test_options_that_cannot_be(ruler: TestClient, query: str, parts: list[str]) -> None:
    assert_refused(post(ruler, query=f"?{query}"), 422, *parts)


@pytest.mark.parametrize(
    "text", ["/etc/passwd", "file:///etc/passwd", "../../etc/passwd", "http://127.0.0.1:1/x.png", "C:\\x.png", "."]
)
def test_nothing_that_a_request_names_is_opened(
    ruler: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    picture = tmp_path / "secret.png"
    picture.write_bytes(encoded(noise()))
    monkeypatch.chdir(tmp_path)
    for content in (text, str(picture), picture.name, picture.as_uri()):
        assert_refused(post(ruler, content.encode()), 422, "Not an image")
        assert_refused(ruler.post("/predict", content=content.encode(), headers={"Content-Type": "image/png"}), 422)
        # As a field, as a file's name, and as the address.
        assert_refused(
            ruler.post("/predict", files={"other": ("a", b"b")}, data={"image": content}), 400, "no file 'image'"
        )
        assert_refused(ruler.post("/predict", files={"image": (content, b"")}), 422, "empty")
        answers = [ruler.get(path) for path in ("/" + content.lstrip("/"), f"/..%2f{content}")]
        # "/." is another way to write "/", the page.
        assert [answer.status_code for answer in answers] == [200 if content == "." else 404, 404]
        for file in (picture, Path("/etc/passwd")):
            if file.is_file():
                assert [answer.url for answer in answers if file.read_bytes() in answer.content] == []


@pytest.mark.parametrize("name", ["page.html", "openapi.json", "app.py", "__init__.py"])
def test_no_file_of_the_server_is_served(ruler: TestClient, name: str) -> None:
    own = (ROOT / "detector/apps/serve" / name).read_bytes()
    for path in (f"/{name}", f"/./{name}", f"/..%2f{name}", f"/serve/{name}", f"/..%2fserve%2f{name}"):
        answer = ruler.get(path)
        assert (answer.status_code, own in answer.content) == (404, False), path


def test_requests_without_an_image(ruler: TestClient) -> None:
    assert_refused(ruler.post("/predict"), 422, "empty")
    assert_refused(ruler.post("/predict", files={"picture": ("a.png", b"x")}), 400, "no file 'image'")
    assert_refused(ruler.post("/predict", json={"image": "x"}), 415, "application/json", "multipart/form-data")
    assert_refused(ruler.post("/predict", data={"image": "x"}), 415)
    two = [("image", ("a.png", encoded(noise()))), ("image", ("b.png", encoded(noise())))]
    assert_refused(ruler.post("/predict", files=two), 400)
    form = {"Content-Type": "multipart/form-data"}
    assert_refused(ruler.post("/predict", content=b"--x", headers=form), 400)
    assert_refused(
        ruler.post("/predict", content=b"?", headers={"Content-Type": "multipart/form-data; boundary=x"}), 400
    )
    for charset in ("utf-7", "punycode", "idna", "unicode_escape", "utf-16", "rot13", "no-such"):
        content = b'--x\r\nContent-Disposition: form-data; name="+2AA-"\r\n\r\n\\ud800\r\n--x--\r\n'
        headers = {"Content-Type": f"multipart/form-data; charset={charset}; boundary=x"}
        assert_refused(ruler.post("/predict", content=content, headers=headers), 415)
    assert_refused(ruler.get("/predict"), 405)
    assert_refused(ruler.get("/nothing"), 404)
    assert post(ruler).status_code == 200


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, data: bytes = b"", *, extra: bytes = b"") -> bytes:
    """A PNG file of these header values, whatever its data is."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_too_large(ruler: TestClient) -> None:
    assert_refused(post(ruler, b"x" * 200_001), 413, "0.2 MB")

    def chunks() -> Iterator[bytes]:
        yield from [b"x" * 50_000] * 5

    # Of unknown length: it is counted while it comes.
    assert_refused(ruler.post("/predict", content=chunks(), headers={"Content-Type": "image/png"}), 413, "0.2 MB")
    assert_refused(post(ruler, encoded(np.zeros((250, 401, 3), np.uint8))), 413, "401 x 250", "0.1 million")
    assert post(ruler, encoded(np.zeros((250, 400, 3), np.uint8))).status_code == 200
    assert_refused(post(ruler, png(30_000, 30_000)), 413)  # above Pillow's own limit
    assert_refused(post(ruler, png(2**31 - 1, 2**31 - 1)), 413)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_a_small_file_of_much_is_not_unpacked() -> None:
    """What the header does not announce takes no memory, whether it is pixels or text."""
    code = """if True:
        import re, struct, sys
        from pathlib import Path
        from detector.errors import InputError
        from detector.apps.serve.upload import decode

        def peak_kilobytes():
            return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

        for _ in range(int(sys.argv[1])):
            data = sys.stdin.buffer.read(*struct.unpack("<I", sys.stdin.buffer.read(4)))
            before = peak_kilobytes()
            try:
                decode(data, 10**9)
            except InputError:
                pass
            print((peak_kilobytes() - before) / 1000)
    """
    bomb, small = zlib.compress(bytes(100_000_000), 9), zlib.compress(bytes(25 * 8))
    assert len(bomb) < 200_000
    files = [
        png(8, 8, small),  # pays for what Pillow loads
        png(8, 8, bomb),
        png(8, 8, small, extra=chunk(b"zTXt", b"a\0\0" + bomb)),
        encoded(np.zeros((5000, 6600, 3), np.uint8)),  # 99 MB, as its header says
    ]
    result = subprocess.run(
        [sys.executable, "-c", code, str(len(files))],
        input=b"".join(struct.pack("<I", len(file)) + file for file in files),
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    _, pixels, text, announced = map(float, result.stdout.split())
    assert max(pixels, text) < 30
    assert announced > 90  # the measure sees what is unpacked


# Of a form that breaks off inside its file, Starlette leaves the temporary file to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning")
def test_any_bytes_are_answered(ruler: TestClient) -> None:
    """200 or 4xx for random bytes, truncated and altered images and forms: never an error of the server."""
    rng = np.random.default_rng(0)
    good = {kind: encoded(noise(24, 32), kind) for kind in ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")}
    samples = [rng.bytes(int(n)) for n in rng.integers(0, 400, 40)]
    for data in good.values():
        samples += [data[: int(n)] for n in rng.integers(0, len(data), 8)]
        for _ in range(25):
            changed = bytearray(data)
            for place in rng.integers(0, min(len(data), 300), 4):
                changed[place] = rng.integers(256)
            samples.append(bytes(changed))
    samples += [
        b"PK\x03\x04" + rng.bytes(200),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"<svg/>",
        b"\0" * 999,
    ]
    statuses = {post(ruler, data).status_code for data in samples}
    assert statuses <= {200, 413, 422}
    assert {200, 422} <= statuses

    body = ruler.build_request("POST", "/predict", files={"image": ("a.png", good["PNG"])}, data={"classes": "odd"})
    content, kind = body.read(), body.headers["content-type"]
    for _ in range(150):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), 6):
            changed[place] = rng.integers(256)
        cut = int(rng.integers(0, len(content) + 1)) if rng.random() < 0.3 else len(content)
        response = ruler.post("/predict", content=bytes(changed[:cut]), headers={"Content-Type": kind})
        assert response.status_code in (200, 400, 413, 422), response.text
    for name in (b"\xff\xfe", b"\xed\xa0\x80", b"\0", b"a" * 5000, b'"; x="'):
        content = b'--x\r\nContent-Disposition: form-data; name="image"; filename="' + name + b'"\r\n\r\nx\r\n--x--\r\n'
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        assert ruler.post("/predict", content=content, headers=headers).status_code in (400, 422)
        content = content.replace(b"filename", b"nothing").replace(b'"image"', b'"' + name + b'"')
        assert ruler.post("/predict", content=content, headers=headers).status_code in (400, 422)
    assert post(ruler).status_code == 200
    gc.collect()


@pytest.mark.parametrize("kind", [RuntimeError, InputError])  # the latter: of the detector's own file
def test_an_error_of_ours_is_logged_and_not_told(kind: type[Exception]) -> None:
    with client_of(BrokenRuler(kind("secret of /home"))) as client:
        for _ in range(LIMITS.queue + 2):  # and no place is lost
            response = post(client)
            assert_refused(response, 500)
            assert "secret" not in response.text
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]


# ---- whom it answers, and what a browser may do


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[", "localhost.evil"]
)
def test_on_the_loopback_other_names_are_refused(ruler: TestClient, host: str) -> None:
    assert_refused(ruler.get("/info", headers={"Host": host}), 421, "does not answer to")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:9"])
def test_names_of_the_loopback(ruler: TestClient, host: str) -> None:
    assert ruler.get("/info", headers={"Host": host}).status_code == 200


def test_on_a_network_any_name_is_answered() -> None:
    with client_of(Ruler(), host="0.0.0.0") as client:
        assert client.get("/info", headers={"Host": "detector.example"}).status_code == 200


def test_loopback_addresses() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.7", "example.org", "")] == [False] * 5


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:9999", "http://["])
def test_pages_of_other_sites_are_refused(ruler: TestClient, origin: str) -> None:
    assert_refused(ruler.post("/predict", content=b"", headers={"Origin": origin}), 403)
    assert "access-control-allow-origin" not in ruler.get("/info").headers
    own = ruler.post("/predict", content=encoded(noise()), headers={"Origin": LOOPBACK, "Content-Type": "image/png"})
    assert own.status_code == 200


@pytest.mark.parametrize("path", ["/", "/info", "/nothing"])
def test_headers(ruler: TestClient, path: str) -> None:
    headers = ruler.get(path).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2


def test_the_page_is_one_file_that_never_makes_markup_of_text(ruler: TestClient) -> None:
    page = ruler.get("/").text
    assert page.startswith("<!doctype html>")
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "https://", "@import"):
        assert word not in page, word
    assert "style=" not in page.replace("stroke=", "")
    # The addresses in it are names of XML vocabularies, not places.
    assert page.count("http://") == page.count("http://www.w3.org/2000/svg")


# ---- more requests than it can take


def in_background(work: Callable[[], Any], count: int) -> list[Any]:
    pool = ThreadPoolExecutor(count)
    futures = [pool.submit(work) for _ in range(count)]
    pool.shutdown(wait=False)
    return futures


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_full_queue_is_told_to_come_back() -> None:
    block = threading.Event()
    app, arrived = build_app(Ruler(block), ServerOptions(limits=LIMITS)), []

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        async def noted() -> Any:
            message = await receive()
            arrived.append(message["type"])
            return message

        await app(scope, noted, send)

    with TestClient(counted, base_url=LOOPBACK) as client:
        waiting = in_background(lambda: post(client), LIMITS.queue)
        wait_until(lambda: arrived.count("http.request") == LIMITS.queue)
        begun = time.monotonic()
        for _ in range(20):
            response = post(client, b"?")
            assert_refused(response, 503, "full")
            assert int(response.headers["Retry-After"]) >= 1
        assert client.get("/health").status_code == 200
        assert time.monotonic() - begun < 5
        block.set()
        assert [future.result(10).status_code for future in waiting] == [200] * LIMITS.queue
        assert post(client).status_code == 200


def test_a_wait_has_an_end_and_what_was_given_up_is_not_done() -> None:
    block = threading.Event()
    predictor = Ruler(block)
    with client_of(predictor, Limits(queue=3, timeout=0.3)) as client:
        answers = [future.result(10) for future in in_background(lambda: post(client), 3)]
        for response in answers:
            assert_refused(response, 503, "No answer within 0.3 s")
        # The one that has the network keeps its place until it has ended; the two others' are free.
        more = [future.result(10).status_code for future in in_background(lambda: post(client), 2)]
        assert more == [503, 503]
        block.set()
        wait_until(lambda: predictor.running == 0)
        assert post(client).status_code == 200
        assert predictor.calls == 2


# ---- connections


@contextmanager
def listening(limits: Limits) -> Iterator[int]:
    """A server on a real socket, in a thread; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as thread:
        server = server_of(build_app(Ruler(), ServerOptions(limits=limits)), limits)
        ended = thread.submit(server.run, [listener])
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            ended.result(10)


def seconds_until_closed(port: int, pieces: Iterator[bytes]) -> float:
    """How long a connection lasts on which these pieces are sent, 0.05 seconds apart, and the answers are read."""
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=0.05) as client:
        while time.monotonic() - begun < 5:
            try:
                client.sendall(next(pieces, b""))
                if not client.recv(10_000):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
    return time.monotonic() - begun


def slow_headers() -> Iterator[bytes]:
    yield b"GET /info HTTP/1.1\r\nHost: localhost\r\n"
    while True:
        yield b"X: x\r\n"


def slow_headers_of_a_second_request() -> Iterator[bytes]:
    yield b"GET /info HTTP/1.1\r\nHost: localhost\r\n\r\n"
    yield from slow_headers()


def slow_body_that_no_route_reads() -> Iterator[bytes]:
    yield b"GET /info HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
    while True:
        yield b"x"


@pytest.mark.parametrize(
    "pieces",
    [lambda: iter([]), slow_headers, slow_headers_of_a_second_request, slow_body_that_no_route_reads],
    ids=["silent", "slow headers", "second request", "slow body"],
)
def test_a_connection_that_does_not_get_on_is_closed(pieces: Callable[[], Iterator[bytes]]) -> None:
    with listening(Limits(timeout=0.4)) as port:
        assert 0.3 < seconds_until_closed(port, pieces()) < 2


@pytest.mark.slow
def test_a_client_that_does_not_read_its_answers_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MARGIN", 0.1)
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with listening(Limits(timeout=0.3)) as port, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 10_000)
        client.settimeout(5)
        client.connect(("127.0.0.1", port))
        # Neither side's buffers take more at some time: without an end, a TimeoutError.
        with pytest.raises(ConnectionError):
            client.sendall(request * 1_000_000)


@pytest.mark.slow
def test_requests_on_one_connection_may_take_longer_than_one_timeout() -> None:
    with listening(Limits(timeout=0.4)) as port:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        client.auto_open = 0  # or it would hide that the server has closed
        client.connect()
        for _ in range(6):
            client.request("GET", "/health")
            assert client.getresponse().read() == b'{"status":"ok"}'
            time.sleep(0.15)
        client.close()


def test_connections_above_the_bound_are_refused_and_the_others_served() -> None:
    limits = Limits(queue=2, connections=3)
    with listening(limits) as port, ExitStack() as stack:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        stack.callback(client.close)
        client.connect()
        silent = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(2)]
        for one in silent:
            stack.callback(one.close)
        for _ in range(5):
            refused = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            refused.request("GET", "/health")
            response = refused.getresponse()
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
            assert list(json.loads(response.read())) == ["error"]
            refused.close()
            client.request("POST", "/predict", encoded(noise()), {"Content-Type": "image/png"})
            answer = client.getresponse()
            assert (answer.status, len(json.loads(answer.read())["scores"])) == (200, 7)
        silent[0].close()  # and its place is free
        wait_until(lambda: status_of_health(port) == 200)


def status_of_health(port: int) -> int:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    client.request("GET", "/health")
    status = client.getresponse().status
    client.close()
    return status


# ---- settings


def test_the_server_needs_no_torch() -> None:
    code = "import detector.apps.serve.app, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "python_multipart"])
def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in [name for name in sys.modules if name.startswith("detector.apps.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # of this process
    with pytest.raises(InputError, match=rf"{package}.* is not installed.*light-head-detector\[serve\]"):
        serve(ServeOptions(ckpt="best.ckpt"))


def test_sigterm_ends_the_tool_while_the_detector_loads() -> None:
    """With the exit code that the signal's default would give, and not by the default: process 1 has none."""
    code = """if True:
        import signal, sys
        from detector.apps.serve import ServeOptions, serve
        from detector.inference import loading

        loading.load = lambda *_, **__: [signal.raise_signal(signal.SIGTERM), sys.exit("went on")]
        serve(ServeOptions(ckpt="best.ckpt"))
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    assert (result.returncode, result.stderr) == (143, b"")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_upload_mb": 0}, "max_upload_mb=0: expected a number above 0"),
        ({"max_upload_mb": float("nan")}, "max_upload_mb=NaN"),
        ({"max_megapixels": 1000}, "max_megapixels=1000: expected at most 89.4785"),
        ({"queue": 0}, "queue=0: expected a whole number, 1 or more"),
        ({"queue": 2.5}, "queue=2.5"),
        ({"timeout": "soon"}, "timeout=soon"),
        ({"connections": 15}, "connections=15: expected a whole number, 16 "),  # the default of queue
        ({"connections": True}, "connections=true"),
    ],
)
def test_limits_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Limits.parse(settings)


def test_settings_of_the_server_that_cannot_be(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(InputError, match="score_threshold=2"):
        ServerOptions.parse({"score_threshold": 2})
    with pytest.raises(InputError, match="port=70000: expected a whole number from 0 to 65535"):
        ServerOptions.parse({"port": 70_000})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"Cannot listen on 127.0.0.1, port {port}: .*port=0"):
            run(Ruler(), ServerOptions(port=port))
    assert caplog.text == ""


def test_half_a_surrogate_pair_in_a_class_name() -> None:
    class Odd(Ruler):
        class_names = ("a\ud800", "even")

    with client_of(Odd()) as client:
        assert client.get("/info").json()["class_names"] == ["a\ud800", "even"]
        assert client.get("/schema").status_code == 200
        assert post(client).json()["names"][0] == "a\ud800"
        assert post(client, query="?classes=even").json()["names"] == ["even"] * 3
        assert_refused(post(client, query="?classes=cow"), 422, "a\ud800, even")


def test_no_room_for_an_upload(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A form above 1 MB lies in the folder for temporary files, which may be full: the server's fault, and logged."""

    async def write(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("starlette.datastructures.UploadFile.write", write)
    with client_of(Ruler()) as client:
        for _ in range(LIMITS.queue + 2):
            assert_refused(post(client), 503, "no room for the upload")
        assert "No space left on device" in caplog.text


def test_each_class_is_shown_from_its_own_score_on() -> None:
    predictor = Ruler()
    predictor.thresholds = (0.65, 0.35)  # odd ones have 0.9, 0.7, 0.5, 0.3, even ones 0.8, 0.6, 0.4, 0.2
    with client_of(predictor) as client:
        about = client.get("/info").json()["options"]["score_threshold"]
        assert about == {"minimum": 0, "maximum": 1, "default": 0.5, "by_class": [0.65, 0.35]}
        answer = post(client).json()
        assert answer["scores"] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.4])
        assert answer["options"]["score_threshold"] == "auto"
    with client_of(predictor, score_threshold={"odd": 0.85}) as client:
        assert post(client).json()["scores"] == pytest.approx([0.9, 0.8, 0.6, 0.4])
    with pytest.raises(InputError, match="there is no 'cow'"):
        client_of(predictor, score_threshold={"cow": 0.5})


def test_a_name_of_a_proxy_is_answered_to_and_no_other() -> None:
    guard = Guard(PlainTextResponse("ok"), "127.0.0.1", "default-src 'self'", ["Demo.example.org"])
    client = TestClient(guard, base_url="http://demo.example.org")
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"Host": "other.example.org"}).status_code == 421
    # A proxy that keeps the Host of its client, and one that puts its own there.
    for host in ("demo.example.org", "127.0.0.1:8000"):
        own = {"Host": host, "Origin": "https://demo.example.org"}
        assert client.post("/", headers=own).status_code == 200
        assert client.post("/", headers=own | {"Origin": "https://evil.example.org"}).status_code == 403
