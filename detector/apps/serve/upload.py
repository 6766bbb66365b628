"""From the bytes of an upload to pixels. Nothing that a request says is ever taken for a path or an address."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from detector.data.images import read_image
from detector.errors import InputError

# Pillow's names of what `detector.data.images` reads. Not all that Pillow knows: EPS, for one, starts Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


class TooManyPixels(InputError):
    """The image is larger than the server takes."""


def decode(data: bytes, max_pixels: int) -> np.ndarray:
    """The image in these bytes, uint8 RGB (h, w, 3), turned as its EXIF orientation says. Of frames, the first.

    Raises:
        TooManyPixels: its header names more pixels than `max_pixels`; it is not decoded.
        InputError: no image of a known format, or damaged.
    """
    if not data:
        raise InputError("The image is empty: 0 bytes.")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many(max_pixels, "more than Pillow opens") from error
    except UnidentifiedImageError as error:
        raise InputError(f"Not an image of a known format; expected one of {', '.join(FORMATS)}.") from error
    except Exception as error:  # A header of random bytes makes the readers raise anything: OverflowError, ...
        raise InputError(f"The image's header cannot be read: {type(error).__name__}.") from error
    with image:
        if image.width * image.height > max_pixels:
            raise _too_many(max_pixels, f"{image.width} x {image.height}")
        return read_image(image)


def _too_many(max_pixels: int, size: str) -> TooManyPixels:
    return TooManyPixels(f"The image has too many pixels ({size}); this server takes {max_pixels / 1e6:g} million.")
