"""One HTML file that shows an evaluation: metrics, curves, errors, worst images; it needs no network and no server.

Python chooses and rounds what is shown and puts it into the page as JSON; the page (page.html, beside this file)
turns it into tables and drawings, and says what they mean. It only ever adds text as text, so that no name of a class
or file can become markup.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from detector.apps.report import sections
from detector.errors import InputError
from detector.files import UNENCODABLE, replacing

# Mail and code hosts show attachments up to some megabytes; a browser opens this at once.
SIZE_LIMIT = 5_000_000
# For the images, of SIZE_LIMIT; what has the other half are curves and boxes.
IMAGE_BUDGET = 2_800_000


@dataclass(frozen=True)
class Report:
    """What a page shows. Where a part is None, the reason in `left_out` is shown in its place.

    Attributes:
        title: of the page.
        about: short facts under it.
        metrics: what detector.evaluation.compute_metrics returned; it is in the page as it is.
        diagnosis: what detector.evaluation.diagnosis.diagnose returned.
        two_stages: what detector.apps.report.two_stages.two_stages returned.
        images: what detector.apps.report.images.worst_images gave.
        cost: of the model and its speed: {"parameters", "multiply_adds": counts, "input": {"width", "height",
            "short_side", "long_side"}, "classes", "device", "ms": of an image, or None, "batches"}.
        seconds: of each part of the run.
        provenance: (name, text) pairs.
        configs: (title, YAML text) pairs.
        extra: (title, plain dict) pairs, each a section of its own, for example of a data set's doctor.
        left_out: section -> one sentence that says why it is not there.
    """

    title: str
    about: Sequence[str]
    metrics: Mapping[str, Any]
    diagnosis: Mapping[str, Any]
    two_stages: Mapping[str, Any] | None = None
    images: Sequence[Mapping[str, Any]] = ()
    cost: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    provenance: Sequence[tuple[str, str]] = ()
    configs: Sequence[tuple[str, str]] = ()
    extra: Sequence[tuple[str, Mapping[str, Any]]] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


def write_report(path: str | Path, report: Report) -> int:
    """Write the page, complete or not at all. Returns its size in bytes, at most SIZE_LIMIT.

    Images are left out from the end where the page would be larger.

    Raises:
        InputError: it is too large even without images.
    """
    for count in range(len(report.images), -1, -1):
        page = render(report_data(report, count), report.title).encode(errors=UNENCODABLE)
        if len(page) <= SIZE_LIMIT:
            break
    else:
        raise InputError(
            f"{path}: the report would have {len(page):,} bytes, more than {SIZE_LIMIT:,}; leave something out, or "
            "look into diagnosis.json."
        )
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
    return text.encode(errors=UNENCODABLE).decode()  # valid JSON still


def report_data(report: Report, image_count: int) -> dict[str, Any]:
    """What the page's script reads; floats in seven digits but those of `metrics`, which are whole."""
    diagnosis = report.diagnosis
    left_out = dict(report.left_out)
    curves = sections.curve_section(diagnosis["curves"])
    if curves is None:
        left_out["curves"] = "There is no object to find in the annotations, so there is no curve."
    if not image_count:
        left_out.setdefault("pictures", "There is no image with an error to show.")
    best = diagnosis["curves"]["f1"]["all"]
    data = {
        "about": report.about,
        "best": best["best"] if best else None,
        "classes": sections.class_section(report.metrics, diagnosis),
        "names": list(report.metrics.get("per_class", {})),
        "curves": curves,
        "tide": diagnosis["tide"],
        "confusion": sections.confusion_section(diagnosis["confusion"]),
        "calibration": diagnosis["calibration"],
        "slices": diagnosis["slices"],
        "proposals": sections.proposal_section(report.two_stages) if report.two_stages else None,
        "pictures": _image_section(report, image_count),
        "cost": report.cost,
        "times": report.seconds,
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


def _image_section(report: Report, count: int) -> dict[str, Any]:
    threshold = report.diagnosis["score_threshold"]
    text = (
        f"The {count} images with the most errors at scores from {threshold:.2f}: one for each object that "
        "was not found, and the score of each wrong detection. Move the threshold to see which boxes it leaves."
    )
    if left := len(report.images) - count:
        text += f" {left} more would have made this file too large."
    return {"text": text, "threshold": round(float(threshold), 2), "list": report.images[:count]}
