"""The data doctor: everything that is wrong or odd about a data set, before a run is spent on it.

Training stops at the first error of an annotation file; here all faults are listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from detector.apps.doctor.boxes import check_anchors, check_balance, check_boxes, check_faults
from detector.apps.doctor.images import box_frames, check_files, check_repeats
from detector.data.alike import look_at_all
from detector.data.finding import ERROR, INFO, WARNING, Finding
from detector.data.index import Splits
from detector.data.preprocess import Preprocessing
from detector.data.split_checks import check_splits
from detector.evaluation.tables import markdown_table

if TYPE_CHECKING:
    from detector.models.rpn import RPNOptions

_ORDER = (ERROR, WARNING, INFO)


@dataclass(frozen=True)
class Diagnosis:
    """All findings about a data set, worst first.

    Attributes:
        splits: {split name: {"annotations": file, "images": folder, "pictures": M, "boxes": B}}.
        findings: of the checks that found something.
    """

    splits: dict[str, dict[str, Any]]
    findings: list[Finding]

    @property
    def counts(self) -> dict[str, int]:
        """Findings of each severity."""
        return {severity: sum(f.severity == severity for f in self.findings) for severity in _ORDER}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON file or a section of a report."""
        findings = [finding.to_dict() for finding in self.findings]
        return {"splits": self.splits, "counts": self.counts, "findings": findings}


def examine(
    splits: Splits, *, preprocessing: Preprocessing, anchors: tuple[RPNOptions, int] | None = None, workers: int = 1
) -> Diagnosis:
    """Run every check on a data set. All images are decoded.

    Args:
        splits: the annotations of each, as `read_annotations` gives them, the training split first.
        preprocessing: the training input; sizes of objects are judged there.
        anchors: options and stride of the region proposal network; None leaves its anchors alone.
        workers: threads that decode.
    """
    usable = {split: index for split, index in splits.items() if len(index)}
    images = look_at_all(usable, workers)
    sizes = {split: box_frames(index, images[split]) for split, index in usable.items()}
    findings = [
        *check_faults(splits),
        *check_splits(usable),
        *check_boxes(usable, sizes, preprocessing),
        *check_files(usable, images),
        *check_repeats(usable, images),
        *check_balance(usable),
    ]
    if anchors and usable:
        trained = next(iter(usable))
        findings += check_anchors(usable[trained], sizes[trained], preprocessing, *anchors)
    findings.sort(key=lambda finding: _ORDER.index(finding.severity))
    about = {
        split: {
            "annotations": str(index.annotation_file),
            "images": str(index.image_dir),
            "pictures": len(index),
            "boxes": len(index.labels),
        }
        for split, index in splits.items()
    }
    return Diagnosis(about, findings)


def format_diagnosis(diagnosis: Diagnosis) -> str:
    """A table of the findings, then each with its first examples and remedy; for a terminal or a Markdown page."""
    lines = [
        f"{name}: {about['pictures']} images, {about['boxes']} boxes, {about['annotations']}"
        for name, about in diagnosis.splits.items()
    ]
    rows = [(finding.severity, finding.check, finding.count, finding.message) for finding in diagnosis.findings]
    lines += ["", markdown_table(("severity", "check", "count", "what"), rows, align="llll"), ""]
    for finding in diagnosis.findings:
        lines.append(f"{finding.severity} {finding.check}: {finding.count} {finding.message}")
        lines += [f"    {example}" for example in finding.first]
        hidden = finding.count - len(finding.first)
        if finding.severity != INFO and finding.check != "anchor_coverage" and hidden > 0:
            lines.append(f"    ... and {hidden} more: doctor.json")
        if finding.remedy:
            lines.append(f"    -> {finding.remedy}")
    counts = diagnosis.counts
    return "\n".join([*lines, "", f"{counts[ERROR]} errors, {counts[WARNING]} warnings"])
