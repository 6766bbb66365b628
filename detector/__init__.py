"""A light object detector: ShuffleNet V2 backbones with a Light-Head R-CNN head.

    import detector

    for found in detector.predict("street.jpg", ckpt="best.ckpt"):
        print(found.names, found.scores)

Importing the package is instant: torch and everything else is loaded when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detector.errors import InputError
    from detector.inference.detections import Detections
    from detector.inference.detector import Detector
    from detector.inference.loading import load, predict

__version__ = "0.1.0"
__all__ = ["Detections", "Detector", "InputError", "__version__", "load", "predict"]

# Public name -> the module that defines it.
_SOURCES = {
    "Detections": "detector.inference.detections",
    "Detector": "detector.inference.detector",
    "InputError": "detector.errors",
    "load": "detector.inference.loading",
    "predict": "detector.inference.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module 'detector' has no attribute {name!r}")
    value = getattr(import_module(_SOURCES[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
