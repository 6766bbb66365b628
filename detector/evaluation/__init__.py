"""How good are the detections: COCO's figures."""

from detector.evaluation.coco import METRICS, evaluate, format_table, save_metrics

__all__ = ["METRICS", "evaluate", "format_table", "save_metrics"]
