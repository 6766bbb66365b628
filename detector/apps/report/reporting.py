"""What an evaluation leaves for a reader: diagnosis.json and report.html, of a checkpoint or of anybody's results."""

from __future__ import annotations

import json
import logging
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import detector as package
from detector.apps.report.images import picture_entries, worst_at_any_threshold
from detector.apps.report.page import PICTURE_BUDGET, Report, format_times, write_report
from detector.data.annotations import AnnotationIndex
from detector.data.preprocess import canvas_size
from detector.data.results import Results
from detector.evaluation.clock import Clock
from detector.evaluation.diagnosis import diagnose
from detector.files import write_json
from detector.options import Natural, Options

if TYPE_CHECKING:
    from detector.apps.evaluate import EvalOptions
    from detector.inference.detector import Detector
    from detector.inference.runtime import ExportedDetector

log = logging.getLogger(__name__)


class ReportOptions(Options):
    """What diagnosis.json and report.html look into."""

    pictures: Natural = 12
    """show the images with the most errors, at most this many"""
    properties: Natural = 200
    """read this many images to slice by brightness, contrast, sharpness and resolution"""
    proposals: Natural = 100
    """run the two stages apart on this many images"""
    doctor: Natural = 1000
    """examine the data set as tools/doctor.py does if it has at most this many images"""


def report_on_results(
    out: Path,
    options: EvalOptions,
    clock: Clock,
    index: AnnotationIndex,
    results: Results,
    metrics: Mapping[str, Any],
) -> None:
    """Write diagnosis.json and report.html of somebody's results, without a model."""
    path = Path(str(options.results))
    _Reporter(out, options, clock, metrics, results, index, has_images=options.images is not None).write(
        title=f"Evaluation of {path.name}",
        cost=None,
        two_stages=None,
        provenance=[("results", str(path)), ("annotations", str(index.annotation_file))],
        configs=[("Configuration of this evaluation", _yaml(options.to_dict()))],
        left_out={
            "model": "There is no model: results from a file were scored (results=).",
            "proposals": "The two stages can be looked at where there is a model: give ckpt= instead of results=.",
        },
    )


def report_on_checkpoint(
    out: Path,
    options: EvalOptions,
    clock: Clock,
    detector: Detector,
    index: AnnotationIndex,
    results: Results,
    metrics: Mapping[str, Any],
    seconds_per_image: Sequence[float],
) -> None:
    """Write diagnosis.json and report.html of a detector that has been scored.

    Args:
        out: the folder.
        options: of the evaluation.
        clock: what the run has taken until here; goes on.
        detector: on the device that it is to be timed on.
        index: the pictures that were scored.
        results, metrics: its detections on them, and what detector.evaluation.evaluate made of them.
        seconds_per_image: of network and post-process, for each batch.
    """
    stages, left_out = None, {}
    assert options.report
    if options.report.proposals:
        from detector.apps.report.two_stages import two_stages

        stages = two_stages(detector, index, limit=options.report.proposals)
        clock.book("proposals")
    else:
        left_out["proposals"] = "The two stages were not looked at apart (report.proposals=0)."
    cost = _cost(detector, index, options, seconds_per_image)
    clock.book("cost")
    examined = _examined(detector, index, options.report.doctor, options.workers)
    clock.book("doctor")
    made = detector.provenance
    reporter = _Reporter(out, options, clock, metrics, results, index)
    reporter.write(
        title=f"Evaluation of {Path(str(options.ckpt)).name}",
        cost=cost,
        two_stages=stages,
        provenance=[
            ("checkpoint", str(options.ckpt)),
            *((key, str(made[key])) for key in ("epoch", "step", "created", "torch") if key in made),
            ("annotations", str(index.annotation_file)),
            ("pictures", str(index.image_dir)),
        ],
        configs=[
            ("Configuration of this evaluation", _yaml(options.to_dict())),
            ("The network", _yaml(detector.describe()["spec"])),
            *([("Configuration of the training run", _yaml(made["config"]))] if made.get("config") else []),
        ],
        left_out=left_out,
        extra=[("Data set", examined)] if examined else [],
    )


def report_on_export(
    out: Path,
    options: EvalOptions,
    clock: Clock,
    detector: ExportedDetector,
    index: AnnotationIndex,
    results: Results,
    metrics: Mapping[str, Any],
) -> None:
    """As `report_on_checkpoint`, for a file of tools/export.py: its stages cannot be looked at apart."""
    checkpoint = "give the checkpoint itself, ckpt=best.ckpt."
    reporter = _Reporter(out, options, clock, metrics, results, index)
    reporter.write(
        title=f"Evaluation of {detector.path.name}",
        cost=None,
        two_stages=None,
        provenance=[
            ("export", str(detector.path)),
            *((key, str(value)) for key, value in detector.provenance.items() if key in ("epoch", "step", "created")),
            ("annotations", str(index.annotation_file)),
            ("pictures", str(index.image_dir)),
        ],
        configs=[("Configuration of this evaluation", _yaml(options.to_dict()))],
        left_out={
            "model": f"An export says nothing of its cost: {checkpoint}",
            "proposals": f"An export is one graph: to see the two stages apart, {checkpoint}",
        },
    )


class _Reporter:
    """What both kinds of evaluation share: the diagnosis, the pictures, the page."""

    def __init__(
        self,
        out: Path,
        options: EvalOptions,
        clock: Clock,
        metrics: Mapping[str, Any],
        results: Results,
        index: AnnotationIndex,
        has_images: bool = True,
    ) -> None:
        assert options.report
        self.out, self.options, self.protocol, self.clock = out, options.report, options.metrics, clock
        self.metrics, self.results, self.index, self.has_images = metrics, results, index, has_images

    def write(
        self,
        *,
        title: str,
        cost: Mapping[str, Any] | None,
        two_stages: Mapping[str, Any] | None,
        provenance: list[tuple[str, str]],
        configs: list[tuple[str, str]],
        left_out: Mapping[str, str],
        extra: Sequence[tuple[str, Mapping[str, Any]]] = (),
    ) -> None:
        diagnosis = diagnose(
            self.results,
            self.index,
            properties=self.options.properties if self.has_images else 0,
            worst_count=self.options.pictures,
        )
        write_json(self.out / "diagnosis.json", diagnosis | {"two_stages": two_stages})
        self.clock.book("diagnosis")
        pictures, reasons = self._pictures(diagnosis)
        now = datetime.now().isoformat(sep=" ", timespec="minutes")
        counts = (("images", "pictures"), ("truths", "objects"), ("detections", "detections"))
        about = [", ".join(f"{diagnosis[key]:,} {word}" for key, word in counts), f"metrics: {self.protocol}", now]
        if degenerate := self.index.counts["degenerate"]:
            about.append(f"{degenerate} objects without area in their image count, and can never be found")
        if self.protocol == "lvis":
            about.append("below the metrics, what nobody looked for counts as wrong, as in COCO")
        self.clock.book("report")
        size = write_report(
            self.out / "report.html",
            Report(
                title=title,
                about=about,
                metrics=self.metrics,
                diagnosis=diagnosis,
                two_stages=two_stages,
                pictures=pictures,
                cost=cost,
                seconds=self.clock.seconds,
                provenance=[*provenance, ("version", package.__version__), ("written", now)],
                configs=configs,
                extra=extra,
                left_out={**left_out, **reasons},
            ),
        )
        self.clock.book("report")
        log.info("diagnosis.json, report.html (%.1f MB) in %s", size / 1e6, self.out)
        log.info("%s", format_times(self.clock.seconds))

    def _pictures(self, diagnosis: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        if not self.has_images:
            return [], {"pictures": "There are no pictures: give their folder (images=DIR) to see the worst of them."}
        if not self.options.pictures:
            return [], {"pictures": "No picture was wanted (report.pictures=0)."}
        shown = worst_at_any_threshold(diagnosis["worst"], self.results, self.index)
        place, index = self.index.place, self.index
        names = diagnosis["confusion"]["names"][:-1]
        return list(picture_entries(shown, names, lambda image: index.read(place[image]), PICTURE_BUDGET)), {}


def _cost(
    detector: Detector, index: AnnotationIndex, options: EvalOptions, seconds_per_image: Sequence[float]
) -> dict[str, Any]:
    """Size of the model, its multiply-adds on the canvas that most pictures have, and its speed in this run."""
    import torch
    from torch import nn

    from detector.lab.cost import multiply_adds, parameters
    from detector.lab.latency import machine
    from detector.models.build import build_network

    class Detect(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = detector.network

        def forward(self, images: torch.Tensor, sizes: torch.Tensor) -> Any:
            return self.network.detect(images, sizes)

    height, width = _usual_canvas(detector, index)
    device = detector.device
    images = torch.zeros(1, 3, height, width, dtype=torch.uint8, device=device)
    operations = multiply_adds(Detect(), images, torch.tensor([[height, width]], device=device))
    count = parameters(build_network(detector.options, len(detector.class_names)))  # a fused network has fewer
    scale, unit = (1e9, "billion") if operations >= 1e9 else (1e6, "million")
    cards: list[tuple[str, float, str]] = [
        ("parameters", count / 1e6, "million"),
        ("multiply-adds", operations / scale, f"{unit} a picture, input {width} x {height}"),
    ]
    pairs = [
        ("parameters", f"{count:,}"),
        ("multiply-adds", f"{operations:,} at {width} x {height}, the input that most pictures have"),
        ("classes", str(len(detector.class_names))),
        (
            "input",
            f"shorter side {detector.preprocessing.short_side}, longer at most {detector.preprocessing.long_side}",
        ),
        ("device", f"{device}, {options.trainer.precision}, {machine()}"),
    ]
    if seconds_per_image:
        median = 1000 * statistics.median(seconds_per_image)
        cards.append(("ms", median, "a picture, median of the batches"))
        batch = f"batches of up to {options.val.batch_size}"
        pairs.append(
            ("speed", f"{median:.3g} ms a picture, median over {len(seconds_per_image)} {batch}; without reading")
        )
    return {"cards": cards, "pairs": pairs}


def _examined(detector: Detector, index: AnnotationIndex, limit: int, workers: int) -> dict[str, Any]:
    """What the data doctor finds in the split that was scored, as a section; empty where it was not asked."""
    if not limit:
        return {}
    if len(index) > limit:
        return {"not examined": f"{len(index)} pictures are more than report.doctor={limit}: run tools/doctor.py."}
    from detector.apps.doctor.examine import examine

    rpn = detector.network.rpn
    anchors = {key: getattr(rpn.options, key) for key in ("scales", "ratios", "foreground_iou")}
    diagnosis = examine(
        {"scored": (index.annotation_file, index.image_dir)},
        preprocessing=detector.preprocessing,
        anchors=anchors | {"stride": rpn.anchors.stride},
        workers=max(1, workers),
    )
    findings = {
        f"{finding.severity}: {finding.check}": {
            "count": finding.count,
            "what": finding.message,
            "examples": list(finding.examples),
            **({"remedy": finding.remedy} if finding.remedy else {}),
        }
        for finding in diagnosis.findings
    }
    return {"errors": diagnosis.counts["error"], "warnings": diagnosis.counts["warning"], **findings}


def _usual_canvas(detector: Detector, index: AnnotationIndex) -> tuple[int, int]:
    """Height and width of the padded input that most pictures have."""
    preprocessing = detector.preprocessing
    sizes = Counter((height, width) for height, width in index.sizes.tolist() if height and width)
    canvases: Counter[tuple[int, int]] = Counter()
    for size, count in sizes.items():
        canvases[canvas_size([preprocessing.target_size(*size)])] += count
    if canvases:
        return canvases.most_common(1)[0][0]
    return canvas_size([(preprocessing.short_side, preprocessing.long_side)])


def _yaml(values: Any) -> str:
    text: str = yaml.safe_dump(json.loads(json.dumps(values, default=str)), sort_keys=False, allow_unicode=True)
    return text
