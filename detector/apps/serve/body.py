"""From a request to the bytes of one image and the fields of its options, within the limits."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from detector.apps.serve.limits import Limits

FIELD = "image"
MAX_FIELDS = 1000
MAX_FIELD_BYTES = 10_000
DRAIN_SECONDS = 3.0
HOW = f"Send multipart/form-data with the image as the file '{FIELD}', or its bytes as image/jpeg, image/png, ..."

Fields = dict[str, list[str]]


class Body:
    """The body of one request, read once: `read` it or, where the request is refused, `drain` it."""

    def __init__(self, request: Request, limits: Limits) -> None:
        self._request, self._limits = request, limits
        self._seen, self._ended = 0, False
        declared = request.headers.get("content-length", "0")
        self._declared = int(declared) if declared.isdecimal() else 0

    async def read(self) -> tuple[bytes, Fields]:
        """The image's bytes, and every option of the query and of the form.

        Raises:
            HTTPException: 400, 408, 413 or 415, with what is wrong.
        """
        limits = self._limits
        try:
            async with asyncio.timeout(limits.timeout):
                data, form = await _read(Request(self._request.scope, self._limited))
        except TimeoutError as error:
            raise HTTPException(408, f"The upload took longer than {limits.timeout:g} s.") from error
        except ClientDisconnect as error:  # nobody reads this
            raise HTTPException(400, "The upload was broken off.") from error
        fields: Fields = {}
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
    if kind == "multipart/form-data":
        # Python decodes many an encoding, some of them slowly, or into what is no text.
        if "charset" in parameters and "utf-8" not in parameters:
            raise HTTPException(415, "The fields of the form are read as UTF-8; leave the charset out.")
        return await _read_form(request)
    if kind.startswith("image/") or kind in ("application/octet-stream", ""):
        return await request.body(), []
    raise HTTPException(415, f"Content-Type {kind[:60]!r} is not read here. {HOW}")


async def _read_form(request: Request) -> tuple[bytes, list[tuple[str, str]]]:
    try:
        form = await request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    except (HTTPException, ClientDisconnect):
        raise
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
