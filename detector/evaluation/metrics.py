"""How good detections are, by the metrics of COCO, LVIS and Pascal VOC, against the data set's own annotations.

COCO: Lin et al. 2014 (Microsoft COCO) and https://cocodataset.org/#detection-eval. Crowd regions are ignored, not
counted; at most 100 detections an image and class; boxes in pixels of the original image.

LVIS: Gupta et al. 2019 (LVIS) and lvis-api. For data sets in which nobody looked for every class in every image: an
image lists the classes that it certainly lacks, `neg_category_ids`, and those of which some objects are not annotated,
`not_exhaustive_category_ids`. A detection of a class that is neither annotated there nor listed as lacking does not
count, nor does an unmatched one of a class that is not exhaustive; at most 300 detections an image, of all classes
together. LVIS has no crowd regions; where a file has some, they are ignored as in COCO.

Pascal VOC: see detector.evaluation.voc.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detector.data.index import AnnotationIndex
from detector.data.results import Results
from detector.errors import InputError
from detector.evaluation.backends import hotcoco_evaluation, pycocotools_evaluation, score
from detector.evaluation.records import by_id
from detector.evaluation.tables import markdown_table
from detector.evaluation.voc import score_voc
from detector.files import write_json

# In the order of pycocotools' `stats`. AP: mean over IoU 0.50:0.95; s, m, l: area below 32^2, between, above 96^2;
# ARn: recall with at most n detections an image and class.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
# In the order of lvis-api. r, c, f: classes that the file calls rare, common, frequent; AR300: at most 300 an image.
LVIS_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR300", "ARs", "ARm", "ARl")
# What `compute_metrics` can be asked for.
PROTOCOLS = ("coco", "pycocotools", "lvis", "voc")


def compute_metrics(results: Results, index: AnnotationIndex, metrics: str = "coco") -> dict[str, Any]:
    """Score detections. Reads no file, prints nothing and changes neither argument.

    Args:
        results: what was found on the images of the index.
        index: the ground truth. Objects without area inside their image count, and can never be found, as in
            pycocotools.
        metrics: "coco"; "pycocotools", the same from COCO's own code, slower; "lvis"; "voc".

    Returns:
        Each of METRICS (LVIS_METRICS for lvis) in [0, 1], and "per_class": {class name: AP}. None where no object of
        that size or class exists: COCO's -1. Objects that nothing was detected for give 0. For voc: see
        detector.evaluation.voc.score_voc.

    Raises:
        InputError: `metrics` is unknown, or its package is not installed; for lvis, the ground truth does not say what
            was looked for.
    """
    if metrics not in PROTOCOLS:
        raise InputError(f"metrics={metrics}: expected one of {', '.join(PROTOCOLS)}.")
    results, index = by_id(results, index)
    if metrics == "voc":
        return score_voc(results, index)
    names = LVIS_METRICS if metrics == "lvis" else METRICS
    if metrics == "pycocotools":
        evaluation = pycocotools_evaluation(results, index)
    else:
        evaluation = hotcoco_evaluation(results, index, federated=metrics == "lvis")
    scores = score(evaluation)
    found: dict[str, Any] = dict(zip(names, map(_existing, scores.stats), strict=True))
    precision = scores.precision[:, :, :, 0, -1]  # (IoU, recall, class): all areas, most detections
    found["per_class"] = {
        name: _existing(precision[:, :, place].mean()) for place, name in enumerate(index.class_names)
    }
    return found


def _existing(value: float) -> float | None:
    """COCO says -1 where there is nothing to find. A mean over one class is -1 or in [0, 1], never a mixture."""
    return None if value < 0 else float(value)


def save_metrics(metrics: Mapping[str, Any], path: str | Path) -> None:
    """Write what `compute_metrics` returned as JSON; metrics that do not exist become null."""
    write_json(path, dict(metrics))


def format_table(metrics: Mapping[str, Any], title: str) -> str:
    """The metrics and the AP of each class as text for a terminal or a Markdown page, ASCII lines only.

    Args:
        metrics: what `compute_metrics` returned.
        title: the first line.
    """
    numbers = [(name, value) for name, value in metrics.items() if not isinstance(value, Mapping)]
    tables = [_table(numbers, ("metric", "value"), columns=2)]
    for key, head in (("per_class", "AP"), ("per_class_07", "AP07")):
        if per_class := list(metrics.get(key, {}).items()):
            tables.append(_table(per_class, ("class", head), columns=1 if len(per_class) <= 10 else 3))
    return "\n".join((title, "", *tables)).rstrip("\n")


def _table(rows: list[tuple[str, float | None]], heads: tuple[str, str], columns: int) -> str:
    """Name and value pairs, read from top to bottom in each of `columns` columns."""
    height = -(-len(rows) // columns)
    lines = [[cell for name, value in rows[line::height] for cell in (name, _format(value))] for line in range(height)]
    lines = [line + [""] * (2 * columns - len(line)) for line in lines]
    return markdown_table(heads * columns, lines, align="lr" * columns, width=100) + "\n"


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
