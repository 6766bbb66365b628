"""Videos: frames of known colours, written by PyAV in the test, come back in order, turned, with their times."""

from __future__ import annotations

import base64
import io
import socket
import socketserver
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detector.errors import InputError
from detector.inference import video
from detector.inference.video import count_frames, read_camera, read_comment, read_stream, read_video, write_video

av = pytest.importorskip("av")

COUNT, RATE = 12, 10


def colour(index: int) -> tuple[int, int, int]:
    """Far apart from frame to frame; grey levels would do, but not show swapped channels."""
    return (20 * index, 255 - 20 * index, 255 * (index % 2))


def make_video(path: Path, count: int = COUNT, codec: str = "mpeg4", pixels: str = "yuv420p", **options: str) -> Path:
    """Frames of 64 x 48 in colour(index), the top left quarter white."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=Fraction(RATE))
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, pixels, 2_000_000
        stream.gop_size = 4
        for index in range(count):
            image = np.full((48, 64, 3), colour(index), np.uint8)
            image[:24, :32] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def seen(image: np.ndarray) -> list[float]:
    """The colour of the bottom right quarter."""
    return image[30:, 40:].reshape(-1, 3).mean(axis=0).tolist()


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv", "mov"])
def test_every_frame_in_order(tmp_path: Path, suffix: str) -> None:
    path = make_video(tmp_path / f"a.{suffix}")
    frames = list(read_video(path))
    assert [frame.index for frame in frames] == list(range(COUNT))
    np.testing.assert_allclose([frame.time for frame in frames], np.arange(COUNT) / RATE, atol=2e-3)
    for frame in frames:
        assert frame.image.shape == (48, 64, 3)
        assert frame.image.dtype == np.uint8
        assert frame.image.flags.c_contiguous
        np.testing.assert_allclose(seen(frame.image), colour(frame.index), atol=12)
        np.testing.assert_allclose(frame.image[4:20, 4:28].mean(axis=(0, 1)), 255, atol=12)
        assert frame.rate == RATE
    assert count_frames(path) == COUNT
    assert [frame.index for frame in read_video(io.BytesIO(path.read_bytes()))] == list(range(COUNT))


def test_a_name_that_looks_like_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorder calls its files after the time; in their own folder they are read, and written, by their names."""
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "a.mp4").rename("10:30.mp4")
    assert [frame.index for frame in read_video("10:30.mp4")] == list(range(COUNT))
    assert count_frames("10:30.mp4") == COUNT
    with write_video("10:31.mp4", rate=RATE) as add:
        add(np.zeros((48, 64, 3), np.uint8))
    assert count_frames("10:31.mp4") == 1


@pytest.mark.parametrize(("every", "expected"), [(5, [0, 5, 10]), (12, [0]), (11, [0, 11])])
def test_each_nth_frame(tmp_path: Path, every: int, expected: list[int]) -> None:
    path = make_video(tmp_path / "a.mp4")
    frames = list(read_video(path, every=every))
    assert [frame.index for frame in frames] == expected
    assert [round(frame.time * RATE) for frame in frames] == expected
    np.testing.assert_allclose([seen(frame.image) for frame in frames], [colour(i) for i in expected], atol=12)
    assert {frame.rate for frame in frames} == {RATE / every}
    assert count_frames(path, every=every) == len(expected)


# The matrix of a track header turns the image clockwise for the viewer; QuickTime File Format, "Matrices".
TURNS: dict[int, tuple[int, ...]] = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


@pytest.mark.parametrize("degrees", TURNS)
def test_the_rotation_of_the_file_is_honoured(tmp_path: Path, degrees: int) -> None:
    """The white quarter, top left as stored, is top right after a quarter turn clockwise, and so on."""
    path = make_video(tmp_path / "a.mp4", 2)
    content = bytearray(path.read_bytes())
    a, b, c, d = (value * 0x10000 for value in TURNS[degrees])
    place = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # version and flags, times and ids, reserved, layer ... volume
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    path.write_bytes(content)
    image = next(read_video(path)).image
    assert image.shape[:2] == ((48, 64) if degrees == 180 else (64, 48))
    height, width = image.shape[:2]
    corners = {
        90: image[: height // 2, width // 2 :],
        180: image[height // 2 :, width // 2 :],
        270: image[height // 2 :, : width // 2],
    }
    assert {turn: bool(corner[6:-6, 6:-6].min() > 240) for turn, corner in corners.items()} == {
        turn: turn == degrees for turn in corners
    }


def collect(source: Any) -> tuple[list[int], str]:
    """The frames that came before the error, each of its own colour, and what the error says."""
    frames: list[Any] = []
    with pytest.raises(InputError) as error:
        frames.extend(source)
    return check(frames), str(error.value)


def check(frames: list[Any]) -> list[int]:
    for frame in frames:
        np.testing.assert_allclose(seen(frame.image), colour(frame.index), atol=12)
    return [frame.index for frame in frames]


@pytest.mark.parametrize("where", ["between two frames", "inside of one"])
def test_a_file_that_ends_early_gives_what_it_has(tmp_path: Path, where: str) -> None:
    whole = make_video(tmp_path / "whole.mp4", movflags="faststart")
    with av.open(str(whole)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    end = places[7][0] + (0 if where == "between two frames" else places[7][1] // 2)
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:end])
    indices, message = collect(read_video(tmp_path / "cut.mp4"))
    assert indices == list(range(7))
    assert "cut.mp4" in message
    assert "fetch it again" in message
    if where == "between two frames":
        assert "after 0.7 of 1.2 s" in message


def test_damage_in_the_middle_is_told_after_what_is_before_it(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.avi", codec="png", pixels="rgb24")
    content = bytearray(path.read_bytes())
    damaged = [place for place in range(len(content)) if content[place : place + 4] == b"\x89PNG"][7]
    content[damaged : damaged + 40] = bytes(40)
    path.write_bytes(content)
    indices, message = collect(read_video(path))
    assert "a.avi: cannot be decoded after 7 frames" in message
    assert indices == list(range(7))


def sound_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_what_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video " * 200)
    (tmp_path / "folder.mp4").mkdir()
    sound_only(tmp_path / "sound.mp4")
    for name, part in (
        ("missing.mp4", "no such file"), ("m" * 5000 + ".mp4", "no such file"), ("folder.mp4", "is a folder"),
        ("empty.mp4", "not a video"), ("text.mp4", "not a video"), ("sound.mp4", "no images"),
    ):  # fmt: skip
        indices, message = collect(read_video(tmp_path / name))
        assert indices == []
        assert name in message
        assert part in message


def test_a_playlist_in_disguise_opens_nothing(tmp_path: Path) -> None:
    """FFmpeg would follow a list to other files, and an HLS one to other addresses."""
    make_video(tmp_path / "secret.mkv")
    concat = "ffconcat version 1.0\nfile secret.mkv\n"
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.2,\n{tmp_path / 'secret.mkv'}\n#EXT-X-ENDLIST\n"
    for name, text in (("concat.mp4", concat), ("hls.mp4", hls)):
        path = tmp_path / name
        path.write_text(text)
        for source in (path, io.BytesIO(text.encode())):
            indices, message = collect(read_video(source, name="list"))
            assert indices == []
            assert "not a video" in message
    with av.open(str(tmp_path / "concat.mp4")) as container:
        assert container.format.name == "concat"  # it would


def test_one_frame_in_memory_at_a_time_and_an_early_end(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4")
    frames = read_video(path)
    assert next(frames).index == 0
    frames.close()  # type: ignore[attr-defined]
    path.unlink()


def test_a_stream_that_is_not_there() -> None:
    for url in ("rtsp://127.0.0.1:9/live", "rtmp://127.0.0.1:9/live"):
        indices, message = collect(read_stream(url))
        assert indices == []
        assert url in message
        assert "no stream there" in message


class NetworkCamera(socketserver.ThreadingTCPServer):
    """Speaks RTSP (RFC 2326) up to the transport, which it refuses; asks for a name and a password (RFC 7617)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Visit)
        self.requests: list[tuple[str, dict[str, str]]] = []


class Visit(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, NetworkCamera)
        while line := self.rfile.readline().decode().strip():
            headers = dict(header.split(": ", 1) for header in iter(lambda: self.rfile.readline().decode().strip(), ""))
            self.server.requests.append((line, headers))
            status, extra, body = self.answer(line.split()[0], headers)
            lines = [f"RTSP/1.0 {status}", f"CSeq: {headers['CSeq']}", f"Content-Length: {len(body)}", *extra, "", body]
            self.wfile.write("\r\n".join(lines).encode())

    def answer(self, method: str, headers: dict[str, str]) -> tuple[str, list[str], str]:
        if method == "OPTIONS":
            return "200 OK", ["Public: DESCRIBE, SETUP, PLAY"], ""
        if "Authorization" not in headers:
            return "401 Unauthorized", ['WWW-Authenticate: Basic realm="camera"'], ""
        if method == "DESCRIBE":
            lines = [
                "v=0",
                "o=- 0 0 IN IP4 127.0.0.1",
                "s=-",
                "t=0 0",
                "m=video 0 RTP/AVP 96",
                "a=rtpmap:96 H264/90000",
            ]
            return "200 OK", ["Content-Type: application/sdp"], "".join(f"{line}\r\n" for line in lines)
        return "461 Unsupported Transport", [], ""


@pytest.fixture
def network_camera() -> Iterator[NetworkCamera]:
    with NetworkCamera() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("scheme", ["rtsp", "RTSP"])
def test_a_stream_is_asked_for_over_tcp_and_its_password_is_told_to_nobody_else(
    network_camera: NetworkCamera, scheme: str
) -> None:
    place = f"127.0.0.1:{network_camera.server_address[1]}/live"
    address = f"{scheme}://user:secret@{place}"
    with pytest.raises(InputError) as error:
        next(read_stream(address))
    assert f"{scheme}://{place}: no stream there" in str(error.value)
    assert "secret" not in "".join(traceback.format_exception(error.value))
    requests = {line.split()[0]: (line, headers) for line, headers in network_camera.requests}
    assert requests["DESCRIBE"][0] == f"DESCRIBE rtsp://{place} RTSP/1.0"
    assert requests["DESCRIBE"][1]["Authorization"] == f"Basic {base64.b64encode(b'user:secret').decode()}"
    assert requests["SETUP"][1]["Transport"].startswith("RTP/AVP/TCP;")


@pytest.mark.parametrize("scheme", ["rtsp", "RTMP"])
def test_a_stream_that_says_nothing(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    assert video._TIMEOUT == (15, 15)
    monkeypatch.setattr(video, "_TIMEOUT", (0.3, 0.3))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        end = threading.Timer(20, silent.close)  # or the test would hang instead of failing
        end.start()
        started = time.monotonic()
        indices, message = collect(read_stream(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/live"))
        end.cancel()
    assert time.monotonic() - started < 10
    assert indices == []
    assert "no stream there" in message


def test_a_stream_that_breaks_off_keeps_its_password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The stream itself is a file here; its reader fails as PyAV's does, with the whole address in the text."""
    path, real, address = make_video(tmp_path / "a.mp4"), av.open, "rtsp://user:secret@cam/1"

    class Breaking:
        def __init__(self) -> None:
            self.container = real(str(path))
            self.streams = self.container.streams

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            self.container.close()

        def demux(self, stream: Any) -> Iterator[Any]:
            for _, packet in zip(range(3), self.container.demux(stream), strict=False):
                yield packet
            raise av.error.ConnectionResetError(104, "Connection reset by peer", address)

    monkeypatch.setattr(av, "open", lambda *_, **__: Breaking())
    frames: list[Any] = []
    with pytest.raises(InputError, match="rtsp://cam/1: breaks off after 3 frames") as error:
        frames.extend(read_stream(address))
    assert check(frames) == [0, 1, 2]
    assert "secret" not in "".join(traceback.format_exception(error.value))


def test_a_camera_that_is_not_there() -> None:
    indices, message = collect(read_camera("97"))
    assert indices == []
    assert "webcam:97" in message
    assert "no such camera" in message


@pytest.mark.parametrize(
    ("platform", "camera", "file", "system"),
    [
        ("linux", "0", "/dev/video0", "v4l2"),
        ("linux", "/dev/video2", "/dev/video2", "v4l2"),
        ("darwin", "1", "1", "avfoundation"),
        ("darwin", "FaceTime HD Camera", "FaceTime HD Camera", "avfoundation"),
        ("win32", "1", "video=Second", "dshow"),
        ("win32", "Second", "video=Second", "dshow"),
    ],
)
def test_a_camera_as_each_system_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, camera: str, file: str, system: str
) -> None:
    """FFmpeg's documentation of its input devices; the camera itself is a file here."""
    path, opened, real = make_video(tmp_path / "a.mp4", 3), [], av.open

    def fake(name: str, **options: Any) -> Any:
        opened.append((name, options["format"]))
        return real(str(path))

    class Device:
        def __init__(self, name: str) -> None:
            self.name = name

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(av, "open", fake)
    monkeypatch.setattr(av, "enumerate_input_devices", lambda _: [Device("First"), Device("Second")])
    assert [frame.index for frame in read_camera(camera)] == [0, 1, 2]
    assert opened == [(file, system)]


def test_a_system_without_known_cameras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "plan9")
    assert "plan9" in collect(read_camera("0"))[1]


def test_without_pyav(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    actions: list[Callable[[], object]] = [
        lambda: next(read_video(path)),
        lambda: next(read_camera("0")),
        lambda: count_frames(path),
    ]
    for action in actions:
        with pytest.raises(InputError, match=r"pip install 'light-head-detector\[video\]'"):
            action()


@pytest.mark.parametrize("size", [(48, 64), (47, 63), (1, 1)])
def test_what_is_written_is_read_back(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "new" / "out.mp4"
    with write_video(path, 5) as add:
        for index in range(COUNT):
            add(np.full((*size, 3), colour(index), np.uint8))
        assert not path.exists()
    frames = list(read_video(path))
    assert [frame.index for frame in frames] == list(range(COUNT))
    assert frames[0].image.shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    assert frames[0].rate == 5
    assert round(frames[-1].time, 3) == (COUNT - 1) / 5
    for frame in frames:
        np.testing.assert_allclose(frame.image.mean(axis=(0, 1)), colour(frame.index), atol=16)
    assert list(path.parent.iterdir()) == [path]


def test_a_comment(tmp_path: Path) -> None:
    for name, comment in (("a.mp4", "says Büffel"), ("b.mp4", "")):
        with write_video(tmp_path / name, 5, comment) as add:
            add(np.zeros((48, 64, 3), np.uint8))
        assert read_comment(tmp_path / name) == comment
        with av.open(str(tmp_path / name)) as container:
            assert container.metadata.get("comment", "") == comment
    (tmp_path / "c.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match=r"c\.mp4: not a video"):
        read_comment(tmp_path / "c.mp4")


def test_frames_of_another_size_are_scaled_into_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with write_video(tmp_path / "a.mp4", 5) as add:
        add(np.full((48, 64, 3), 255, np.uint8))
        for _ in range(2):
            add(np.full((96, 64, 3), 255, np.uint8))
    frames = [frame.image for frame in read_video(tmp_path / "a.mp4")]
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 3
    for frame in frames[1:]:  # 64 x 96 in 64 x 48: 32 wide, 16 of black on either side
        assert frame[:, 20:44].min() > 230
        assert max(frame[:, :12].max(), frame[:, 52:].max()) < 25
    assert len(caplog.records) == 1
    assert "64 x 96 are scaled to the 64 x 48" in caplog.text


def fail(path: Path) -> None:
    with write_video(path, 5) as add:
        add(np.zeros((48, 64, 3), np.uint8))
        raise InterruptedError


def test_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        fail(tmp_path / "a.mp4")
    with write_video(tmp_path / "none.mp4", 5):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_codec_for_where_there_is_no_x264(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    with write_video(tmp_path / "a.mp4", 30000 / 1001) as add:
        add(np.full((48, 64, 3), 200, np.uint8))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)
    assert video.count_frames(tmp_path / "a.mp4") == 1
