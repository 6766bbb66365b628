"""The routes: the page, predictions, and what the server says of itself. Errors are JSON, {"error": message}."""

from __future__ import annotations

import asyncio
import json
import platform
import statistics
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

import detector
from detector.apps.serve import ServerOptions
from detector.apps.serve.guard import Guard, content_security_policy
from detector.apps.serve.upload import FORMATS, NAMES, Body, TooManyPixels, decode, read_options
from detector.errors import InputError
from detector.files import UNENCODABLE
from detector.inference.predictor import PredictOptions, Predictor

HERE = Path(__file__).parent
PACKAGES = ("numpy", "pillow", "starlette", "torch", "torchvision", "uvicorn")
BUSY = {"Retry-After": "1"}  # seconds
# The keys of `Detections.to_dict` that are not about files and videos.
FOUND = ("height", "width", "boxes", "scores", "labels", "names")


class Json(JSONResponse):
    """JSON, with half a surrogate pair, which a class name may hold, as its escape."""

    def render(self, content: Any) -> bytes:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode(errors=UNENCODABLE)


def build_app(predictor: Predictor, options: ServerOptions) -> ASGIApp:
    """The server as an ASGI application.

    Args:
        predictor: what looks at the images; one thread calls it, one image at a time.
        options: bound to a host on the loopback, it answers to the loopback's names only.
    """
    predictions = Predictions(predictor, options)
    page = (HERE / "page.html").read_text(encoding="utf-8")
    info = describe(predictor, options)
    fixed = {
        "/": HTMLResponse(page),
        "/info": Json(info),
        "/schema": Json(openapi(info)),
        "/health": Json({"status": "ok"}),
    }

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        predictions.thread.shutdown(wait=True, cancel_futures=True)

    app = Starlette(
        routes=[
            *(Route(path, answer, methods=["GET"]) for path, answer in fixed.items()),
            Route("/predict", predictions.answer, methods=["POST"]),
        ],
        exception_handlers={
            HTTPException: _refused,
            TooManyPixels: partial(_told, 413),
            InputError: partial(_told, 422),
            Exception: _failed,
        },
        lifespan=lifespan,
    )
    return Guard(app, options.host, content_security_policy(page), options.names)


class Predictions:
    """One thread that has the network, and a bounded number of requests that may be here for it."""

    def __init__(self, predictor: Predictor, options: ServerOptions) -> None:
        self.predictor, self.options, self.limits = predictor, options, options.limits
        self.places = threading.BoundedSemaphore(self.limits.queue)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="detector")

    async def answer(self, request: Request) -> Response:
        """POST /predict.

        A place is taken before the body is read, and given back when the job has ended, or when it is known that there
        will be none: a job that nobody waits for any more still has the network, and so keeps its place.
        """
        body = Body(request, self.limits)
        if not self.places.acquire(blocking=False):
            await body.drain()
            raise HTTPException(503, f"The queue of {self.limits.queue} requests is full; try again.", BUSY)
        job: Future[dict[str, Any]] | None = None
        try:
            data, fields = await body.read()
            options = read_options(fields, self.predictor, self.options.score_threshold)
            job = self.thread.submit(self.search, data, options, time.perf_counter())
            job.add_done_callback(lambda _: self.places.release())
            del data  # of an image in the queue, one copy is enough
            return await self._outcome(request, asyncio.wrap_future(job))
        finally:
            if job is None:
                self.places.release()

    async def _outcome(self, request: Request, job: asyncio.Future[Any]) -> Response:
        """The job's answer; one that has not begun is dropped when the client leaves or has waited too long."""
        left = asyncio.ensure_future(_disconnected(request))
        await asyncio.wait({job, left}, timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED)
        left.cancel()
        if job.done():
            return Json(job.result())
        job.cancel()
        raise HTTPException(503, f"No answer within {self.limits.timeout:g} s; try again, or a smaller image.", BUSY)

    def search(self, data: bytes, options: PredictOptions, arrived: float) -> dict[str, Any]:
        """Decode one image and look at it; runs in the thread that has the network.

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
        # An array, never text: text would be taken for a path or an address, and opened.
        try:
            [(_, found)] = self.predictor.search([image], options)
        except InputError as error:  # image and options are checked already: it is the detector's, with its path
            raise RuntimeError(str(error)) from error
        plain = found.to_dict()
        ended = time.perf_counter()
        parts = {"queue": begun - arrived, "decode": decoded - begun, "inference": ended - decoded}
        seconds = parts | {"total": ended - arrived}
        return {
            **{key: plain[key] for key in FOUND},
            "options": options.model_dump(mode="json", include={*NAMES}),
            "milliseconds": {part: round(1000 * value, 3) for part, value in seconds.items()},
        }


def describe(predictor: Predictor, options: ServerOptions) -> dict[str, Any]:
    """What a client may want to know before it sends anything. No paths, no provenance."""
    limits, proposals = options.limits, predictor.proposal_limit
    # An exported detector needs no torch.
    versions = {name: found.version for name in PACKAGES for found in distributions(name=name)}
    shown = PredictOptions(score_threshold=options.score_threshold).lowest(predictor.class_names, predictor.thresholds)
    default = [round(value, 6) for value in shown.tolist()]
    return {
        "class_names": list(predictor.class_names),
        "preprocessing": predictor.preprocessing.to_dict(),
        "device": str(getattr(predictor, "device", "cpu")),
        "options": {
            # The page has one slider; until it is moved, each class has its own.
            "score_threshold": {"minimum": 0, "maximum": 1, "default": statistics.median(default), "by_class": default},
            "max_proposals": proposals and {"minimum": 1, "maximum": proposals},
        },
        "limits": {
            "max_upload_bytes": limits.max_bytes,
            "max_pixels": limits.max_pixels,
            "queue": limits.queue,
            "timeout_seconds": limits.timeout,
            "formats": list(FORMATS),
        },
        "versions": {"detector": detector.__version__, "python": platform.python_version(), **versions},
    }


def openapi(info: dict[str, Any]) -> dict[str, Any]:
    """The documented interface, OpenAPI 3.1: openapi.json with the classes and limits of the running server.

    Args:
        info: what GET /info answers.
    """
    document: dict[str, Any] = json.loads((HERE / "openapi.json").read_text(encoding="utf-8"))
    document["info"]["version"] = detector.__version__
    schemas, predict = document["components"]["schemas"], document["paths"]["/predict"]["post"]
    names, options = info["class_names"], info["options"]
    schemas["ClassName"]["enum"] = names
    schemas["Label"]["maximum"] = len(names) - 1
    schemas["Image"]["description"] = f"An image's file, up to {info['limits']['max_upload_bytes']} bytes."
    schemas["ScoreThreshold"] |= {key: options["score_threshold"][key] for key in ("minimum", "maximum")}
    if options["max_proposals"]:
        schemas["MaxProposals"] |= options["max_proposals"]
    else:  # their number is fixed
        predict["parameters"] = [one for one in predict["parameters"] if one["name"] != "max_proposals"]
        del predict["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]["max_proposals"]
    return document


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Json({"error": error.detail}, error.status_code, headers=error.headers)


async def _told(status: int, _: Request, error: Exception) -> Response:
    return Json({"error": str(error)}, status)


async def _failed(_: Request, error: Exception) -> Response:
    return Json({"error": "An error of the server; its log says more."}, 500)
