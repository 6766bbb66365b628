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
from detector.data.annotations import AnnotationIndex, load_annotations
from detector.data.preprocess import canvas_size
from detector.errors import InputError
from detector.evaluation.clock import Clock
from detector.evaluation.diagnosis import diagnose
from detector.evaluation.metrics import evaluate, format_table, save_metrics
from detector.files import write_json
from detector.training.checks import check_values

if TYPE_CHECKING:
    from detector.inference.detector import Detector
    from detector.inference.runtime import ExportedDetector

log = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Any]]


def evaluate_results(config: Mapping[str, Any]) -> dict[str, Any]:
    """Score results in COCO's format without a model; writes metrics.json, diagnosis.json and report.html.

    Args:
        config: `results` and `annotations`, files; `images`, the folder of the pictures, or None; `out`, `metrics` and
            `report` as conf/eval.yaml describes them.

    Returns:
        What detector.evaluation.evaluate returns.

    Raises:
        InputError: a file is missing or damaged, or they do not belong together.
    """
    clock = Clock()
    check_values(config)
    path, annotations = Path(str(config["results"])), config["annotations"]
    if config["ckpt"]:
        raise InputError(f"Both ckpt={config['ckpt']} and results={path}: give one of them.")
    if not annotations:
        raise InputError(f"results={path} needs the ground truth: add annotations=instances.json.")
    if config["max_proposals"]:
        raise InputError(f"max_proposals={config['max_proposals']} needs the detector: give ckpt= instead of results=.")
    figures = evaluate(path, annotations, metrics=config["metrics"])
    clock.book("metrics")
    out = Path(str(config["out"])) if config["out"] else path.parent / "eval"
    save_metrics(figures, out / "metrics.json")
    clock.book("files")
    log.info("\n%s\n", format_table(figures, f"{path} against {annotations}"))
    if not config["report"]:
        log.info("metrics.json in %s", out)
        return figures
    rows = json.loads(path.read_text(encoding="utf-8"))
    index = load_annotations(annotations, config["images"]) if config["images"] else None
    clock.book("load")
    reporter = _Reporter(out, config, clock, figures, rows, Path(annotations), index)
    reporter.write(
        title=f"Evaluation of {path.name}",
        cost=None,
        two_stages=None,
        provenance=[("results", str(path)), ("annotations", str(annotations))],
        configs=[("Configuration of this evaluation", _yaml(config))],
        left_out={
            "model": "There is no model: results from a file were scored (results=).",
            "proposals": "The two stages can be looked at where there is a model: give ckpt= instead of results=.",
        },
    )
    return figures


def report_on_checkpoint(
    out: Path,
    config: Mapping[str, Any],
    clock: Clock,
    detector: Detector,
    index: AnnotationIndex,
    results: Rows,
    figures: Mapping[str, Any],
    seconds_per_image: Sequence[float],
) -> None:
    """Write diagnosis.json and report.html of a detector that has been scored.

    Args:
        out: the folder.
        config: of the evaluation.
        clock: what the run has taken until here; goes on.
        detector: on the device that it is to be timed on.
        index: the pictures that were scored.
        results, figures: its detections on them in COCO's format, and the figures.
        seconds_per_image: of network and post-process, for each batch.
    """
    stages, left_out = None, {}
    if config["report"]["proposals"]:
        from detector.apps.report.two_stages import two_stages

        stages = two_stages(detector, index, limit=config["report"]["proposals"])
        clock.book("proposals")
    else:
        left_out["proposals"] = "The two stages were not looked at apart (report.proposals=0)."
    cost = _cost(detector, index, config, seconds_per_image)
    clock.book("cost")
    examined = _examined(detector, index, config)
    clock.book("doctor")
    made = detector.provenance
    reporter = _Reporter(out, config, clock, figures, results, index.annotation_file, index)
    reporter.write(
        title=f"Evaluation of {Path(str(config['ckpt'])).name}",
        cost=cost,
        two_stages=stages,
        provenance=[
            ("checkpoint", str(config["ckpt"])),
            *((key, str(made[key])) for key in ("epoch", "step", "created", "torch") if key in made),
            ("annotations", str(index.annotation_file)),
            ("pictures", str(index.image_dir)),
        ],
        configs=[
            ("Configuration of this evaluation", _yaml(config)),
            ("The network", _yaml(detector.describe()["spec"])),
            *([("Configuration of the training run", _yaml(made["config"]))] if made.get("config") else []),
        ],
        left_out=left_out,
        extra=[("Data set", examined)] if examined else [],
    )


def report_on_export(
    out: Path,
    config: Mapping[str, Any],
    clock: Clock,
    detector: ExportedDetector,
    index: AnnotationIndex,
    results: Rows,
    figures: Mapping[str, Any],
) -> None:
    """As `report_on_checkpoint`, for a file of tools/export.py: its stages cannot be looked at apart."""
    checkpoint = "give the checkpoint itself, ckpt=best.ckpt."
    reporter = _Reporter(out, config, clock, figures, results, index.annotation_file, index)
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
        configs=[("Configuration of this evaluation", _yaml(config))],
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
        config: Mapping[str, Any],
        clock: Clock,
        figures: Mapping[str, Any],
        results: Rows,
        ground_truth: Path,
        index: AnnotationIndex | None,
    ) -> None:
        self.out, self.options, self.metrics, self.clock = out, config["report"], config["metrics"], clock
        self.figures, self.results, self.ground_truth, self.index = figures, results, ground_truth, index

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
        measured = self.index if self.options["properties"] else None
        diagnosis = diagnose(
            self.results,
            self.ground_truth,
            image_ids=self.index.image_ids if self.index else None,
            images=measured,
            image_limit=self.options["properties"] or None,
            worst_count=self.options["pictures"],
        )
        write_json(self.out / "diagnosis.json", diagnosis | {"two_stages": two_stages})
        self.clock.book("diagnosis")
        pictures, reasons = self._pictures(diagnosis)
        now = datetime.now().isoformat(sep=" ", timespec="minutes")
        counts = (("images", "pictures"), ("truths", "objects"), ("detections", "detections"))
        about = [", ".join(f"{diagnosis[key]:,} {word}" for key, word in counts), f"figures: {self.metrics}", now]
        if self.metrics == "lvis":
            about.append("below the figures, what nobody looked for counts as wrong, as in COCO")
        self.clock.book("report")
        size = write_report(
            self.out / "report.html",
            Report(
                title=title,
                about=about,
                metrics=self.figures,
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
        if self.index is None:
            return [], {"pictures": "There are no pictures: give their folder (images=DIR) to see the worst of them."}
        if not self.options["pictures"]:
            return [], {"pictures": "No picture was wanted (report.pictures=0)."}
        shown = worst_at_any_threshold(diagnosis["worst"], self.results, self.ground_truth)
        place = {image_id: i for i, image_id in enumerate(self.index.image_ids)}
        index = self.index
        names = diagnosis["confusion"]["names"][:-1]
        return list(picture_entries(shown, names, lambda image: index.read(place[image]), PICTURE_BUDGET)), {}


def _cost(
    detector: Detector, index: AnnotationIndex, config: Mapping[str, Any], seconds_per_image: Sequence[float]
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
        ("device", f"{device}, {config['trainer']['precision']}, {machine()}"),
    ]
    if seconds_per_image:
        median = 1000 * statistics.median(seconds_per_image)
        cards.append(("ms", median, "a picture, median of the batches"))
        batch = f"batches of up to {config['val']['batch_size']}"
        pairs.append(
            ("speed", f"{median:.3g} ms a picture, median over {len(seconds_per_image)} {batch}; without reading")
        )
    return {"cards": cards, "pairs": pairs}


def _examined(detector: Detector, index: AnnotationIndex, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the data doctor finds in the split that was scored, as a section; empty where it was not asked."""
    limit = config["report"]["doctor"]
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
        workers=max(1, config["workers"]),
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
