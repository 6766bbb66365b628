"""One HTML file that shows an evaluation: figures, curves, errors, worst pictures; it needs no network and no server.

Python chooses and rounds what is shown and puts it into the page as JSON; the page (page.html, beside this file)
turns it into tables and drawings. It only ever adds text as text, so that no name of a class or file can become markup.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from detector.apps.report.sections import (
    calibration_section,
    class_section,
    confusion_section,
    curve_section,
    proposal_section,
    slice_section,
    tide_section,
)
from detector.errors import InputError
from detector.files import replacing

# Mail and code hosts show attachments up to some megabytes; a browser opens this at once.
SIZE_LIMIT = 5_000_000
# For the pictures, of SIZE_LIMIT; what has the other half are curves and boxes.
PICTURE_BUDGET = 2_800_000

WHAT_PARTS_ARE = {
    "load": "checkpoint or results, annotations, start of the loader",
    "decode": "waiting for pictures: reading, decoding, resizing; loader processes work ahead meanwhile",
    "network": "backbone, neck, RPN with its NMS, light head",
    "post-process": "decoding boxes, NMS by class, boxes in original pixels",
    "metrics": "gathering and scoring",
    "files": "detections.json and metrics.json",
    "diagnosis": "kinds of error, curves, calibration, slices",
    "proposals": "the two stages apart, on some pictures",
    "cost": "counting parameters and multiply-adds",
    "report": "the worst pictures, read and made small, and this page",
}


@dataclass(frozen=True)
class Report:
    """What a page shows. Of a section whose part is None, the reason in `left_out` is shown.

    Attributes:
        title: of the page.
        about: short facts under it.
        metrics: what detector.evaluation.evaluate returned; it is in the page as it is.
        diagnosis: what detector.evaluation.diagnosis.diagnose returned.
        two_stages: what detector.apps.report.two_stages.two_stages returned.
        pictures: what report_pictures.picture_entries gave.
        cost: {"cards": [(name, number, unit)], "pairs": [(name, text)]} of the model and its speed.
        seconds: of each part of the run.
        provenance: (name, text) pairs.
        configs: (title, YAML text) pairs.
        extra: (title, plain dict) pairs, each a section of its own, for example of a data set's doctor.
        left_out: section -> one sentence that says why it is not there.
    """

    title: str
    about: Sequence[str]
    metrics: Mapping[str, Any]
    diagnosis: Mapping[str, Any] | None = None
    two_stages: Mapping[str, Any] | None = None
    pictures: Sequence[Mapping[str, Any]] = ()
    cost: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    provenance: Sequence[tuple[str, str]] = ()
    configs: Sequence[tuple[str, str]] = ()
    extra: Sequence[tuple[str, Mapping[str, Any]]] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


def write_report(path: str | Path, report: Report) -> int:
    """Write the page, complete or not at all. Returns its size in bytes, at most SIZE_LIMIT.

    Pictures are left out from the end where the page would be larger.

    Raises:
        InputError: it is too large even without pictures.
    """
    pictures = list(report.pictures)
    while True:
        page = render(report_data(report, pictures), report.title).encode()
        if len(page) <= SIZE_LIMIT:
            break
        if not pictures:
            raise InputError(
                f"{path}: the report would have {len(page):,} bytes, more than {SIZE_LIMIT:,}; leave something out, or "
                "look into diagnosis.json."
            )
        pictures.pop()
    with replacing(path) as partial:
        partial.write_bytes(page)
    return len(page)


def render(data: Mapping[str, Any], title: str) -> str:
    """The page around the data."""
    template = resources.files("detector.apps.report").joinpath("page.html").read_text(encoding="utf-8")
    head, body = template.split("@DATA@")
    return head.replace("@TITLE@", html.escape(title)) + embed(data) + body


def embed(data: Any) -> str:
    r"""JSON that is safe between script tags: an HTML parser sees no tag and no entity in it.

    >>> embed({"</script>": "&"})
    '{"\\u003c/script\\u003e":"\\u0026"}'
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # A lone surrogate, which JSON may hold and UTF-8 may not.
    return text.encode("utf-8", "backslashreplace").decode()


def report_data(report: Report, pictures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page's script reads; floats in seven digits but those of `metrics`, which are whole."""
    diagnosis = report.diagnosis
    left_out = dict(report.left_out)
    sections: dict[str, Any] = {}
    if diagnosis is not None:
        makers = {
            "curves": curve_section,
            "tide": tide_section,
            "confusion": confusion_section,
            "calibration": calibration_section,
            "slices": slice_section,
        }
        sections = {name: make(diagnosis[name]) for name, make in makers.items() if diagnosis.get(name)}
        if sections.get("curves") is None:
            left_out["curves"] = "There is no object to find in the annotations, so there is no curve."
    for name, section in (("curves", "curves"), ("tide", "errors"), ("confusion", "confusion"),
                          ("calibration", "calibration"), ("slices", "slices")):  # fmt: skip
        if sections.get(name) is None:
            left_out.setdefault(section, "The diagnosis was not made, so this is not known.")
    sections["proposals"] = proposal_section(report.two_stages) if report.two_stages else None
    if report.two_stages is None:
        left_out.setdefault("proposals", "The two stages were not looked at apart.")
    if not pictures:
        left_out.setdefault("pictures", "There is no picture with an error to show.")
    if report.cost is None:
        left_out.setdefault("model", "There is no model: somebody's results were scored.")
    best = (diagnosis or {}).get("curves", {}).get("f1", {}).get("all")
    data = {
        "about": list(report.about),
        "best": best["best"] if best else None,
        "classes": class_section(report.metrics, diagnosis),
        "names": _names(report),
        **sections,
        "pictures": _picture_section(report, pictures),
        "cost": report.cost,
        "times": _time_section(report.seconds),
        "extra": [
            {"id": f"extra-{place}", "title": title, "content": content}
            for place, (title, content) in enumerate(report.extra)
        ],
        "provenance": report.provenance,
        "configs": report.configs,
        "left_out": left_out,
    }
    return short(data) | {"metrics": report.metrics}


def short(value: Any) -> Any:
    """Plain values with floats in seven significant digits; what is no number becomes None."""
    if isinstance(value, float):
        # The page shows three: rounding twice, by way of four, would show 0.25247 as 0.253.
        return float(f"{value:.7g}") if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [short(item) for item in value]
    return value


def format_times(seconds: Mapping[str, float]) -> str:
    """The parts of a run as one line for the log."""
    parts = ", ".join(f"{part} {spent:.1f} s" for part, spent in seconds.items())
    return f"{sum(seconds.values()):.1f} s: {parts}"


def _names(report: Report) -> list[str]:
    return list(report.metrics.get("per_class", {}))


def _picture_section(report: Report, pictures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    threshold = (report.diagnosis or {}).get("score_threshold", 0.5)
    left = len(report.pictures) - len(pictures)
    text = (
        f"The {len(pictures)} pictures with the most errors at scores from {threshold:.2f}: one for each object that "
        "was not found, and the score of each wrong detection. Move the threshold to see which boxes it leaves."
    )
    if left:
        text += f" {left} more would have made this file too large."
    return {"text": text, "threshold": round(float(threshold), 2), "list": list(pictures)}


def _time_section(seconds: Mapping[str, float]) -> dict[str, Any]:
    total = sum(seconds.values())
    return {
        "total": total or 1.0,
        "text": f"{total:.1f} seconds in all; each belongs to one part.",
        "rows": [[part, spent, WHAT_PARTS_ARE.get(part, "")] for part, spent in seconds.items()],
    }
