"""What a source expands to: every kind of thing gives the images that are in it, in order."""

from __future__ import annotations

import glob
import gzip
import io
import struct
import threading
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detector.errors import InputError
from detector.inference import sources
from detector.inference.remote import without_credentials
from detector.inference.sources import (
    ReadingOptions,
    SourceImage,
    count_images,
    expand,
    is_live,
    is_video,
    leave_out,
    read_images,
    search_root,
    source_name,
)
from detector.inference.video import Frame

READING = ReadingOptions()


def grey(value: int) -> np.ndarray:
    return np.full((8, 12, 3), value, np.uint8)


def values(source: Any, reading: ReadingOptions = READING) -> list[int | str]:
    """The grey value of each image, or what its error says."""
    return [
        str(picture.error) if picture.error else int(picture.image[0, 0, 0]) for picture in read_images(source, reading)
    ]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """a/1.png, a/b/2.png, a/3.png and a text; the grey value is the name."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("1", "b/2", "3"):
        Image.fromarray(grey(int(name[-1]))).save(tmp_path / "a" / f"{name}.png")
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    return tmp_path / "a"


def test_one_thing_of_each_kind(tree: Path) -> None:
    path = tree / "1.png"
    content = path.read_bytes()
    with path.open("rb") as file:
        sources = [path, str(path), content, bytearray(content), memoryview(content), io.BytesIO(content), file]
        sources += [Image.fromarray(grey(1)), grey(1), torch.from_numpy(grey(1)).permute(2, 0, 1)]
        assert values(sources) == [1] * len(sources)
    assert [source_name(source) for source in (path, str(path), content, 0, "webcam:0")] == [
        str(path), str(path), None, "webcam:0", "webcam:0",
    ]  # fmt: skip


def test_folders_and_patterns(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert values(tree) == values(str(tree)) == [1, 3, 2]  # sorted by path
    assert values(f"{tree}/*.png") == [1, 3]
    assert values(f"{tree}/**/*.png") == [1, 3, 2]
    assert values(f"{tree}/*") == [1, 3]  # neither the text nor the folder
    assert values(f"{tree}/[13].p?g") == [1, 3]
    monkeypatch.chdir(tree)
    assert values("*.png") == [1, 3]
    Image.fromarray(grey(9)).save(tree / "[1].png")
    assert values("[1].png") == [9]  # a file of that name goes before the pattern
    assert [picture.path for picture in read_images("b", READING)] == ["b/2.png"]


def test_patterns_and_folders_without_images(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, part in (
        (f"{tree}/*.jpg", "no such file"),
        (f"{tree}/*.txt", "1 matches, none an image"),
        (tmp_path / "empty", "no image in this folder"),
        (tmp_path / "missing", "no such file"),
    ):
        [message] = values(source)
        assert str(source) in str(message)
        assert part in str(message)


def test_links_are_followed_and_loops_have_an_end(tree: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    Image.fromarray(grey(5)).save(elsewhere / "deep" / "5.png")
    (tree / "link").symlink_to(elsewhere)
    for folder in (tree, tree / "b", elsewhere):  # each leads to itself and to the others, in two ways
        (folder / "up").symlink_to(tree)
        (folder / "again").symlink_to(elsewhere / "deep" / "..")
    (tree / "broken.png").symlink_to(tmp_path / "nowhere")
    (tree / "file.png").symlink_to(elsewhere / "deep" / "5.png")
    (tmp_path / "root").symlink_to(tree)
    for root in (tree, tmp_path / "root"):
        for source in (root, f"{root}/**/*.png"):
            assert sorted(values(source)) == [1, 2, 3, 5, 5], source  # 5: by two names


def test_what_a_folder_leaves_out_is_counted(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.HEIC", "b/c.heic", ".hidden.png", "Makefile"):
        (tree / name).write_bytes(b"")
    with caplog.at_level("INFO"):
        assert values(tree) == [1, 3, 2]
    [message] = caplog.messages
    assert message.startswith(f"{tree}: left out by their names, hidden or no images: 2 .heic, ")
    assert {"1 .txt", "1 .png", "1 no suffix"} == set(message.split(": ")[2].split(", ")[1:])
    for path in tree.rglob("*.png"):
        path.unlink()
    assert "2 .heic" in str(values(tree)[0])


def test_patterns_with_any_number_of_folders_are_those_of_glob(tmp_path: Path) -> None:
    for name in ("1.png", "a/2.png", "a/b/3.png", "a/b/c/4.jpg", ".h/5.png", "a/.h/6.png", "a/.7.png", "a/b.png/8.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey(1)).save(tmp_path / name)
    for pattern in (
        "**",
        "**/*",
        "**/*.png",
        "a/**/*.png",
        "a/**/b/**/*",
        "*/**/[34].?[np]g",
        "**/.*.png",
        ".h/**/*",
        "**/**/*",
    ):
        expected = {name for name in glob.glob(f"{tmp_path}/{pattern}", recursive=True) if Path(name).is_file()}
        assert {str(path) for path in expand(f"{tmp_path}/{pattern}")} == expected, pattern


def test_results_of_earlier_runs_are_left_out(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tree / "b"
    assert values(leave_out(str(tree), out)) == values(leave_out(f"{tree}/**/*.png", out)) == [1, 3]
    assert values(leave_out([[tree], f"{tree}/1.png", grey(7)], out)) == [1, 3, 1, 7]
    monkeypatch.chdir(tree)
    (tmp_path / "link").symlink_to(tree)
    for source in (".", "../a", str(tmp_path / "link"), "**/*.png"):
        assert [path.name for path in leave_out(source, Path("b"))] == ["1.png", "3.png"]
    with pytest.raises(InputError, match=r"\.\.: has images in \. only"):
        leave_out("..", Path())
    for folder in (tree, tmp_path, tmp_path / "other", tree / "b2"):
        assert values(leave_out(str(tree), folder)) == [1, 3, 2]
    assert values(leave_out("b", out)) == [2]  # searched on purpose
    assert "no such file" in str(values(leave_out(f"{tree}/*.gif", out))[0])


def test_what_is_searched(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    for source in (tree, str(tree), f"{tree}/*.png", f"{tree}/**/x?.png"):
        assert search_root(source) == tree
    assert search_root("b/*.png") == Path("b")
    assert search_root("*.png") == Path()
    for source in ("1.png", tree / "1.png", "none", "https://host/[1].png", "webcam:0", 0, grey(0), None, "nul\0"):
        assert search_root(source) is None


def test_collections_of_all_sorts(tree: Path) -> None:
    images = [grey(value) for value in range(4)]
    for source in (
        images,
        tuple(images),
        deque(images),
        iter(images),
        (image for image in images),
        map(np.copy, images),
    ):
        assert values(source) == [0, 1, 2, 3]
    assert "dict" in str(values({"a": images[0]})[0])
    assert values([]) == []


def test_a_generator_is_read_as_it_goes() -> None:
    given: list[int] = []

    def endless() -> Iterator[np.ndarray]:
        while True:
            given.append(len(given))
            yield grey(len(given))

    pictures = read_images([grey(0), endless()], READING)
    assert [int(next(pictures).image[0, 0, 0]) for _ in range(4)] == [0, 1, 2, 3]
    assert given == [0, 1, 2]


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("ftp://host/a.jpg", "addresses of ftp are not read"),
        ("file:///etc/hosts", "given by its path"),
        ("http://127.0.0.1/a.jpg", "allow_private"),
        ("http://127.0.0.1/a.mp4", "allow_private"),
        ("FTP://user:secret@host/a.jpg", "FTP://host/a.jpg: addresses of ftp"),
        ("https://user:secret@host/a.jpg", "user name or password is not taken"),
        ("x" * 5000, "longer than the name of a file may be"),
        ("data:image/png;base64," + "A" * 5000, "longer than the name of a file may be"),
        ("nul\0.jpg", "null"),
        (b"", "is empty"),
        (b"bytes", "not an image"),
        (io.BytesIO(b"bytes"), "not an image"),
        (io.StringIO("text"), "binary mode"),
        (True, "bool"),
        (1.5, "float"),
        (None, "NoneType"),
        (np.zeros((2, 8, 12, 3), np.uint8), "one image at a time"),
    ],
)
def test_what_is_no_source(source: Any, part: str) -> None:
    [picture] = read_images(source, READING)
    assert part in str(picture.error)
    assert "secret" not in f"{picture.error} {picture.path}"


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("rtsp://user:secret@cam/1", "rtsp://cam/1"),
        ("RTSP://user:secret@cam:554/1?a=b@c", "RTSP://cam:554/1?a=b@c"),
        ("rtmps://secret@cam", "rtmps://cam"),
        ("rtsp://user:sec@ret@[fe80::1]:554/1", "rtsp://[fe80::1]:554/1"),
        ("rtsp://user:sec/ret#@cam/1", "rtsp://cam/1"),  # a mistake, but still a password
        ("https://user:secret@host/a.jpg", "https://host/a.jpg"),
        ("rtsp://cam:554/@1", "rtsp://cam:554/@1"),
        ("rtsp://[fe80::1]/@1", "rtsp://[fe80::1]/@1"),
        ("user:name@host.jpg", "user:name@host.jpg"),  # a file
    ],
)
def test_no_password_in_a_name(address: str, name: str) -> None:
    assert source_name(address) == name


def test_no_password_in_what_a_stream_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def stream(url: str, *, every: int) -> Iterator[Frame]:
        opened.append(url)
        yield Frame(grey(1), 0, 0.0, 25.0)
        raise InputError("ends")

    monkeypatch.setattr(sources, "read_stream", stream)
    pictures = list(read_images("rtsp://user:secret@cam/1", READING))
    assert [picture.path for picture in pictures] == ["rtsp://cam/1", "rtsp://cam/1"]
    assert opened == ["rtsp://user:secret@cam/1"]


def test_channel_order_and_pixels(tree: Path) -> None:
    red = grey(0)
    red[..., 0] = 200
    assert values([red]) == [200]
    assert int(next(read_images(red, READING, bgr=True)).image[0, 0, 0]) == 0
    assert values(tree / "1.png", ReadingOptions(max_pixels=96)) == [1]
    assert "12 x 8 pixels" in str(values(tree / "1.png", ReadingOptions(max_pixels=95))[0])


def test_counts(tree: Path) -> None:
    assert count_images(tree) == 3
    assert count_images([tree, f"{tree}/*.png", grey(0), b"", "https://host/a.jpg"]) == 8
    assert count_images(tree / "missing.png") == 1  # one that fails
    for unknown in ("webcam:0", 0, "rtsp://host/1", "http://host/a.mp4", iter([grey(0)]), [tree, "webcam:0"]):
        assert count_images(unknown) is None
    assert count_images(f"{tree}/*.jpg") is None


def test_what_is_live_and_what_is_a_video() -> None:
    for source in ("webcam:0", "webcam:/dev/video1", 0, 2, "rtsp://host:554/a", "RTSP://host", "rtmp://host/a"):
        assert is_live(source)
        assert not is_video(source)
    for source in ("a.mp4", Path("a.MOV"), "https://host/a.webm?x=1.jpg", "b/a.mkv"):
        assert is_video(source)
        assert not is_live(source)
    for source in (True, "a.jpg", "https://host/a.jpg?a.mp4", grey(0), b"", None, Path("rtsp:/host")):
        assert not is_live(source)
        assert not is_video(source)


def test_what_is_no_address_is_named_and_the_rest_follows(tree: Path) -> None:
    for malformed in ("http://[abc/x.jpg", "https://[abc/x.mp4", "http://user:secret@[abc/x.jpg"):
        broken, image = read_images([malformed, tree / "1.png"], READING)
        name = without_credentials(malformed)
        assert str(broken.error) == f"{name}: not an address; expected https://HOST/PATH."
        assert broken.path == name
        assert image.error is None
        assert count_images([malformed]) == 1


def test_a_video_among_images(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from detector.inference.video import write_video

    path = tmp_path / "a.mp4"
    with write_video(path, 20) as add:
        for value in (0, 100, 200):
            add(grey(value))
    pictures = list(read_images([grey(7), path, str(path)], ReadingOptions(every=2)))
    assert [picture.frame for picture in pictures] == [None, 0, 2, 0, 2]
    np.testing.assert_allclose([picture.image.mean() for picture in pictures], [7, 0, 200, 0, 200], atol=3)
    assert [picture.rate for picture in pictures] == [None, 10, 10, 10, 10]
    assert count_images([grey(7), path, str(path)], every=2) == 5
    assert [picture.path for picture in read_images(tmp_path, ReadingOptions(every=2))] == [str(path)] * 2
    path.write_bytes(b"no video")
    assert "not a video" in str(values(path)[0])


@pytest.fixture
def served(tree: Path) -> Iterator[str]:
    """The address of a server of the tree."""

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tree))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_addresses(served: str, tree: Path) -> None:
    here = ReadingOptions(allow_private=True)
    [picture] = read_images(f"{served}/b/2.png", here)
    assert (picture.path, picture.image[0, 0, 0], picture.error) == (f"{served}/b/2.png", 2, None)
    messages = values([f"{served}/notes.txt", f"{served}/none.png"], here)
    assert "notes.txt: not an image" in str(messages[0])
    assert "none.png: the server answers 404" in str(messages[1])
    assert "allow_private" in str(values(f"{served}/b/2.png")[0])


def test_a_video_at_an_address(served: str, tree: Path) -> None:
    pytest.importorskip("av")
    from detector.inference.video import write_video

    with write_video(tree / "a.mp4", 20) as add:
        for value in (0, 100, 200):
            add(grey(value))
    pictures = list(read_images(f"{served}/a.mp4", ReadingOptions(allow_private=True)))
    assert [(picture.path, picture.frame) for picture in pictures] == [(f"{served}/a.mp4", i) for i in range(3)]


@pytest.mark.parametrize("reading", [{"every": 0}, {"every": 1.5}, {"every": True}, {"max_pixels": 0}])
def test_a_reading_that_cannot_be(reading: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(reading))}="):
        ReadingOptions.parse(reading)


def bomb(width: int, height: int, text: int) -> bytes:
    """A PNG that declares a size and holds a text of so many bytes, and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return (
        start
        + chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(text)))
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("suffix", ["png", "zip", "mp4"])
def test_bombs_and_archives_end_in_a_line_each(tmp_path: Path, suffix: str) -> None:
    if suffix == "mp4":
        pytest.importorskip("av")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("1.png", bytes(10_000_000))
    contents = [
        bomb(60_000, 60_000, 1),
        bomb(30, 30, 100_000_000),
        archive.getvalue(),
        gzip.compress(bytes(10_000_000)),
    ]
    paths = [tmp_path / f"{number}.{suffix}" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    found = values([*paths, grey(7)])
    assert found[-1] == 7
    for message, path in zip(found, paths, strict=False):
        assert str(message).startswith(f"{path}: ")
        assert "\n" not in str(message)
    if suffix == "png":
        assert "too many pixels" in str(found[0])


def test_an_image_with_an_error_has_no_pixels(tmp_path: Path) -> None:
    [picture] = read_images(tmp_path / "none.jpg", READING)
    assert isinstance(picture, SourceImage)
    assert picture.image.shape == (0, 0, 3)
    assert isinstance(picture.error, InputError)
