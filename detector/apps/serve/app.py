"""The routes: the page, predictions, and what the server says of itself. Errors are JSON, {"error": message}."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

import detector
from detector.apps.serve.body import Body
from detector.apps.serve.guard import Guard, content_security_policy
from detector.apps.serve.limits import ServerOptions
from detector.apps.serve.options import NAMES, read_options
from detector.apps.serve.schema import openapi
from detector.apps.serve.upload import FORMATS, TooManyPixels, decode
from detector.apps.serve.worker import Full, Worker
from detector.errors import InputError
from detector.inference.predictor import PredictOptions, Predictor

PAGE = Path(__file__).with_name("page.html")
PACKAGES = ("numpy", "pillow", "starlette", "torch", "torchvision", "uvicorn")
BUSY_SECONDS = 1
# The keys of `Detections.to_dict` that are not about files and videos.
FOUND = ("height", "width", "boxes", "scores", "labels", "names")


class Service:
    """What the routes share."""

    def __init__(self, predictor: Predictor, options: ServerOptions) -> None:
        self.predictor, self.limits, self.score_threshold = predictor, options.limits, options.score_threshold
        self.worker = Worker(options.limits.queue)
        self.page = PAGE.read_text(encoding="utf-8")

    def answer(self, data: bytes, options: PredictOptions, arrived: float) -> dict[str, Any]:
        """Decode one image and look at it; runs in the worker's thread.

        Args:
            data: of the image's file.
            options: of the request.
            arrived: time.perf_counter() when the upload was complete.

        Raises:
            InputError: the image cannot be decoded, or is too large.
        """
        begun = time.perf_counter()
        image = decode(data, self.limits.max_pixels)
        decoded = time.perf_counter()
        found = self.predict(image, options)
        ended = time.perf_counter()
        parts = {"queue": begun - arrived, "decode": decoded - begun, "inference": ended - decoded}
        seconds = parts | {"total": ended - arrived}
        return {
            **found,
            "options": options.model_dump(mode="json", include={*NAMES}),
            "milliseconds": {part: round(1000 * value, 3) for part, value in seconds.items()},
        }

    def predict(self, image: np.ndarray, options: PredictOptions) -> dict[str, Any]:
        """The part of `Detections.to_dict` that says what was found in one decoded image."""
        # An array, never text: text would be taken for a path or an address, and opened.
        [(_, found)] = self.predictor.search([image], options)
        plain = found.to_dict()
        return {key: plain[key] for key in FOUND}

    def info(self) -> dict[str, Any]:
        """What a client may want to know before it sends anything. No paths, no provenance."""
        proposals = self.predictor.proposal_limit
        return {
            "class_names": list(self.predictor.class_names),
            "preprocessing": self.predictor.preprocessing.to_dict(),
            "device": str(getattr(self.predictor, "device", "cpu")),
            "options": {
                "score_threshold": {"minimum": 0, "maximum": 1, "default": self.score_threshold},
                "max_proposals": proposals and {"minimum": 1, "maximum": proposals},
            },
            "limits": {
                "max_upload_bytes": self.limits.max_bytes,
                "max_pixels": self.limits.max_pixels,
                "queue": self.limits.queue,
                "timeout_seconds": self.limits.timeout,
                "formats": list(FORMATS),
            },
            "versions": {"detector": detector.__version__, "python": platform.python_version(), **_versions()},
        }


def build_app(predictor: Predictor, options: ServerOptions) -> ASGIApp:
    """The server as an ASGI application.

    Args:
        predictor: what looks at the images; one thread calls it, one image at a time.
        options: bound to a host on the loopback, it answers to the loopback's names only.
    """
    service = Service(predictor, options)
    document = openapi(service.info())

    async def page(request: Request) -> Response:
        return HTMLResponse(service.page)

    async def info(request: Request) -> Response:
        return JSONResponse(service.info())

    async def schema(request: Request) -> Response:
        return JSONResponse(document)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        service.worker.close()

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/predict", partial(answer, service=service), methods=["POST"]),
            Route("/info", info),
            Route("/schema", schema),
            Route("/health", health),
        ],
        exception_handlers={HTTPException: _refused, Exception: _failed},
        lifespan=lifespan,
    )
    return Guard(app, options.host, content_security_policy(service.page))


async def answer(request: Request, service: Service) -> Response:
    """POST /predict."""
    body = Body(request, service.limits)
    try:
        place = service.worker.place()
    except Full:
        await body.drain()
        return _error(503, f"The queue of {service.limits.queue} requests is full; try again.", BUSY_SECONDS)
    with place:
        try:
            data, fields = await body.read()
        except HTTPException as error:
            await body.drain()
            return _error(error.status_code, error.detail)
        try:
            options = read_options(fields, service.predictor, service.score_threshold)
            job = place.submit(partial(service.answer, data, options, time.perf_counter()))
            del data  # of an image in the queue, one copy is enough
            return await _outcome(request, job, service.limits.timeout)
        except TooManyPixels as error:
            return _error(413, str(error))
        except InputError as error:
            return _error(422, str(error))


async def _outcome(request: Request, job: asyncio.Future[Any], timeout: float) -> Response:
    """The job's answer; a job that has not begun is dropped when the client leaves, or when it has waited too long."""
    left = asyncio.ensure_future(_disconnected(request))
    await asyncio.wait({job, left}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    left.cancel()
    if job.done():
        return JSONResponse(job.result())
    job.cancel()
    return _error(503, f"No answer within {timeout:g} s; try again, or a smaller image.", BUSY_SECONDS)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, headers=error.headers)


async def _failed(_: Request, error: Exception) -> Response:
    return _error(500, "An error of the server; its log says more.")


def _error(status: int, message: str, retry_after: int | None = None, headers: Any = None) -> Response:
    retry = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse({"error": message}, status, headers=dict(headers or {}) | retry)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an exported detector needs no torch
            continue
    return found
