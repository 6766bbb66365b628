"""From a request to the pixels of one image and the options of its prediction, within the limits.

Nothing that a request says is ever taken for a path or an address.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from detector.apps.serve import Limits
from detector.data.images import read_image
from detector.errors import InputError
from detector.inference.predictor import PredictOptions, Predictor, ScoreThreshold

log = logging.getLogger(__name__)

FIELD = "image"
MAX_FIELDS = 1000
MAX_FIELD_BYTES = 10_000
DRAIN_SECONDS = 3.0
HOW = f"Send multipart/form-data with the image as the file '{FIELD}', or its bytes as image/jpeg, image/png, ..."

# The options of a prediction that a request may set: none of them makes the server open or download anything.
NAMES = ("score_threshold", "max_proposals", "classes")
# Python's own float also takes 1_0, and digits of any script.
NUMBER = re.compile(r"([0-9]{1,4}(\.[0-9]{0,40})?|\.[0-9]{1,40})(e-?[0-9]{1,3})?")
_SHOWN = 40  # characters of a request's text that a message repeats

# Pillow's names of what `detector.data.images` reads. Not all that Pillow knows: EPS, for one, starts Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


class TooManyPixels(InputError):
    """The image is larger than the server takes."""


class Body:
    """The body of one request, read once: `read` it or, where the request is refused, `drain` it."""

    def __init__(self, request: Request, limits: Limits) -> None:
        self._request, self._limits = request, limits
        self._seen, self._ended = 0, False
        declared = request.headers.get("content-length", "0")
        self._declared = int(declared) if declared.isdecimal() else 0

    async def read(self) -> tuple[bytes, dict[str, list[str]]]:
        """The image's bytes, and every value of each option of the query and of the form.

        Raises:
            HTTPException: 400, 408, 413 or 415, with what is wrong; the body is drained.
        """
        try:
            async with asyncio.timeout(self._limits.timeout):
                data, form = await _read(Request(self._request.scope, self._limited))
        except TimeoutError as error:
            await self.drain()
            raise HTTPException(408, f"The upload took longer than {self._limits.timeout:g} s.") from error
        except ClientDisconnect as error:  # nobody reads this
            raise HTTPException(400, "The upload was broken off.") from error
        except HTTPException:
            await self.drain()
            raise
        fields: dict[str, list[str]] = {}
        for name, value in (*self._request.query_params.multi_items(), *form):
            fields.setdefault(name, []).append(value)
        return data, fields

    async def drain(self) -> None:
        """Throw away what a client still sends, some megabytes and seconds of it.

        A connection that is closed on a client that is sending is reset, and the client never sees the reason.
        """
        if self._request.headers.get("expect"):  # it waits for leave to send
            return
        end = self._seen + self._limits.max_bytes
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self._ended and self._seen < end:
                    await self._receive()

    async def _receive(self) -> Message:
        message = await self._request.receive()
        self._seen += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        return message

    async def _limited(self) -> Message:
        message: Message = {} if self._declared > self._limits.max_bytes else await self._receive()
        if max(self._seen, self._declared) > self._limits.max_bytes:
            raise HTTPException(413, f"The upload is larger than {self._limits.max_upload_mb:g} MB.")
        return message


async def _read(request: Request) -> tuple[bytes, list[tuple[str, str]]]:
    kind, _, parameters = request.headers.get("content-type", "").lower().partition(";")
    kind = kind.strip()
    if kind.startswith("image/") or kind in ("application/octet-stream", ""):
        return await request.body(), []
    if kind != "multipart/form-data":
        raise HTTPException(415, f"Content-Type {kind[:60]!r} is not read here. {HOW}")
    # Python decodes many an encoding, some of them slowly, or into what is no text.
    if "charset" in parameters and "utf-8" not in parameters:
        raise HTTPException(415, "The fields of the form are read as UTF-8; leave the charset out.")
    try:
        form = await request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    except (HTTPException, ClientDisconnect):
        raise
    except OSError as error:
        log.warning("No room for an upload in the folder for temporary files: %s", error)
        raise HTTPException(503, "The server has no room for the upload; try again later.") from error
    except Exception as error:  # The parser's own errors, and what malformed headers make it raise besides.
        raise HTTPException(400, f"The form cannot be read ({type(error).__name__}). {HOW}") from error
    try:
        uploads = [(name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)]
        if [name for name, _ in uploads] != [FIELD]:
            raise HTTPException(400, f"The form has no file '{FIELD}'. {HOW}")
        fields = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
        return await uploads[0][1].read(), fields
    finally:
        await form.close()


def read_options(
    given: Mapping[str, Sequence[str]], predictor: Predictor, score_threshold: ScoreThreshold
) -> PredictOptions:
    """The options in the fields of a form or a query.

    Args:
        given: name -> every value that it was given.
        predictor: whose classes and proposals they are.
        score_threshold: of a request that names none.

    Raises:
        InputError: an unknown name, a value that cannot be, or one value too many.
    """
    for name, values in given.items():
        if name not in NAMES:
            raise InputError(f"Unknown option {name[:_SHOWN]!r}; expected one of {', '.join(NAMES)}.")
        if name != "classes" and len(values) > 1:
            raise InputError(f"{name} is given {len(values)} times; once is enough.")
    thresholds, numbers, classes = (given.get(name, ()) for name in NAMES)
    max_proposals, limit = None, predictor.proposal_limit
    for text in thresholds:
        score_threshold = float(text) if NUMBER.fullmatch(text) else math.nan
        if not 0 <= score_threshold <= 1:
            raise InputError(f"score_threshold={text[:_SHOWN]!r}; expected a number from 0 to 1.")
    for text in numbers:
        if limit is None:
            raise InputError("max_proposals cannot be set on this detector; leave it out.")
        max_proposals = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
        if not 1 <= max_proposals <= limit:
            raise InputError(f"max_proposals={text[:_SHOWN]!r}; expected a whole number from 1 to {limit}.")
    for text in classes:
        if text not in predictor.class_names:
            known = ", ".join(predictor.class_names[:20]) + (", ..." if len(predictor.class_names) > 20 else "")
            raise InputError(f"classes={text[:_SHOWN]!r} is not a class of this detector; there is {known}.")
    return PredictOptions(
        score_threshold=score_threshold, max_proposals=max_proposals, classes=tuple(dict.fromkeys(classes)) or None
    )


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
