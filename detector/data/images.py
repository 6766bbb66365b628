"""The one reader of images: training, evaluation, prediction and exports read files, arrays and tensors here.

Everything becomes uint8 RGB (h, w, 3) as a person would see it. Numpy and Pillow only: an exported detector reads its
images where torch is not installed.
"""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, TypeAlias, TypeGuard, Union

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from detector.errors import InputError

if TYPE_CHECKING:
    import torch

ImageSource: TypeAlias = Union[
    str, "os.PathLike[str]", bytes, bytearray, memoryview, IO[bytes], Image.Image, np.ndarray, "torch.Tensor"
]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

# From the frame that people see to the one that is stored, by EXIF orientation.
_TURN_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_EXIF_ORIENTATION = 0x0112
# Pillow's limit on pixels is one number for the process: who opens a file holds this.
_PILLOW_LIMIT = threading.Lock()


def read_image(
    source: ImageSource,
    *,
    bgr: bool = False,
    exif: bool = True,
    max_pixels: int | None = None,
    reduce: int = 1,
    name: str | None = None,
) -> np.ndarray:
    """Read one image.

    Args:
        source: a file; the bytes of one, or a binary file object that holds them; a Pillow image; an array (h, w),
            (h, w, 1), (h, w, 3) or (h, w, 4), uint8, uint16 or float in [0, 1]; a tensor (C, h, w) with C of 1, 3 or
            4, uint8 or float in [0, 1]. Alpha is dropped. 16-bit images are divided by 257. Files and Pillow images
            of 32 bits a pixel do not say their range: [0, 1] (float only), [0, 255] or [0, 65535], the smallest that
            holds them. Of an animated file (GIF, APNG, WebP) or one of several pages, the first frame; of a Pillow
            image, its current one.
        bgr: the channels of an array or a tensor are blue, green, red (OpenCV's order). Files know their order.
        exif: turn files and Pillow images as their EXIF orientation says.
        max_pixels: a file that declares more is refused before it is decoded; None leaves it to Pillow, whose limit
            (179 million) guards against small files that unpack to fill the memory.
        reduce: 2, 4 or 8: a JPEG file may be decoded at that fraction of its sides, rounded up, in a quarter of the
            time and less; other files come whole.
        name: what messages call the source; None makes one up.

    Returns:
        uint8 RGB (h, w, 3), C-contiguous. It shares memory with `source` where that is such an array already.

    Raises:
        InputError: the file is missing, a folder, empty, not an image, too large or damaged; the array has a shape, a
            type or a range that no image has.
    """
    if isinstance(source, (str, os.PathLike)):
        return _read_file(Path(source), name or str(source), exif, max_pixels, reduce)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read_file(io.BytesIO(source), name or f"an image in {len(source)} bytes", exif, max_pixels, reduce)
    if hasattr(source, "read"):
        content = source.read()
        if isinstance(content, bytes):
            return read_image(content, exif=exif, max_pixels=max_pixels, reduce=reduce, name=name)
        name, kind = name or "a file object", type(content).__name__
        raise InputError(f"{name}: gives {kind}, not bytes; open it in binary mode, open(path, 'rb').")
    if isinstance(source, Image.Image):
        name = name or getattr(source, "filename", "")
        name = name or f"Pillow image (mode {source.mode}, {source.width} x {source.height})"
        try:
            return _from_pillow(source, exif)
        except Exception as error:  # Pillow decodes late: a damaged file shows only now, as any kind of exception.
            raise _undecodable(name, error) from error
    if isinstance(source, np.ndarray):
        return _from_array(source, name or "array", bgr)
    if is_tensor(source):
        return _from_tensor(source, name or "tensor", bgr)
    raise InputError(
        f"cannot read an image from {type(source).__name__}; give a path, the bytes of a file, a Pillow image, a "
        f"numpy array (h, w, 3) or a tensor (3, h, w)."
    )


def is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    """Whether a value is a torch tensor, without importing torch."""
    kinds = type(value).__mro__  # torchvision's tv_tensors and others' are subclasses
    return any(kind.__name__ == "Tensor" and kind.__module__.partition(".")[0] == "torch" for kind in kinds)


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """All image files below a folder, sorted by path; hidden files are left out.

    Raises:
        InputError: the folder is missing, is a file, or holds no image.
    """
    root = Path(folder)
    if not os.path.isdir(root):  # unlike pathlib's, no error for a name that no file can have
        what = "is a file, not a folder; give the folder that holds it" if os.path.exists(root) else "no such folder"
        raise InputError(f"{root}: {what}; check the path.")
    found = sorted(
        path
        for path in list_files(root)
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise InputError(f"{root}: no image in this folder; expected files that end in {_suffixes()}.")
    return found


def list_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """All files below a folder; through links too, but no folder twice, so that a link to one above has an end."""
    waiting, seen = [os.fspath(folder)], set[str]()
    while waiting:
        links: list[str] = []
        for root in waiting:
            for place, folders, names in os.walk(root):
                real = os.path.realpath(place)
                if real in seen:
                    folders.clear()
                    continue
                seen.add(real)
                links += [path for name in folders if os.path.islink(path := os.path.join(place, name))]
                yield from (Path(place, name) for name in names)
        waiting = sorted(links)  # after what lies in the folder itself


def exif_orientation(path: str | os.PathLike[str]) -> tuple[int, tuple[int, int]]:
    """EXIF orientation of a file, 1 (none) to 8, and height and width as stored, before it; (1, (0, 0)) if unreadable.

    From 5 on the rotation swaps height and width. Only the header is read.
    """
    try:
        with Image.open(path) as image:
            # Pillow would decode a PNG to look for EXIF behind its pixels, where hardly any program writes it.
            tagged = image.format != "PNG" or "exif" in image.info
            orientation = _orientation(image) if tagged else 1
            turned = orientation >= 5 and image.format == "TIFF"  # Pillow gives the size after the rotation, for these
            return orientation, (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # Decoders raise what they like; whoever reads the pixels says what is wrong.
        return 1, (0, 0)


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))


def _undecodable(name: object, error: Exception) -> InputError:
    return InputError(
        f"{name}: cannot be decoded ({error or type(error).__name__}); the file is damaged or incomplete: fetch it "
        f"again, or take it out of the data."
    )


def _read_file(file: Path | io.BytesIO, name: str, exif: bool, max_pixels: int | None, reduce: int) -> np.ndarray:
    if isinstance(file, Path) and os.path.isdir(file):
        raise InputError(f"{name}: is a folder, not an image; detector.data.images.list_images gives the images in it.")
    try:
        # Not by its path: Pillow would map a TIFF into memory, and mix up its pixels where EXIF turns it.
        opened = nullcontext(file) if isinstance(file, io.BytesIO) else file.open("rb")
        with opened as binary, _open(binary, name, max_pixels) as image:
            if image.format == "EPS":  # Pillow would run it: PostScript is a program
                raise InputError(f"{name}: PostScript is not read; convert it to one of {_suffixes()}.")
            image.draft(None, (max(1, image.width // reduce), max(1, image.height // reduce)))
            return _from_pillow(image, exif)
    except InputError:
        raise
    except Exception as error:  # Decoders raise what they like on damaged files: OSError, SyntaxError, struct.error ...
        raise _explained(error, file, name) from error


def _explained(error: Exception, file: Path | io.BytesIO, name: str) -> InputError:
    """What an exception of Pillow means for the user."""
    match error:
        case FileNotFoundError():
            why = "no such file; check the path."
        case PermissionError():
            why = "may not be read by this user; change the file's permissions."
        case UnidentifiedImageError():
            size = file.stat().st_size if isinstance(file, Path) else len(file.getbuffer())
            what = "not an image that can be read" if size else "is empty (0 bytes), not an image that can be read"
            why = f"{what}; convert it to one of {_suffixes()}, or take it out of the data."
        case Image.DecompressionBombError() | Image.DecompressionBombWarning():
            why = f"too many pixels to be safe to decode ({error}). If you trust it, allow as many with max_pixels=N."
        case OSError(errno=errno.ENAMETOOLONG):
            why = (
                f"{len(name)} characters, longer than the name of a file may be; give an image's path (an image in "
                f"base64 is to be decoded first)."
            )
            name = f"{name[:60]}..."
        case _:
            return _undecodable(name, error)
    return InputError(f"{name}: {why}")


@contextmanager
def _open(file: BinaryIO, name: str, max_pixels: int | None) -> Iterator[Image.Image]:
    """Pillow's open, which reads the header only, with this limit in place of its own if there is one."""
    with _PILLOW_LIMIT:  # also to open with Pillow's own, which another thread may have raised
        before = Image.MAX_IMAGE_PIXELS
        try:
            if max_pixels is not None:
                Image.MAX_IMAGE_PIXELS = None
            image = Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = before
    with image:
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise InputError(
                f"{name}: {image.width} x {image.height} pixels, max_pixels={max_pixels}; raise it, or shrink "
                f"the image."
            )
        yield image


def _from_pillow(image: Image.Image, exif: bool) -> np.ndarray:
    orientation = _orientation(image)
    if exif and orientation != 1:
        image = ImageOps.exif_transpose(image)
    elif orientation != 1 and image.format == "TIFF":  # Pillow turns a TIFF while it decodes it
        image = image.transpose(_TURN_BACK[orientation])
    if image.mode.startswith("I;16"):
        return _to_rgb(_from_uint16(np.asarray(image)))
    if image.mode in ("I", "F"):
        return _to_rgb(_from_unknown_range(np.asarray(image)))
    if image.mode == "P":
        # A palette may hold transparency, which Pillow wants to go through RGBA.
        image = image.convert("RGBA")
    # A copy: an array that borrows Pillow's bytes is read-only.
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # A broken EXIF block must not cost the image.
        return 1
    return value if value in range(1, 9) else 1


def _from_uint16(pixels: np.ndarray) -> np.ndarray:
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257, to the nearest


def _from_unknown_range(pixels: np.ndarray) -> np.ndarray:
    if not np.isfinite(pixels).all():
        raise ValueError("it holds values that are not finite")
    largest = pixels.max(initial=0)
    if pixels.dtype.kind == "f" and largest <= 1:
        pixels = pixels * 255
    elif largest > 255:
        pixels = pixels / 257
    return np.rint(pixels).clip(0, 255).astype(np.uint8)


def _to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Grey (h, w) to RGB (h, w, 3)."""
    return np.repeat(pixels[..., None], 3, axis=2)


def _from_tensor(tensor: torch.Tensor, name: str, bgr: bool) -> np.ndarray:
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
        raise InputError(
            f"{name} of shape {tuple(tensor.shape)}: an image is (3, h, w); give one at a time, channels first."
        )
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()  # numpy knows no bfloat16
    return _from_array(tensor.permute(1, 2, 0).numpy(), name, bgr)


def _from_array(array: np.ndarray, name: str, bgr: bool) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise InputError(
            f"{name} of shape {array.shape}: an image is (h, w), (h, w, 3) or (h, w, 4) and not empty; give one "
            f"image at a time, channels last."
        )
    pixels = _array_to_uint8(array, name)
    if pixels.shape[2] == 1:
        return _to_rgb(pixels[..., 0])
    pixels = pixels[..., :3]
    return np.ascontiguousarray(pixels[..., ::-1] if bgr else pixels)


def _array_to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype.newbyteorder("=") == np.uint16:  # of either order of bytes
        return _from_uint16(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind != "f":
        raise InputError(f"{name} of type {array.dtype}: an image is uint8, uint16 or float in [0, 1]; convert it.")
    low, high = float(array.min()), float(array.max())
    # A resize leaves values a hair outside; a NaN fails both comparisons.
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise InputError(
            f"{name} of type {array.dtype} with values from {low:g} to {high:g}: a float image lies in [0, 1]; "
            f"divide by 255, or convert it to uint8."
        )
    return np.rint(array * 255.0).clip(0, 255).astype(np.uint8)
