"""What a user holds: a Detector (network, preprocessing, class names), loaded from one file, predicting on anything."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from detector.data.preprocess import Prepared, Preprocessing
from detector.errors import InputError
from detector.files import replacing
from detector.inference.detections import Found
from detector.inference.memory import keep_freed_memory
from detector.inference.operating_point import OperatingPoint
from detector.inference.predictor import Predictor
from detector.inference.shipped import find
from detector.models.build import NetworkOptions, build_network, check_fit
from detector.models.fuse import fuse, multiply_pointwise, round_weights
from detector.models.light_head_rcnn import LightHeadRCNN
from detector.models.weights import DamagedFileError, check_weights, read_tensors

FORMAT = "light-head-detector"
VERSION = 1
# Training wraps the network; its checkpoints carry this prefix, and so do those of `save`: one format.
PREFIX = "network."
Precision: TypeAlias = Literal["float32", "bf16"]
# What a checkpoint says about itself, beside format, version and provenance, and of which type.
DESCRIPTION = {"spec": dict, "class_names": list, "preprocessing": dict}


class Detector(Predictor):
    """A network with what it needs to be used: how to preprocess, and what its labels mean.

    Attributes:
        network: LightHeadRCNN.
        preprocessing: how an image becomes network input.
        class_names: label -> name.
        options: of the network.
        provenance: how it was made: config, epoch, metrics, versions. Plain values.
        operating_point: what its scores are worth.
        fused: the network is the faster form that cannot be trained or saved.
        precision: that it computes in.
    """

    def __init__(
        self,
        options: NetworkOptions,
        class_names: Sequence[str],
        preprocessing: Preprocessing,
        provenance: Mapping[str, Any] | None = None,
        operating_point: OperatingPoint | None = None,
    ) -> None:
        if not class_names:
            raise InputError("A detector needs at least one class name.")
        for name, count in Counter(class_names).items():
            if count > 1:
                raise InputError(f"class_names: {name!r} is there {count} times; give each class a name of its own.")
        self.options = options
        self.class_names = tuple(class_names)
        self.preprocessing = preprocessing
        self.provenance = dict(provenance or {})
        self.operating_point = (operating_point or OperatingPoint()).check(len(class_names))
        self.thresholds = self.operating_point.thresholds
        self.network: LightHeadRCNN = build_network(options, len(self.class_names))
        self.network.head.calibration = self.operating_point.calibration
        self.fused = False
        self.precision: Precision = "float32"

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        *,
        fused: bool = True,
        precision: Precision = "float32",
    ) -> Detector:
        """Read a checkpoint; data only, no code is run.

        Args:
            path: `best.ckpt` or `last.ckpt` of a run, what `save` wrote, or the name of a detector of this package
                (`shipped.names`).
            device: "cpu", "cuda", ...; None takes the GPU if there is one.
            fused: made for prediction (`models.fuse`): normalisation folded into the convolutions, no shuffles. The
                same boxes and scores up to rounding, sooner; but its maps c3, c4 and c5 have their channels in another
                order, and it cannot be trained or saved.
            precision: "bf16" computes in bfloat16, where `fused`: scores differ by about 0.01, AP by rounding.
                Sooner where the processor has such units (AMX, AVX512_BF16, a GPU), and later where it has not.

        Raises:
            InputError: no such file, not a checkpoint of this project, weights that do not fit its description, or
                the precision is unknown.
        """
        if precision not in get_args(Precision):
            raise InputError(f"precision={precision!r}: expected {' or '.join(get_args(Precision))}.")
        checkpoint = read_checkpoint(path := find(path))
        try:
            detector = cls._described(checkpoint)
        except (InputError, RuntimeError) as error:  # the latter where there is not enough memory
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"'{path}' does not fit its own description: it is damaged, or of another version ({reason}). "
                "Give another checkpoint."
            ) from error
        if fused:
            detector.network, detector.fused = fuse(detector.network), True
            detector.precision = precision
            prepare = multiply_pointwise if precision == "float32" else round_weights
            prepare(detector.network)
            keep_freed_memory()
        return detector.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @classmethod
    def _described(cls, checkpoint: Mapping[str, Any]) -> Detector:
        """The detector that a checkpoint describes, with its weights.

        Raises:
            InputError, RuntimeError: they do not fit; or there is not enough memory.
        """
        about = checkpoint["detector"]
        weights = {
            key.removeprefix(PREFIX): value for key, value in checkpoint["state_dict"].items() if key.startswith(PREFIX)
        }
        for key, kind in DESCRIPTION.items():
            if not isinstance(about.get(key), kind):
                raise InputError(f"{key} is missing")
        if not all(isinstance(name, str) for name in about["class_names"]):
            raise InputError("a class name is no text")
        if lacking := Preprocessing.model_fields.keys() - about["preprocessing"].keys():
            raise InputError(f"preprocessing.{min(lacking)} is missing")
        options = NetworkOptions.parse(about["spec"])
        preprocessing = Preprocessing.parse(about["preprocessing"])
        if not isinstance(provenance := about.get("provenance") or {}, dict):
            raise InputError(f"provenance is a {type(provenance).__name__}")
        check_fit(options, len(about["class_names"]), weights)
        if not isinstance(point := about.get("operating_point") or {}, dict):
            raise InputError(f"operating_point is a {type(point).__name__}")
        worth = OperatingPoint.parse(point, "operating_point")
        detector = cls(options, about["class_names"], preprocessing, provenance, worth)
        check_weights(detector.network.state_dict(), weights)
        detector.network.load_state_dict(weights)
        return detector

    def describe(self) -> dict[str, Any]:
        """Everything but the weights, in plain types: the `detector` entry of a checkpoint."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "spec": self.options.spec(),
            "class_names": list(self.class_names),
            "preprocessing": self.preprocessing.to_dict(),
            "provenance": self.provenance,
            "operating_point": self.operating_point.to_dict(),
        }

    def save(self, path: str | Path, *, half: bool = False) -> None:
        """Write a checkpoint that `load` reads. Written beside, then renamed: a broken write leaves the old file.

        Args:
            path: of the file.
            half: kernels and matrices in half precision, half the bytes; `load` gives float32 again. What belongs to a
                channel (normalisation, biases) stays float32, as does what half precision would make infinite.

        Raises:
            InputError: the detector is fused: its folded weights fit no description.
        """
        if self.fused:
            raise InputError("A fused detector cannot be saved: load it with Detector.load(path, fused=False).")
        state = {PREFIX + key: value.cpu() for key, value in self.network.state_dict().items()}
        if half:
            state = {key: _halved(value) for key, value in state.items()}
        with replacing(path) as partial:
            torch.save({"detector": self.describe(), "state_dict": state}, partial)

    def to(self, device: str | torch.device) -> Detector:
        """Move the network; returns self. Raises InputError where the device does not exist."""
        try:
            self.network.to(device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"Cannot use device '{device}': {error}") from error
        return self

    @property
    def device(self) -> torch.device:
        return self.network.mean.device

    @property
    def proposal_limit(self) -> int:  # type: ignore[override]
        """The number of proposals that the network was made for."""
        return self.network.rpn.options.test_limits.after_nms

    def detect(self, prepared: Prepared, max_proposals: int | None = None) -> list[Found]:
        """See `Predictor.detect`."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            found = self.network.eval().detect(*self.inputs(prepared), max_proposals)
        boxes, scores = found.boxes.float().cpu().numpy(), found.scores.float().cpu().numpy()
        labels, counts = found.labels.cpu().numpy(), found.counts.tolist()
        return [Found(boxes[i, :n], scores[i, :n], labels[i, :n]) for i, n in enumerate(counts)]

    def inputs(self, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """What the network takes, images and their sizes, on its device."""
        return torch.from_numpy(prepared.images).to(self.device), torch.from_numpy(prepared.image_sizes).to(self.device)


def _halved(weights: Tensor) -> Tensor:
    """In half precision, where rounding costs nothing: its steps are fine beside the largest weights of a kernel, but
    the variances of normalisation span more powers of ten than it has, and a channel's scale has nothing beside it."""
    small = weights.half()
    return small if weights.is_floating_point() and weights.ndim > 1 and torch.isfinite(small).all() else weights


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint as plain data.

    Raises:
        InputError: missing, truncated, of another project or of a newer version.
    """
    checkpoint = read_torch_file(path)
    match checkpoint:
        case {"detector": {"format": kind, "version": int(version), **about}, "state_dict": dict(weights)}:
            known = kind == FORMAT and all(isinstance(key, str) for key in weights)
        case _:
            known = False
    if not known:
        raise InputError(
            f"'{path}' is a torch file, but not a detector checkpoint. Backbone weights go to backbone.weights=PATH."
        )
    if version > VERSION:
        raise InputError(f"'{path}' has format version {version}; this package reads up to {VERSION}: update it.")
    provenance = about.get("provenance")
    for recorded in (about.get("spec"), provenance.get("config") if isinstance(provenance, dict) else None):
        match recorded:
            case {"rpn": dict(rpn)}:  # written before there was this option: then it was not done
                rpn.setdefault("inside_only", False)
    return checkpoint


def read_torch_file(path: str | Path) -> Any:
    """What a file of torch.save holds, as data; no code is run.

    Raises:
        InputError: missing or truncated.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike pathlib's, no error for a name that no file can have
        raise InputError(f"No checkpoint at '{path}'. Give the path of a best.ckpt or last.ckpt that training wrote.")
    try:
        return read_tensors(path)
    except DamagedFileError as error:
        raise InputError(
            f"'{path}' cannot be read as a checkpoint: it is truncated, or of another program ({error})."
        ) from error
