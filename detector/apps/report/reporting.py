"""What an evaluation leaves for a reader: diagnosis.json and report.html, of a checkpoint or of anybody's results."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import detector as package
from detector.apps.report.images import worst_images
from detector.apps.report.page import IMAGE_BUDGET, Report, format_times, write_report
from detector.apps.scoring import EvalOptions, ReportOptions, Scored, never_found
from detector.data.index import AnnotationIndex
from detector.data.preprocess import canvas_size
from detector.data.results import within_unit
from detector.evaluation.diagnosis import diagnose
from detector.files import write_json
from detector.inference.runtime import ExportedDetector

if TYPE_CHECKING:
    from detector.inference.detector import Detector

log = logging.getLogger(__name__)


def write_evaluation_report(out: Path, scored: Scored) -> None:
    """Write diagnosis.json and report.html of what has been scored into the folder."""
    options, index, detector, clock = scored.options, scored.index, scored.detector, scored.clock
    wanted = options.report
    assert wanted
    has_images = detector is not None or options.images is not None
    source = Path(str(options.ckpt or options.results))
    kind = "results" if detector is None else "export" if isinstance(detector, ExportedDetector) else "checkpoint"
    made = {} if detector is None else detector.provenance
    model = _look_at_model(scored, wanted)
    results, ranks = within_unit(scored.results)
    diagnosis = diagnose(results, index, properties=wanted.properties if has_images else 0, worst_count=wanted.pictures)
    if ranks:
        log.warning("In the report %s.", ranks)
        diagnosis["calibration"] = None
        model["left_out"]["calibration"] = f"{ranks}. Calibration needs the scores to be shares."
    write_json(out / "diagnosis.json", diagnosis | {"two_stages": model.get("two_stages")})
    clock.book("diagnosis")
    shown: list[dict[str, Any]] = []
    if not has_images:
        model["left_out"]["pictures"] = "There are no images: give their folder (images=DIR) to see the worst of them."
    elif not wanted.pictures:
        model["left_out"]["pictures"] = "No image was wanted (report.pictures=0)."
    else:
        shown = worst_images(diagnosis["worst"], results, index, IMAGE_BUDGET)
    now = datetime.now().isoformat(sep=" ", timespec="minutes")
    clock.book("report")
    report = Report(
        title=f"Evaluation of {source.name}",
        about=[*_about(diagnosis, index, options.metrics, now), *([ranks] if ranks else [])],
        metrics=scored.metrics,
        diagnosis=diagnosis,
        images=shown,
        seconds=clock.seconds,
        provenance=[
            (kind, str(source)),
            *((key, str(made[key])) for key in ("epoch", "step", "created", "torch") if key in made),
            ("annotations", str(index.annotation_file)),
            *([("images", str(index.image_dir))] if has_images else []),
            ("version", package.__version__),
            ("written", now),
        ],
        **model,
    )
    size = write_report(out / "report.html", report)
    clock.book("report")
    log.info("diagnosis.json, report.html (%.1f MB) in %s", size / 1e6, out)
    log.info("%s", format_times(clock.seconds))


def _about(diagnosis: Mapping[str, Any], index: AnnotationIndex, protocol: str, now: str) -> list[str]:
    counts = (("images", "images"), ("truths", "objects"), ("detections", "detections"))
    about = [", ".join(f"{diagnosis[key]:,} {word}" for key, word in counts), f"metrics: {protocol}", now]
    if note := never_found(index):
        about.append(note)
    if protocol == "lvis":
        about.append("below the metrics, what nobody looked for counts as wrong, as in COCO")
    return about


def _look_at_model(scored: Scored, wanted: ReportOptions) -> dict[str, Any]:
    """What a report says of the model, or why it does not: fields of Report."""
    options, index, detector, clock = scored.options, scored.index, scored.detector, scored.clock
    about: dict[str, Any] = {
        "left_out": {},
        "configs": [("Configuration of this evaluation", _yaml(options.to_dict()))],
    }
    if detector is None:
        about["left_out"] = {
            "model": "There is no model: results from a file were scored (results=).",
            "proposals": "The two stages can be looked at where there is a model: give ckpt= instead of results=.",
        }
        return about
    if isinstance(detector, ExportedDetector):
        checkpoint = "give the checkpoint itself, ckpt=best.ckpt."
        about["left_out"] = {
            "model": f"An export says nothing of its cost: {checkpoint}",
            "proposals": f"An export is one graph: to see the two stages apart, {checkpoint}",
        }
        return about
    if wanted.proposals:
        from detector.apps.report.two_stages import two_stages

        about["two_stages"] = two_stages(detector, index, limit=wanted.proposals)
        clock.book("proposals")
    else:
        about["left_out"]["proposals"] = "The two stages were not looked at apart (report.proposals=0)."
    about["cost"] = _cost(detector, index, options, scored.seconds_per_image)
    clock.book("cost")
    if wanted.doctor:
        about["extra"] = [("Data set", _examined(detector, index, wanted.doctor, options.workers))]
    clock.book("doctor")
    about["configs"].append(("The network", _yaml(detector.describe()["spec"])))
    if recipe := detector.provenance.get("config"):
        about["configs"].append(("Configuration of the training run", _yaml(recipe)))
    return about


def _cost(
    detector: Detector, index: AnnotationIndex, options: EvalOptions, seconds_per_image: Sequence[float]
) -> dict[str, Any]:
    """Size of the model, its multiply-adds on the canvas that most images have, and its speed in this run."""
    from detector.lab.cost import detection_multiply_adds, parameters
    from detector.lab.latency import machine
    from detector.models.build import build_network

    height, width = _usual_canvas(detector, index)
    original = build_network(detector.options, len(detector.class_names))  # a fused network has fewer parameters
    return {
        "parameters": parameters(original),
        "multiply_adds": detection_multiply_adds(detector.network, height, width),
        "input": {"width": width, "height": height, **detector.preprocessing.to_dict()},
        "classes": len(detector.class_names),
        "device": f"{detector.device}, {options.trainer.precision}, {machine()}",
        "ms": 1000 * statistics.median(seconds_per_image) if seconds_per_image else None,
        "batches": f"{len(seconds_per_image)} batches of up to {options.val.batch_size}",
    }


def _examined(detector: Detector, index: AnnotationIndex, limit: int, workers: int) -> dict[str, Any]:
    """What the data doctor finds in the split that was scored, as a section."""
    if len(index) > limit:
        return {"not examined": f"{len(index)} images are more than report.doctor={limit}: run tools/doctor.py."}
    from detector.apps.doctor.examine import examine

    rpn = detector.network.rpn
    diagnosis = examine(
        {"scored": index},
        preprocessing=detector.preprocessing,
        anchors=(rpn.options, rpn.anchors.stride),
        workers=max(1, workers),
    )
    findings = {
        f"{finding.severity}: {finding.check}": {
            "count": finding.count,
            "what": finding.message,
            "examples": list(finding.first),
            **({"remedy": finding.remedy} if finding.remedy else {}),
        }
        for finding in diagnosis.findings
    }
    return {"errors": diagnosis.counts["error"], "warnings": diagnosis.counts["warning"], **findings}


def _usual_canvas(detector: Detector, index: AnnotationIndex) -> tuple[int, int]:
    """Height and width of the padded input that most images have."""
    preprocessing = detector.preprocessing
    targets = [preprocessing.target_size(*size) for size in index.sizes.tolist() if all(size)]
    canvases = Counter(canvas_size([target]) for target in targets)
    if canvases:
        return canvases.most_common(1)[0][0]
    return canvas_size([(preprocessing.short_side, preprocessing.long_side)])


def _yaml(values: Any) -> str:
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text
