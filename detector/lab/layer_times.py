"""Latency of a detector from its operations: a linear model, fitted on detectors that were measured on this machine.

The kinds of operations are those of `roofline`. Its rates are of layers and of backbones alone; here whole detections
are measured, from an image to boxes, and a model of one space of networks may be more exact than one of all.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from detector.lab.capacity import detection_operations
from detector.lab.roofline import features, fit_costs
from detector.lab.space import DetectorOptions


def terms(options: DetectorOptions) -> np.ndarray:
    """(T,) What the latency of a detection is a sum of: `roofline.features` of its operations, and 1 for what is always
    done (the image's resizing, decoding, suppression). What each costs is learned."""
    return np.append(features(detection_operations(options)), 1.0)


def held_out_errors(known: ArrayLike, seconds: ArrayLike, folds: int = 5) -> np.ndarray:
    """Relative error (N,) of each detector, predicted by a fit to those of the other folds."""
    design, measured = np.array(known), np.array(seconds)
    predicted, places = np.zeros(len(measured)), np.arange(len(measured)) % folds
    for fold in range(folds):
        out = places == fold
        predicted[out] = design[out] @ fit_costs(design[~out], measured[~out])
    return predicted / measured - 1
