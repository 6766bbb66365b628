"""How good are the detections: COCO's metrics, LVIS's, and Pascal VOC's. Arrays in, plain numbers out."""

from detector.evaluation.metrics import LVIS_METRICS, METRICS, PROTOCOLS, compute_metrics, format_table, save_metrics

__all__ = ["LVIS_METRICS", "METRICS", "PROTOCOLS", "compute_metrics", "format_table", "save_metrics"]
