"""The documented interface: an OpenAPI 3.1 document, with the limits of the running server."""

from __future__ import annotations

from typing import Any

import detector
from detector.apps.serve.body import FIELD

_NUMBER = {"type": "number"}
_COUNT = {"type": "integer", "minimum": 0}
_MILLISECONDS = {"type": "number", "minimum": 0}


def openapi(info: dict[str, Any]) -> dict[str, Any]:
    """The document.

    Args:
        info: what GET /info answers.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Light-head detector",
            "version": detector.__version__,
            "description": "Send an image, get boxes. Boxes are x1, y1, x2, y2 in pixels of the image, turned as "
            "its EXIF orientation says. Nothing that a request names is opened: only bytes that it holds are decoded.",
        },
        "paths": {
            "/predict": {"post": _predict(info)},
            "/info": {"get": _get("What the server runs, and its limits", "Info")},
            "/health": {"get": _get("Whether the server answers", "Health")},
            "/schema": {"get": {"summary": "This document", "responses": {"200": {"description": "OpenAPI 3.1"}}}},
            "/": {"get": {"summary": "A page to try it", "responses": {"200": {"description": "HTML"}}}},
        },
        "components": {"schemas": _schemas(info)},
    }


def _predict(info: dict[str, Any]) -> dict[str, Any]:
    options = _options(info)
    bound = info["limits"]["max_upload_bytes"]
    image = {"type": "string", "format": "binary", "description": f"An image's file, up to {bound} bytes."}
    form = {
        "type": "object",
        "required": [FIELD],
        "additionalProperties": False,
        "properties": {FIELD: image, **options},
    }
    errors = {
        "400": "The form is broken, or has no image",
        "403": "Sent by a page of another site",
        "408": "The upload took too long",
        "413": "Too many bytes, or too many pixels",
        "415": "A content type that is not read",
        "421": "A Host that is not this server's",
        "422": "No image that can be decoded, or an option that cannot be",
        "503": "The queue is full, or the answer took too long; see Retry-After",
    }
    return {
        "summary": "Find objects in one image",
        "description": "Options go into the query or into the form; classes may be repeated.",
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": schema} for name, schema in options.items()
        ],
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": form}, "image/*": {}, "application/octet-stream": {}},
        },
        "responses": {
            "200": _json("What was found, best first", "Detections"),
            **{status: _json(text, "Error") for status, text in errors.items()},
        },
    }


def _options(info: dict[str, Any]) -> dict[str, Any]:
    threshold, proposals = info["options"]["score_threshold"], info["options"]["max_proposals"]
    options = {
        "score_threshold": {"type": "number", **threshold, "description": "Detections below are left out."},
        "max_proposals": {
            "type": "integer",
            **(proposals or {}),
            "description": "The head looks at so many proposals: fewer are faster. All, if left out.",
        },
        "classes": {
            "type": "array",
            "items": {"type": "string", "enum": info["class_names"]},
            "description": "Detections of other classes are left out.",
        },
    }
    return options if proposals else {name: schema for name, schema in options.items() if name != "max_proposals"}


def _schemas(info: dict[str, Any]) -> dict[str, Any]:
    name = {"type": "string", "enum": info["class_names"]}
    maybe_integer = {"type": ["integer", "null"], "minimum": 1}
    return {
        "Detections": _record(
            height={**_COUNT, "description": "Of the image, in pixels."},
            width={**_COUNT, "description": "Of the image, in pixels."},
            boxes=_list({"type": "array", "items": _NUMBER, "minItems": 4, "maxItems": 4}),
            scores=_list({"type": "number", "minimum": 0, "maximum": 1}),
            labels=_list({"type": "integer", "minimum": 0, "maximum": len(info["class_names"]) - 1}),
            names=_list(name),
            options=_record(
                score_threshold=_NUMBER, max_proposals=maybe_integer, classes={"type": ["array", "null"], "items": name}
            ),
            milliseconds={
                **_record(queue=_MILLISECONDS, decode=_MILLISECONDS, inference=_MILLISECONDS, total=_MILLISECONDS),
                "description": "Waiting for the network; decoding; resizing, the network, its results; all of these.",
            },
        ),
        "Info": _record(
            class_names=_list({"type": "string"}),
            preprocessing={"type": "object"},
            device={"type": "string"},
            options=_record(score_threshold={"type": "object"}, max_proposals={"type": ["object", "null"]}),
            limits=_record(
                max_upload_bytes=_COUNT,
                max_pixels=_COUNT,
                queue=_COUNT,
                timeout_seconds=_NUMBER,
                formats=_list({"type": "string"}),
            ),
            versions={"type": "object", "additionalProperties": {"type": "string"}},
        ),
        "Health": _record(status={"const": "ok"}),
        "Error": _record(error={"type": "string"}),
    }


def _record(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": list(properties),
        "additionalProperties": False,
        "properties": properties,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _json(description: str, name: str) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{name}"}
    return {"description": description, "content": {"application/json": {"schema": reference}}}


def _get(summary: str, name: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": _json(summary, name)}}
