"""Videos: frames of known colours, written by PyAV in the test, come back in order, turned, with their times."""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detector import video
from detector.errors import InputError
from detector.video import count_frames, read_camera, read_stream, read_video, write_video

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


@pytest.mark.parametrize(("every", "expected"), [(5, [0, 5, 10]), (12, [0]), (11, [0, 11])])
def test_each_nth_frame(tmp_path: Path, every: int, expected: list[int]) -> None:
    path = make_video(tmp_path / "a.mp4")
    frames = list(read_video(path, every=every))
    assert [frame.index for frame in frames] == expected
    assert [round(frame.time * RATE) for frame in frames] == expected
    np.testing.assert_allclose([seen(frame.image) for frame in frames], [colour(i) for i in expected], atol=12)
    assert {frame.rate for frame in frames} == {RATE / every}
    assert count_frames(path, every=every) == len(expected)


# The matrix of a track header turns the picture clockwise for the viewer; QuickTime File Format, "Matrices".
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
        ("missing.mp4", "no such file"), ("folder.mp4", "is a folder"), ("empty.mp4", "not a video"),
        ("text.mp4", "not a video"), ("sound.mp4", "no pictures"),
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


def write_two_sizes(path: Path) -> None:
    with write_video(path, 5) as add:
        add(np.zeros((48, 64, 3), np.uint8))
        add(np.zeros((48, 62, 3), np.uint8))


def test_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="of 62 x 48 in a video of 64 x 48"):
        write_two_sizes(tmp_path / "a.mp4")
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
