"""Open any file that holds a detector: a checkpoint, also one of the package's, or an export, which needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from detector.errors import InputError
from detector.inference.detections import Detections
from detector.inference.runtime import ExportedDetector, check_threads, is_export
from detector.inference.shipped import DEFAULT

if TYPE_CHECKING:
    import torch

    from detector.inference.detector import Detector, Precision


def load(
    path: str | Path = DEFAULT,
    device: str | torch.device | None = None,
    *,
    threads: int | None = None,
    precision: Precision = "float32",
) -> Detector | ExportedDetector:
    """Open a detector by the kind of its file; both kinds predict alike.

    Args:
        path: a checkpoint (.ckpt, .pt), an export: .onnx, .xml (OpenVINO) or .pt2 (torch.export), or the name of a
            detector of this package (`shipped.names`).
        device: "cpu", "cuda", ...; None takes the GPU for a checkpoint if there is one, the CPU for an export.
        threads: that one prediction may use; None leaves it to the runtime. torch has one number for the process.
        precision: "bf16" for a checkpoint: see `Detector.load`.

    Raises:
        InputError: see `Detector.load` and `ExportedDetector.load`.
    """
    if is_export(path):
        if precision != "float32":
            raise InputError(f"precision={precision}: that of an export was fixed when it was written.")
        return ExportedDetector.load(path, None if device is None else str(device), threads=threads)
    from detector.inference.detector import Detector

    check_threads(threads)
    if threads:
        import torch

        torch.set_num_threads(threads)
    return Detector.load(path, device, precision=precision)


def predict(
    source: Any,
    *,
    ckpt: str | Path = DEFAULT,
    device: str | torch.device | None = None,
    threads: int | None = None,
    precision: Precision = "float32",
    **options: Any,
) -> list[Detections]:
    """Open a file and find objects in images: see `Predictor.predict`. To predict often, `load` once."""
    return load(ckpt, device, threads=threads, precision=precision).predict(source, **options)
