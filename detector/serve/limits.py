"""What a request may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image

from detector.errors import InputError


@dataclass(frozen=True)
class Limits:
    """Bounds of one request, and of all of them together. What the server holds is at most queue * max_upload_mb.

    Attributes:
        max_upload_mb: megabytes (10^6 bytes) of a request's body.
        max_megapixels: millions of pixels of a picture, before it is resized.
        queue: requests that may be here at once, from the first byte to the answer; one of them has the network.
        timeout: seconds for the upload, and again for the answer.
    """

    max_upload_mb: float = 20
    max_megapixels: float = 50
    queue: int = 16
    timeout: float = 30

    def __post_init__(self) -> None:
        for name in ("max_upload_mb", "max_megapixels", "timeout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InputError(f"{name}={value}; expected a number above 0.")
        if isinstance(self.queue, bool) or not isinstance(self.queue, int) or self.queue < 1:
            raise InputError(f"queue={self.queue}; expected a whole number, 1 or more.")
        # Above its own bound Pillow warns, and then refuses; a limit that is not reached would be a promise broken.
        if Image.MAX_IMAGE_PIXELS is not None and self.max_pixels > Image.MAX_IMAGE_PIXELS:
            raise InputError(
                f"max_megapixels={self.max_megapixels}; expected at most {Image.MAX_IMAGE_PIXELS / 1e6:g}."
            )

    @property
    def max_bytes(self) -> int:
        return int(self.max_upload_mb * 1e6)

    @property
    def max_pixels(self) -> int:
        return int(self.max_megapixels * 1e6)
