"""Every kind of image comes in as the same uint8 RGB; every kind of mistake says what to do."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from detector.data.images import exif_orientation, is_tensor, list_images, read_image
from detector.data.preprocess import Preprocessing, prepare
from detector.errors import InputError

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def picture() -> np.ndarray:
    """A smooth image without symmetry, (24, 40, 3)."""
    coarse = np.random.default_rng(1).integers(0, 256, (3, 5, 3), np.uint8)
    return cv2.resize(coarse, (40, 24), interpolation=cv2.INTER_LINEAR)


def is_image(image: np.ndarray, height: int, width: int) -> bool:
    return image.dtype == np.uint8 and image.shape == (height, width, 3) and image.flags.c_contiguous


def test_lossless_file_gives_its_pixels(tmp_path: Path, picture: np.ndarray) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), picture[..., ::-1])
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png")):
        image = read_image(source)
        assert is_image(image, 24, 40)
        assert image.flags.writeable
        np.testing.assert_array_equal(image, picture)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_as_opencv_reads_it(tmp_path: Path, picture: np.ndarray, orientation: int) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(path, exif=exif, quality=95)
    theirs = np.asarray(cv2.imread(str(path)))[..., ::-1]
    for source in (path, Image.open(path)):
        ours = read_image(source)
        assert ours.shape == theirs.shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))
        assert np.abs(ours.astype(int) - theirs).mean() < 2
    assert np.abs(read_image(path, exif=False).astype(int) - picture).mean() < 5


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_tiff(tmp_path: Path, picture: np.ndarray, orientation: int, mode: str) -> None:
    """Pillow turns these itself, and mixed up the pixels of a file that it maps into memory."""
    path, exif, stored = tmp_path / "a.tiff", Image.Exif(), Image.fromarray(picture).convert(mode)
    exif[0x0112] = orientation
    stored.save(path, exif=exif)
    grid = np.asarray(stored.convert("RGB"))
    seen = [grid, grid[:, ::-1], grid[::-1, ::-1], grid[::-1], grid.swapaxes(0, 1), np.rot90(grid, -1),
            grid[::-1, ::-1].swapaxes(0, 1), np.rot90(grid)][orientation - 1]  # fmt: skip
    np.testing.assert_array_equal(read_image(path), seen)
    np.testing.assert_array_equal(read_image(path.read_bytes()), seen)
    np.testing.assert_array_equal(read_image(path, exif=False), grid)
    assert exif_orientation(path) == (orientation, grid.shape[:2])


@pytest.mark.parametrize("value", [0, 9, 77])
def test_orientation_that_does_not_exist_is_ignored(tmp_path: Path, picture: np.ndarray, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), picture)


def test_damaged_exif_does_not_cost_the_image(tmp_path: Path, picture: np.ndarray) -> None:
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff broken")
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):
        assert is_image(read_image(tmp_path / "a.jpg"), 24, 40)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
def test_grey_becomes_rgb(tmp_path: Path, picture: np.ndarray, suffix: str) -> None:
    Image.fromarray(picture[..., 0]).save(tmp_path / f"grey.{suffix}")
    image = read_image(tmp_path / f"grey.{suffix}")
    assert is_image(image, 24, 40)
    assert np.abs(image[..., 0].astype(int) - picture[..., 0]).mean() < 3
    np.testing.assert_array_equal(image[..., 0], image[..., 2])


def test_palette_bilevel_and_alpha(tmp_path: Path, picture: np.ndarray) -> None:
    palette = Image.fromarray(picture).quantize(16)
    expected = np.array(palette.convert("RGB"))
    palette.save(tmp_path / "p.png", transparency=bytes(range(16)))
    np.testing.assert_array_equal(read_image(tmp_path / "p.png"), expected)

    bilevel = picture[..., 1] > 128
    Image.fromarray(bilevel).save(tmp_path / "1.png")
    np.testing.assert_array_equal(read_image(tmp_path / "1.png")[..., 1], bilevel * 255)

    transparent = np.dstack((picture, np.zeros((24, 40), np.uint8)))
    Image.fromarray(transparent).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), picture)


def test_cmyk_is_close_to_what_was_saved(tmp_path: Path, picture: np.ndarray) -> None:
    Image.fromarray(picture).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    with Image.open(tmp_path / "cmyk.jpg") as image:
        assert image.mode == "CMYK"
    assert np.abs(read_image(tmp_path / "cmyk.jpg").astype(int) - picture).mean() < 5


def test_sixteen_bit_files_keep_their_range(tmp_path: Path) -> None:
    deep = np.array([[0, 128, 129, 257], [32768, 65535, 40000, 600]], np.uint16)
    expected = [[0, 0, 1, 1], [128, 255, 156, 2]]  # value / 257, to the nearest
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    cv2.imwrite(str(tmp_path / "deep.tif"), deep)
    for source in (tmp_path / "deep.png", tmp_path / "deep.tif", deep, deep.astype(">u2"), deep.astype("<u2")):
        image = read_image(source)
        assert is_image(image, 2, 4)
        np.testing.assert_array_equal(image[..., 0], expected)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([[0, 1, 255]], np.int32), [0, 1, 255]),
        (np.array([[-5, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 0.5, 200]], np.float32), [0, 0, 200]),
    ],
)
def test_32_bit_files_by_their_range(tmp_path: Path, pixels: np.ndarray, expected: list[int]) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[0, :, 1], expected)


def test_arrays_and_tensors_agree(picture: np.ndarray) -> None:
    alpha = np.dstack((picture, np.full((24, 40), 9, np.uint8)))
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    for source in (
        picture,
        alpha,
        picture / 255.0,
        (picture / 255).astype(np.float32),
        picture.astype(np.uint16) * 257,
        tensor,
        tensor / 255,
        (tensor / 255).requires_grad_(),
    ):
        image = read_image(source)
        assert is_image(image, 24, 40)
        np.testing.assert_array_equal(image, picture)
    np.testing.assert_array_equal(read_image(picture[..., ::-1], bgr=True), picture)
    np.testing.assert_array_equal(read_image(alpha[..., [2, 1, 0, 3]], bgr=True), picture)
    np.testing.assert_array_equal(read_image(tensor.flip(0), bgr=True), picture)
    assert np.abs(read_image((tensor / 255).bfloat16()).astype(int) - picture).max() <= 1
    grey = picture[..., 0]
    for kind in (tv_tensors.Image, torch.nn.Parameter):
        one = kind(tensor / 255)
        assert is_tensor(one)
        np.testing.assert_array_equal(read_image(one), picture)
    for source in (grey, grey[..., None], tensor[:1]):
        np.testing.assert_array_equal(read_image(source), np.dstack((grey, grey, grey)))


def test_reading_leaves_the_source_alone(picture: np.ndarray) -> None:
    before = picture.copy()
    image = Image.fromarray(picture)
    image.getexif()[0x0112] = 6
    assert read_image(image).shape == (40, 24, 3)
    assert image.size == (40, 24)
    read_image(picture, bgr=True)
    np.testing.assert_array_equal(picture, before)


@pytest.mark.parametrize(
    ("source", "thing", "remedy"),
    [
        (None, "NoneType", "give a path"),
        (b"bytes", "in 5 bytes", "convert it"),
        (b"", "empty (0 bytes)", "take it out"),
        (io.StringIO("text"), "str, not bytes", "binary mode"),
        (np.zeros((3, 24, 40), np.uint8), "(3, 24, 40)", "channels last"),
        (np.zeros((2, 24, 40, 3), np.uint8), "(2, 24, 40, 3)", "one image at a time"),
        (np.zeros((0, 40, 3), np.uint8), "(0, 40, 3)", "not empty"),
        (np.zeros((24, 40, 3), np.int64), "int64", "convert it"),
        (np.full((4, 4, 3), 200.0), "200", "divide by 255"),
        (np.full((4, 4, 3), np.nan), "nan", "[0, 1]"),
        (torch.zeros(1, 3, 24, 40), "(1, 3, 24, 40)", "give one at a time"),
        (torch.zeros(24, 40, 3), "(24, 40, 3)", "channels first"),
        (torch.full((3, 4, 4), 200.0), "200", "divide by 255"),
    ],
)
def test_what_is_not_an_image(source: object, thing: str, remedy: str) -> None:
    with pytest.raises(InputError) as caught:
        read_image(source)  # type: ignore[arg-type]
    assert thing in str(caught.value)
    assert remedy in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "nothing.png").touch()
    Image.fromarray(np.full((2, 2), np.inf, np.float32)).save(tmp_path / "inf.tif")
    for path, remedy in (
        (tmp_path / "missing.jpg", "check the path"),
        (tmp_path, "list_images"),
        (tmp_path / "text.jpg", "convert it"),
        (tmp_path / "nothing.png", "is empty (0 bytes)"),
        (tmp_path / "inf.tif", "fetch it again"),
    ):
        with pytest.raises(InputError) as caught:
            read_image(path)
        assert str(path) in str(caught.value)
        assert remedy in str(caught.value)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no")

    (tmp_path / "a.png").touch()
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(InputError, match=r"a\.png: may not be read.*permissions"):
        read_image(tmp_path / "a.png")


def test_bytes_and_file_objects(tmp_path: Path, picture: np.ndarray) -> None:
    Image.fromarray(picture).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    with (tmp_path / "a.png").open("rb") as file:
        for source in (content, bytearray(content), memoryview(content), io.BytesIO(content), file):
            np.testing.assert_array_equal(read_image(source), picture)
    with pytest.raises(InputError, match=r"^https://host/a\.png: cannot be decoded"):
        read_image(content[:200], name="https://host/a.png")


def test_exif_orientation_of_bytes(picture: np.ndarray) -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    Image.fromarray(picture).save(buffer, "png", exif=exif)
    np.testing.assert_array_equal(read_image(buffer.getvalue()), np.rot90(picture, -1))


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_of_an_animated_file_the_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], lossless=True, duration=100)
    with Image.open(buffer) as image:
        assert image.n_frames == 3  # type: ignore[attr-defined]
        np.testing.assert_array_equal(read_image(buffer.getvalue()), np.full((6, 8, 3), (255, 0, 0)))
        image.seek(2)
        np.testing.assert_array_equal(read_image(image), np.full((6, 8, 3), (0, 0, 255)))


def bomb(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that declares width x height pixels."""
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def test_decompression_bombs(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb(50_000, 50_000))
    before = Image.MAX_IMAGE_PIXELS
    for source in (tmp_path / "bomb.png", bomb(50_000, 50_000), bomb(10_000, 10_000)):
        with pytest.raises(InputError, match=r"too many pixels.*max_pixels=N"):
            read_image(source)
    with pytest.raises(InputError, match=r"bomb\.png: 50000 x 50000 pixels, max_pixels=2000000000"):
        read_image(tmp_path / "bomb.png", max_pixels=2_000_000_000)
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_limit_of_ones_own_is_no_other_thread_s(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on, errors, real = threading.Event(), threading.Event(), dict[str, str](), Image.open

    def wait(file: io.BytesIO) -> Image.Image:
        if threading.current_thread().name == "trusting":
            inside.set()
            go_on.wait(10)
        return real(file)

    def read(name: str, max_pixels: int | None) -> None:
        with pytest.raises(InputError) as error:
            read_image(bomb(50_000, 50_000), max_pixels=max_pixels)
        errors[name] = str(error.value)

    monkeypatch.setattr(Image, "open", wait)
    limits = {"trusting": 10**9, "careful": None}
    threads = [threading.Thread(target=read, args=item, name=item[0]) for item in limits.items()]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    threads[1].join(0.3)  # it would be through by now, without a limit
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert "max_pixels=1000000000" in errors["trusting"]
    assert "too many pixels" in errors["careful"]


def test_a_limit_of_ones_own(monkeypatch: pytest.MonkeyPatch, picture: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    np.testing.assert_array_equal(read_image(buffer.getvalue(), max_pixels=24 * 40), picture)
    with pytest.raises(InputError, match="40 x 24 pixels, max_pixels=959"):
        read_image(buffer.getvalue(), max_pixels=24 * 40 - 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's refuses above twice that
    with pytest.raises(InputError, match="too many pixels"):
        read_image(buffer.getvalue())
    np.testing.assert_array_equal(read_image(buffer.getvalue(), max_pixels=24 * 40), picture)


def test_postscript_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", run)
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "EPS"  # Pillow knows it
    with pytest.raises(InputError, match="PostScript is not read"):
        read_image(content)


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_sides_of_one_pixel(tmp_path: Path, size: tuple[int, int]) -> None:
    """From the file to the network's input: no side of nothing, and no side longer than the longest."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(image, pixels)
    (prepared,) = prepare([image], Preprocessing(short_side=320, long_side=512))
    assert tuple(prepared.image_sizes[0]) == {(1, 1): (320, 320), (1, 20_000): (1, 512), (20_000, 1): (512, 1)}[size]
    assert prepared.images.nbytes <= 3 * 512 * 512


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "tif", "webp"])
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    whole = buffer.getvalue()
    for part in (0.02, 0.3, 0.6, 0.9):
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(InputError) as caught:
            read_image(path)
        assert str(path) in str(caught.value)
        assert "fetch it again" in str(caught.value) or "take it out" in str(caught.value)
    path.write_bytes(whole[: int(len(whole) * 0.6)])
    if suffix == "jpg":  # opened whole, damaged only when decoded
        with (
            Image.open(path) as image,
            pytest.raises(InputError, match=r"cut\.jpg: cannot be decoded.*fetch it"),
        ):
            read_image(image)


def test_list_images(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("z.JPG", "b/2.png", "b/c/1.webp", "b/notes.txt", "b/._2.png"):
        (tmp_path / name).touch()
    assert list_images(tmp_path) == [tmp_path / "b/2.png", tmp_path / "b/c/1.webp", tmp_path / "z.JPG"]


def test_list_images_names_the_folder_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "empty").mkdir()
    for folder, remedy in (
        (tmp_path / "missing", "check the path"),
        (tmp_path / ("a" * 5000), "check the path"),
        (tmp_path / "a.jpg", "give the folder"),
        (tmp_path / "empty", ".jpg"),
    ):
        with pytest.raises(InputError) as caught:
            list_images(folder)
        assert str(folder) in str(caught.value)
        assert remedy in str(caught.value)
