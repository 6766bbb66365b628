"""What a request may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image

from detector.errors import InputError


@dataclass(frozen=True)
class Limits:
    """Bounds of one request, and of all of them together.

    What they let the server hold: for each of `queue` requests its body, which is there twice for a moment, and of a
    form above 1 MB once more in the temporary folder; of the one picture that is decoded, up to 20 bytes a pixel, a
    gigabyte for 50 megapixels; and some hundred kB a connection.

    Nothing tells one client from another: who opens all `connections` keeps the others out, for `timeout` seconds at
    a time. A server for strangers belongs behind a proxy that bounds the connections of each.

    Attributes:
        max_upload_mb: megabytes (10^6 bytes) of a request's body.
        max_megapixels: millions of pixels of a picture, before it is resized.
        queue: requests that may be here at once, from the first byte to the answer; one of them has the network.
        timeout: seconds for a connection's next request to come, headers and all, for the upload, and for the answer.
        connections: that may be open at once, silent ones included; at least as many as `queue`.
    """

    max_upload_mb: float = 20
    max_megapixels: float = 50
    queue: int = 16
    timeout: float = 30
    connections: int = 128

    def __post_init__(self) -> None:
        for name in ("max_upload_mb", "max_megapixels", "timeout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InputError(f"{name}={value}; expected a number above 0.")
        for name, least in (("queue", 1), ("connections", self.queue)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name}={value}; expected a whole number, {least} or more.")
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
