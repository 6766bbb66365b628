"""The server as a user starts it: under load, told to stop, and in a browser. All of it on 127.0.0.1."""

from __future__ import annotations

import http.client
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tool_runner import ROOT, run_tool, tool_environment
from torch import nn

from detector.data.preprocess import Preprocessing
from detector.inference.detector import Detector
from detector.models.build import NetworkOptions

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

pytestmark = pytest.mark.slow

# A class may be called anything; in the page it is text.
NAMES = ("cat", "<img src=x onerror=\"document.title='run'\">", "bird")


@pytest.fixture
def checkpoint(tmp_path: Path, small_spec: dict[str, Any], excite: Callable[[nn.Module], nn.Module]) -> Path:
    torch.manual_seed(0)
    detector = Detector(NetworkOptions.parse(small_spec), NAMES, Preprocessing(short_side=64, long_side=96))
    excite(detector.network)
    detector.save(tmp_path / "best.ckpt")
    return tmp_path / "best.ckpt"


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, data: Any, query: str = "", **headers: str) -> tuple[int, dict[str, Any], Any]:
        """Status, answer and headers of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("POST", f"/predict{query}", data, {"Content-Type": "image/png", **headers})
            response = connection.getresponse()
            return response.status, json.loads(response.read()), response.headers
        finally:
            connection.close()

    def begin_upload(self, size: int, data: bytes) -> socket.socket:
        """A request that announces `size` bytes and sends some."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {size}\r\n\r\n"
        connection.sendall(head.encode() + data)
        return connection

    def resident_megabytes(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]

    def stop(self, number: signal.Signals, within: float = 15) -> str:
        """Tell it to stop; returns its log, which has no traceback."""
        self.process.send_signal(number)
        assert self.process.wait(within) == 0
        assert self.process.stderr is not None
        rest = self.process.stderr.read()
        assert "Traceback" not in rest, rest
        return rest


@contextmanager
def serving(checkpoint: Path, *overrides: str) -> Iterator[Server]:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools/serve.py"), f"ckpt={checkpoint}", "port=0", "device=cpu", *overrides],
        cwd=checkpoint.parent, env=tool_environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"http://\S+:(\d+)", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        yield Server(process, int(found[1]))
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def picture(seed: int, height: int = 360, width: int = 480) -> bytes:
    """A PNG of coarse colours under fine noise, which keeps the file as large as its pixels."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height))
    noisy = np.asarray(coarse, np.int16) + rng.integers(-12, 12, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "PNG", compress_level=1)
    return file.getvalue()


# ---- load


def test_two_hundred_requests_of_eight_clients(checkpoint: Path, record_property: Callable[[str, Any], None]) -> None:
    pictures = [picture(seed) for seed in range(10)]
    detector = Detector.load(checkpoint, "cpu")
    expected = [detector.predict(data, score_threshold=0.1)[0] for data in pictures]
    assert min(map(len, expected)) > 3

    def ask(index: int) -> float:
        begun = time.perf_counter()
        status, answer, _ = server.post(pictures[index % 10], "?score_threshold=0.1")
        seconds = time.perf_counter() - begun
        assert status == 200, answer
        wanted = expected[index % 10]
        np.testing.assert_allclose(answer["boxes"], wanted.boxes, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(answer["scores"], wanted.scores, rtol=1e-4)
        assert answer["labels"] == wanted.labels.tolist()
        assert (answer["height"], answer["width"]) == (360, 480)
        return seconds

    with serving(checkpoint) as server, ThreadPoolExecutor(8) as clients:
        list(clients.map(ask, range(80)))  # until the allocators have what they want
        before = server.resident_megabytes()
        begun = time.perf_counter()
        seconds = sorted(clients.map(ask, range(200)))
        rate = 200 / (time.perf_counter() - begun)
        after = server.resident_megabytes()
    assert len(seconds) == 200
    figures = f"{rate:.0f} requests/s, p50 {1e3 * seconds[99]:.0f} ms, p99 {1e3 * seconds[197]:.0f} ms, "
    record_property("figures", figures + f"RSS {before:.0f} -> {after:.0f} MB")
    print(figures, f"RSS {before:.1f} -> {after:.1f} MB")
    # Keeping the upload, or the decoded image, of each request would take 200 times this.
    kept = min(len(pictures[0]), 360 * 480 * 3) / 2**20
    assert after - before < 0.15 * 200 * kept


def test_a_full_queue_answers_at_once(checkpoint: Path) -> None:
    data = picture(0)
    with serving(checkpoint, "limits.queue=2", "limits.timeout=20") as server:
        uploads = [server.begin_upload(len(data), data[:1000]) for _ in range(2)]
        begun = time.monotonic()
        while (reply := server.post(data))[0] == 200:  # until both uploads have come in
            assert time.monotonic() - begun < 5
        status, answer, headers = reply
        assert (status, list(answer)) == (503, ["error"])
        assert "queue of 2" in answer["error"]
        assert headers["Retry-After"] == "1"
        assert time.monotonic() - begun < 5
        for upload in uploads:
            upload.sendall(data[1000:])
        for upload in uploads:
            assert upload.recv(100).startswith(b"HTTP/1.1 200 ")
            upload.close()
        assert server.post(data)[0] == 200


def test_a_client_that_sends_too_much_is_told_why(checkpoint: Path) -> None:
    with serving(checkpoint, "limits.max_upload_mb=1", "limits.timeout=1") as server:
        for _ in range(3):
            status, answer, _ = server.post(bytes(1_900_000))
            assert (status, answer["error"]) == (413, "The upload is larger than 1 MB.")
            # Without a Content-Length: chunks.
            status, answer, _ = server.post(iter([bytes(100_000)] * 19))
            assert (status, answer["error"]) == (413, "The upload is larger than 1 MB.")
        slow = server.begin_upload(5000, b"x")
        assert b"408" in slow.recv(100)
        slow.close()
        server.begin_upload(5000, b"x").close()  # gives up
        broken = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        broken.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
        assert broken.recv(100).startswith(b"HTTP/1.1 400 ")
        broken.close()
        assert server.post(picture(0))[0] == 200
        server.stop(signal.SIGTERM)


# ---- the end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_when_its_requests_are_answered(checkpoint: Path, number: signal.Signals) -> None:
    data = picture(0, 750, 1000)
    with serving(checkpoint) as server, ThreadPoolExecutor(6) as clients:
        idle = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        idle.request("GET", "/health")
        assert idle.getresponse().read() == b'{"status":"ok"}'
        # All of each upload but its last byte is here when the signal comes; the last comes after it.
        uploads = [server.begin_upload(len(data), b"") for _ in range(6)]
        list(clients.map(lambda upload: upload.sendall(data[:-1]), uploads))
        time.sleep(0.3)
        server.process.send_signal(number)
        time.sleep(0.3)
        for upload in uploads:
            upload.sendall(data[-1:])
        assert [upload.recv(12) for upload in uploads] == [b"HTTP/1.1 200"] * 6
        assert server.process.wait(15) == 0
        assert server.process.stderr is not None
        assert server.process.stderr.read().strip() == "stopped"
        for connection in uploads:
            connection.close()
        idle.close()


def test_an_upload_that_stalls_does_not_keep_it(checkpoint: Path) -> None:
    with serving(checkpoint) as server:
        upload = server.begin_upload(5000, b"x")
        time.sleep(0.3)
        assert "stopped" in server.stop(signal.SIGTERM, within=15)
        assert upload.recv(100).startswith(b"HTTP/1.1 503 ")
        upload.close()


# ---- the command line


def test_what_a_user_gets_wrong(checkpoint: Path) -> None:
    def error(*overrides: str) -> str:
        return run_tool("serve", f"ckpt={checkpoint}", *overrides, cwd=checkpoint.parent).error()

    assert "port=http: expected a whole number from 0 to 65535" in error("port=http")
    assert "Cannot listen on 192.0.2.1" in error("host=192.0.2.1")
    assert "queue=0: expected a whole number, 1 or more" in error("limits.queue=0")
    assert "score_threshold=2: expected a number from 0 to 1" in error("score_threshold=2")
    assert "limits.que is not a key of this command; did you mean limits.queue" in error("limits.que=3")
    assert "No checkpoint at 'none.ckpt'" in run_tool("serve", "ckpt=none.ckpt", cwd=checkpoint.parent).error()


def test_another_host_is_warned_of(checkpoint: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools/serve.py"), f"ckpt={checkpoint}", "port=0", "device=cpu", "host=0.0.0.0"],
        cwd=checkpoint.parent, env=tool_environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert "everyone who can reach this machine" in process.stderr.readline()
    assert "http://localhost:" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(15) == 0
    process.stderr.close()


# ---- a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


@dataclass
class Visit:
    """A page of the running server, and what was noticed about it."""

    page: Any
    troubles: list[str]
    asked: list[Any]

    def upload(self, *, name: str = "street.png", data: bytes) -> dict[str, Any]:
        with self.page.expect_response("**/predict") as response:
            self.page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": data})
        answer: dict[str, Any] = response.value.json()
        return answer

    def boxes(self) -> int:
        count: int = self.page.locator("#overlay g.box").count()
        return count

    def shows(self, *, boxes: int, rows: int | None = None) -> None:
        """Wait until it does. Not with wait_for_function: that evaluates text, which the page's policy forbids."""
        from playwright.sync_api import expect

        expect(self.page.locator("#overlay g.box")).to_have_count(boxes)
        if rows is not None:
            expect(self.page.locator("#history tbody tr")).to_have_count(rows)


@pytest.fixture(scope="module")
def until_the_end() -> Iterator[tuple[ExitStack, list[Server]]]:
    """What the tests of this file share: a stack that is closed after them, and the server once it has started."""
    with ExitStack() as stack:
        yield stack, []


@pytest.fixture
def server(checkpoint: Path, until_the_end: tuple[ExitStack, list[Server]]) -> Server:
    """One for all tests that only ask; starting one takes seconds."""
    stack, started = until_the_end
    if not started:
        started.append(stack.enter_context(serving(checkpoint)))
    return started[0]


@pytest.fixture
def visit(server: Server) -> Iterator[Callable[..., Visit]]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    visits: list[Visit] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))

        def go(**settings: Any) -> Visit:
            page = browser.new_context(**settings).new_page()
            visit = Visit(page, [], [])
            page.on("console", lambda message: message.type == "error" and visit.troubles.append(message.text))
            page.on("pageerror", lambda error: visit.troubles.append(str(error)))
            page.on("request", lambda request: visit.asked.append(request))
            page.goto(server.address)
            page.wait_for_selector("#budget-part:not([hidden])")
            visits.append(visit)
            return visit

        yield go
        browser.close()
        for visit in visits:
            assert visit.troubles == []
            urls = [request.url for request in visit.asked]
            assert [
                url for url in urls if not url.startswith((server.address, f"blob:{server.address}", "data:"))
            ] == []


def above(answer: dict[str, Any], threshold: float) -> int:
    return sum(score >= threshold for score in answer["scores"])


def predictions(visit: Visit) -> int:
    return sum(request.url.endswith("/predict") for request in visit.asked)


def test_boxes_threshold_and_classes(visit: Callable[..., Visit]) -> None:
    here = visit(viewport={"width": 1200, "height": 900})
    page = here.page
    assert page.input_value("#threshold") == "0.3"
    answer = here.upload(data=picture(0))
    assert len(answer["scores"]) > above(answer, 0.3) > above(answer, 0.9) > 0
    here.shows(boxes=above(answer, 0.3))
    assert page.inner_text("#status").startswith(f"{above(answer, 0.3)} objects")
    assert page.locator("#found tbody tr").count() == above(answer, 0.3)

    # The best box is drawn last; on the screen it is where the image has it.
    image_box = page.locator("#picture").bounding_box()
    frame = page.locator("#overlay rect.frame").last.evaluate(
        "r => { const { x, y, width, height } = r.getBoundingClientRect(); return [x, y, width, height]; }"
    )
    scale = image_box["width"] / answer["width"]
    x1, y1, x2, y2 = answer["boxes"][0]
    expected = [image_box["x"] + x1 * scale, image_box["y"] + y1 * scale, (x2 - x1) * scale, (y2 - y1) * scale]
    assert frame == pytest.approx(expected, abs=4)  # its line is 2.5 pixels wide

    requests = predictions(here)
    for threshold in (0.9, 0.5, 0.0, 1.0):
        page.fill("#threshold", str(threshold))
        assert here.boxes() == above(answer, threshold)
    page.fill("#threshold", "0")
    for label in set(answer["labels"]):
        page.get_by_role("button", name="None", exact=True).click()
        assert here.boxes() == 0
        row = page.locator("#classes label", has_text=NAMES[label])
        row.locator("input").check()
        assert here.boxes() == answer["labels"].count(label)
    page.get_by_role("button", name="All", exact=True).click()
    assert here.boxes() == len(answer["scores"])
    assert predictions(here) == requests == 1  # all of that without the server

    # A class's name is text, wherever it is shown.
    assert 1 in answer["labels"]
    assert page.title() == "Light-head detector"
    assert page.locator("img").count() == 1
    assert NAMES[1] in page.inner_text("#classes")
    assert NAMES[1] in page.inner_text("#found")

    page.fill("#threshold", "0.5")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "street.json"
    saved = json.loads(Path(download.value.path()).read_text())
    assert saved["scores"] == [score for score in answer["scores"] if score >= 0.5]
    assert len(saved["boxes"]) == len(saved["names"]) == above(answer, 0.5)


def test_the_budget_asks_again_and_makes_history(visit: Callable[..., Visit]) -> None:
    here = visit(viewport={"width": 1200, "height": 900})
    page = here.page
    first = here.upload(data=picture(0))
    assert first["options"]["max_proposals"] == 20  # of small_spec
    here.shows(boxes=above(first, 0.3), rows=1)
    page.focus("#budget")
    with page.expect_response("**/predict") as response:
        for _ in range(4):  # from 20 to 10, 5, 3, 2: one request for all
            page.keyboard.press("ArrowLeft")
    answer = response.value.json()
    assert answer["options"]["max_proposals"] == 2
    assert 0 < above(answer, 0.3) < above(first, 0.3)
    here.shows(boxes=above(answer, 0.3), rows=2)
    assert predictions(here) == 2
    cells = page.locator("#history tbody tr").first.locator("td").all_inner_texts()
    assert (cells[0], cells[3]) == ("2", str(above(answer, 0.3)))
    assert float(cells[1]) == pytest.approx(answer["milliseconds"]["inference"], abs=0.51)
    assert page.locator("#chart circle").count() == 2

    page.click("#sweep")
    here.shows(boxes=above(first, 0.3), rows=8)  # 1, 2, 3, 5, 10, 20
    assert page.inner_text("#budget-value") == "20"


def test_other_ways_in_and_a_refusal(visit: Callable[..., Visit]) -> None:
    here = visit(viewport={"width": 900, "height": 700})
    page = here.page
    hand_over = """([type, bytes]) => {
        const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
        const event = type === "paste" ? new ClipboardEvent(type, { clipboardData: files, bubbles: true })
                                       : new DragEvent(type, { dataTransfer: files, bubbles: true, cancelable: true });
        document.body.dispatchEvent(event);
    }"""
    for way in ("drop", "paste"):
        with page.expect_response("**/predict") as response:
            page.evaluate(hand_over, [way, list(picture(1, 60, 80))])
        assert response.value.status == 200
    # A failed request, and an image that the browser cannot show, are messages of the browser's own console.
    with page.expect_response("**/predict") as response:
        page.set_input_files("#file", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"<b>no picture</b>"})
    assert response.value.status == 422
    page.wait_for_selector("#error:has-text('Not an image')")
    assert here.boxes() == 0
    assert [text for text in here.troubles if "422" not in text] == []
    here.troubles.clear()
    assert here.upload(data=picture(2))["scores"]
    page.wait_for_selector("#error", state="hidden")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(visit: Callable[..., Visit], scheme: str) -> None:
    here = visit(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True, is_mobile=True)
    page = here.page

    def overflow() -> float:
        return float(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    assert overflow() == 0
    assert page.get_by_text("Use the camera").is_visible()
    assert page.get_attribute("#camera", "capture") == "environment"
    answer = here.upload(data=picture(0))
    here.shows(boxes=above(answer, 0.3))
    assert overflow() == 0
    ground, text = (
        page.evaluate(f"getComputedStyle(document.body).{name}.match(/\\d+/g).slice(0, 3).map(Number)")
        for name in ("backgroundColor", "color")
    )
    assert (np.mean(ground) > np.mean(text)) == (scheme == "light")


def test_keyboard_alone(visit: Callable[..., Visit]) -> None:
    here = visit(viewport={"width": 1200, "height": 900})
    here.upload(data=picture(0))
    here.page.wait_for_selector("#history-card:not([hidden])")
    here.page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(20):
        here.page.keyboard.press("Tab")
        reached.append(here.page.evaluate("document.activeElement.id"))
    wanted = ["file", "threshold", "budget", "all", "none", "sweep", "download"]
    assert [name for name in reached if name in wanted][: len(wanted)] == wanted
