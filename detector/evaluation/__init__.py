"""How good are the detections: COCO's figures, LVIS's, and Pascal VOC's."""

from detector.evaluation.metrics import (
    LVIS_METRICS,
    METRICS,
    PROTOCOLS,
    Curves,
    evaluate,
    evaluate_with_curves,
    format_table,
    save_metrics,
)

__all__ = [
    "LVIS_METRICS",
    "METRICS",
    "PROTOCOLS",
    "Curves",
    "evaluate",
    "evaluate_with_curves",
    "format_table",
    "save_metrics",
]
