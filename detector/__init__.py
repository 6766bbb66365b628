"""A light object detector: ShuffleNet V2 backbones with a Light-Head R-CNN head.

    import detector

    for found in detector.predict("street.jpg", ckpt="best.ckpt"):
        print(found.names, found.scores)

    run_dir = detector.train(recipe="finetune", data_root="my_data")    # needs the extra `train`
    metrics = detector.evaluate(run_dir / "best.ckpt")

Importing the package is instant: torch and everything else is loaded when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detector.cli import evaluate, train
    from detector.errors import InputError
    from detector.inference.detections import Detections
    from detector.inference.detector import Detector
    from detector.inference.loading import load, predict

__version__ = "0.1.0"
__all__ = ["Detections", "Detector", "InputError", "__version__", "evaluate", "load", "predict", "train"]

# Public name -> the module that defines it.
_SOURCES = {
    "Detections": "detector.inference.detections",
    "Detector": "detector.inference.detector",
    "InputError": "detector.errors",
    "evaluate": "detector.cli",
    "load": "detector.inference.loading",
    "predict": "detector.inference.loading",
    "train": "detector.cli",
}


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module 'detector' has no attribute {name!r}")
    value = getattr(import_module(_SOURCES[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
