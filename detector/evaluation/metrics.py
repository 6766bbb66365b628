"""How good detections are, by the figures of COCO, LVIS and Pascal VOC, against the data set's own annotations.

COCO: Lin et al. 2014 (Microsoft COCO) and https://cocodataset.org/#detection-eval. Crowd regions are ignored, not
counted; at most 100 detections an image and class; boxes in pixels of the original picture.

LVIS: Gupta et al. 2019 (LVIS) and lvis-api. For data sets in which nobody looked for every class in every picture: an
image lists the classes that it certainly lacks, `neg_category_ids`, and those of which some objects are not annotated,
`not_exhaustive_category_ids`. A detection of a class that is neither annotated there nor listed as lacking does not
count, nor does an unmatched one of a class that is not exhaustive; at most 300 detections an image, of all classes
together. LVIS has no crowd regions; where a file has some, they are ignored as in COCO.

Pascal VOC: see detector.evaluation.voc.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detector.errors import InputError
from detector.evaluation.backends import Scores, score_with_hotcoco, score_with_pycocotools
from detector.evaluation.columns import Found, GroundTruth
from detector.evaluation.tables import markdown_table
from detector.evaluation.voc import score_voc
from detector.files import write_json

# In the order of pycocotools' `stats`. AP: mean over IoU 0.50:0.95; s, m, l: area below 32^2, between, above 96^2;
# ARn: recall with at most n detections an image and class.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
# In the order of lvis-api. r, c, f: classes that the file calls rare, common, frequent; AR300: at most 300 an image.
LVIS_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR300", "ARs", "ARm", "ARl")
# What `evaluate` can be asked for.
PROTOCOLS = ("coco", "pycocotools", "lvis", "voc")

Source = Sequence[Mapping[str, Any]] | str | Path


def evaluate(
    results: Source,
    ground_truth: Mapping[str, Any] | str | Path,
    *,
    image_ids: Iterable[Any] | None = None,
    metrics: str = "coco",
) -> dict[str, Any]:
    """Score detections; prints nothing and changes neither argument.

    Args:
        results: COCO's results format, {"image_id", "category_id", "bbox", "score"} each, or a JSON file of it;
            boxes xywh in pixels of the original picture. May be empty.
        ground_truth: a COCO annotation file or its contents; `info`, `area`, `iscrowd` and annotation ids may be
            absent.
        image_ids: score these images only, for example the ones that a limit left; results on others do not count.
            None scores all images of the ground truth.
        metrics: "coco"; "pycocotools", the same figures from COCO's own code, slower; "lvis"; "voc".

    Returns:
        Each of METRICS (LVIS_METRICS for lvis) in [0, 1], and "per_class": {class name: AP}. None where no object of
        that size or class exists: COCO's -1. Objects that nothing was detected for give 0. For voc: see
        detector.evaluation.voc.score_voc.

    Raises:
        InputError: a file is missing or not JSON, a key is absent, a box is not four finite numbers, or an image or
            category id is not in the ground truth; `metrics` is unknown, or its package is not installed.
    """
    truth, found = _read(results, ground_truth, image_ids, metrics)
    if metrics == "voc":
        return score_voc(truth, found)
    return _figures(_score(truth, found, metrics), truth, metrics)


def evaluate_with_curves(
    results: Source,
    ground_truth: Mapping[str, Any] | str | Path,
    *,
    image_ids: Iterable[Any] | None = None,
    metrics: str = "coco",
) -> tuple[dict[str, Any], Curves]:
    """What `evaluate` returns, and the precision-recall curves behind it; not for voc, which has one IoU threshold.

    Raises:
        InputError: as `evaluate`.
    """
    if metrics == "voc":
        raise InputError("metrics=voc has no curves over IoU thresholds; take coco, pycocotools or lvis.")
    truth, found = _read(results, ground_truth, image_ids, metrics)
    scores = _score(truth, found, metrics)
    return _figures(scores, truth, metrics), _curves(scores, truth)


@dataclass(frozen=True, eq=False)
class Curves:
    """Precision over recall of K classes at T IoU thresholds, objects of every size, all detections that count.

    Attributes:
        class_names: K names.
        iou_thresholds: (T,) 0.50, 0.55 ... 0.95.
        recalls: (R,) 0.00, 0.01 ... 1.00.
        precision: (T, R, K), the best precision at this recall or a higher one, 0 where that is not reached; NaN for
            a class without objects.
        scores: (T, R, K), the score that a detection must have for this recall, 0 where that is not reached; NaN
            likewise.
        recall: (T, K), the highest recall that is reached; NaN likewise.
        objects: (K,) int64, how many objects there are to find; crowd regions are not among them.
    """

    class_names: tuple[str, ...]
    iou_thresholds: np.ndarray
    recalls: np.ndarray
    precision: np.ndarray
    scores: np.ndarray
    recall: np.ndarray
    objects: np.ndarray

    def per_class(self) -> dict[str, dict[str, float | None]]:
        """For each class AP, AP50, and AR (recall, mean over the thresholds); None without objects."""
        columns = {
            "AP": self.precision.mean(axis=(0, 1)),
            "AP50": self.precision[0].mean(axis=0),
            "AR": self.recall.mean(axis=0),
        }
        return {
            name: {key: None if np.isnan(values[k]) else float(values[k]) for key, values in columns.items()}
            for k, name in enumerate(self.class_names)
        }


def _read(results: Any, ground_truth: Any, image_ids: Iterable[Any] | None, metrics: str) -> tuple[GroundTruth, Found]:
    if metrics not in PROTOCOLS:
        raise InputError(f"metrics={metrics}: expected one of {', '.join(PROTOCOLS)}.")
    truth = GroundTruth(ground_truth, image_ids)
    return truth, truth.find(results)


def _score(truth: GroundTruth, found: Found, metrics: str) -> Scores:
    if metrics == "pycocotools":
        return score_with_pycocotools(truth, found)
    return score_with_hotcoco(truth, found, federated=metrics == "lvis")


def _figures(scores: Scores, truth: GroundTruth, metrics: str) -> dict[str, Any]:
    names = LVIS_METRICS if metrics == "lvis" else METRICS
    figures: dict[str, Any] = dict(zip(names, map(_figure, scores.stats), strict=True))
    precision = scores.precision[:, :, :, 0, -1]  # (IoU, recall, class): all areas, most detections
    figures["per_class"] = {
        name: _figure(precision[:, :, place].mean()) for place, name in enumerate(truth.class_names)
    }
    return figures


def _curves(scores: Scores, truth: GroundTruth) -> Curves:
    precision, reached, recall = (array[..., 0, -1] for array in (scores.precision, scores.scores, scores.recall))
    thresholds, recalls, classes = precision.shape
    objects = np.bincount(truth.classes[~truth.crowd], minlength=classes)
    absent = recall[0] < 0
    return Curves(
        class_names=tuple(truth.class_names),
        iou_thresholds=np.linspace(0.5, 0.95, thresholds),
        recalls=np.linspace(0, 1, recalls),
        precision=np.where(absent, np.nan, precision),
        scores=np.where(absent, np.nan, reached),
        recall=np.where(absent, np.nan, recall),
        objects=objects,
    )


def _figure(value: float) -> float | None:
    """COCO says -1 where there is nothing to find. A mean over one class is -1 or in [0, 1], never a mixture."""
    return None if value < 0 else float(value)


def save_metrics(metrics: Mapping[str, Any], path: str | Path) -> None:
    """Write what `evaluate` returned as JSON; figures that do not exist become null."""
    write_json(path, dict(metrics))


def format_table(metrics: Mapping[str, Any], title: str) -> str:
    """The figures and the AP of each class as text for a terminal or a Markdown page, ASCII lines only.

    Args:
        metrics: what `evaluate` returned.
        title: the first line.
    """
    figures = [(name, value) for name, value in metrics.items() if not isinstance(value, Mapping)]
    tables = [_table(figures, ("figure", "value"), columns=2)]
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
