"""Predict with an exported detector: ONNX Runtime and OpenVINO without torch, torch.export with it.

from detector.inference.runtime import ExportedDetector

for found in ExportedDetector.load("best.onnx").predict("street.jpg"):
    print(found.names, found.scores)
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from detector.data.preprocess import Prepared, pad
from detector.errors import InputError, require
from detector.files import check_sums
from detector.inference.detections import Found
from detector.inference.export_info import KEYS, SECTION, ExportInfo
from detector.inference.openvino_core import openvino_core
from detector.inference.predictor import Predictor

# images (N, H, W, 3), image_sizes -> boxes, scores, labels, counts: see DetectionGraph.forward.
Run: TypeAlias = Callable[[np.ndarray, np.ndarray], list[np.ndarray]]
INPUTS = ("images", "image_sizes")
OUTPUTS = ("boxes", "scores", "labels", "counts")
# A map of one row or column has another memory layout; torch.export guards against it.
SMALLEST_TORCH_CANVAS = (64, 64)
# Calls with one shape of images before OpenVINO compiles for it, and for how many shapes it may: see `specialised`.
OFTEN, SPECIALISED = 50, 4


class ExportedDetector(Predictor):
    """A detector in another runtime; predicts as `Detector` does.

    Attributes:
        class_names, preprocessing: as of the checkpoint.
        canvas: where it was fixed in the export; images that would not fit are shrunk further.
        info: what the file says about itself.
        path: of the file.
    """

    def __init__(self, info: ExportInfo, run: Run, path: Path, smallest: tuple[int, int] = (0, 0)) -> None:
        """
        Args:
            info: of the file.
            run: one call of the graph.
            path: of the file, for messages.
            smallest: height and width below which the runtime cannot go.
        """
        self.info, self.path = info, path
        self.class_names, self.thresholds = info.class_names, info.thresholds
        self.preprocessing, self.canvas = info.preprocessing, info.canvas
        self._run, self._smallest = run, smallest

    @property
    def provenance(self) -> dict[str, Any]:
        """How it was made."""
        return dict(self.info.provenance)

    @classmethod
    def load(cls, path: str | Path, device: str | None = None, *, threads: int | None = None) -> ExportedDetector:
        """Open an export. A .pt2 only of people you trust: torch may run code that is in it.

        Args:
            path: .onnx, .xml (OpenVINO; its .bin lies beside) or .pt2 (torch.export).
            device: None or "cpu"; "cuda", "cuda:1" for ONNX Runtime, "gpu" for OpenVINO (Intel), where their packages
                have it.
            threads: that one prediction may use; None leaves it to the runtime. torch has one number for the process.

        Raises:
            InputError: no such file, not an export of this project, damaged, of a newer version, or the runtime is not
                installed.
        """
        path = Path(path)
        if path.suffix not in OPENERS:
            raise InputError(f"'{path}' is no export: expected a file that ends in {', '.join(OPENERS)}.")
        if not os.path.isfile(path):  # unlike pathlib's, no error for a name that no file can have
            raise InputError(f"No exported detector at '{path}'. Make one with tools/export.py.")
        check_threads(threads)
        info, run, smallest = OPENERS[path.suffix](path, str(device or "cpu").lower(), threads)
        return cls(info, run, path, smallest)

    def detect(self, prepared: Prepared, max_proposals: int | None = None) -> list[Found]:
        """See `Predictor.detect`; raises InputError, too, where the runtime cannot run the graph."""
        self.check_proposals(max_proposals)
        height, width = self.canvas or np.maximum(prepared.images.shape[2:], self._smallest).tolist()
        images = prepared.images.transpose(0, 2, 3, 1)
        if images.shape[1:3] != (height, width):
            images = pad(list(images), (height, width)).transpose(0, 2, 3, 1)
        images = np.ascontiguousarray(images)  # as `pad` has them in memory already
        step = self.info.batch or len(images)
        found: list[Found] = []
        for start in range(0, len(images), step):
            place = slice(start, start + step)
            # A byte that changed may leave a graph that loads; a full memory of the device is said here, too.
            with _told(self.path, "could not be run", "If the file may be damaged, export it again."):
                boxes, scores, labels, counts = self._run(images[place], prepared.image_sizes[place])
                found += [Found(boxes[i, :n], scores[i, :n], labels[i, :n]) for i, n in enumerate(counts.tolist())]
        return found


def _open_onnx(path: Path, device: str, threads: int | None) -> tuple[ExportInfo, Run, tuple[int, int]]:
    onnxruntime = require("onnxruntime", package="[onnx]", what=f"'{path}'")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = threads or 0
    names = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "gpu": "CUDAExecutionProvider"}
    kind, _, number = device.partition(":")
    provider = names.get(kind)
    if provider not in onnxruntime.get_available_providers() or not (number or "0").isdecimal():
        raise _no_device(device, "ONNX Runtime")
    chosen = provider if kind == "cpu" else (provider, {"device_id": int(number or 0)})
    with _reading(path, "an ONNX file"):
        session = onnxruntime.InferenceSession(str(path), options, providers=[chosen])
    if provider not in session.get_providers():  # it goes to the CPU in silence where CUDA's libraries are missing
        raise _no_device(device, "ONNX Runtime")
    info = ExportInfo.from_properties(session.get_modelmeta().custom_metadata_map, path)

    def run(images: np.ndarray, image_sizes: np.ndarray) -> list[np.ndarray]:
        return session.run(list(OUTPUTS), dict(zip(INPUTS, (images, image_sizes), strict=True)))

    return info, run, (0, 0)


def _open_openvino(path: Path, device: str, threads: int | None) -> tuple[ExportInfo, Run, tuple[int, int]]:
    require("openvino", package="[openvino]", what=f"'{path}'")
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise InputError(f"'{path}' has no '{weights.name}' beside it: an OpenVINO export is two files, copy both.")
    core = openvino_core()
    with _reading(path, "an OpenVINO model"):
        model = core.read_model(path)
        properties = {
            key: str(model.get_rt_info([SECTION, key]).value)
            for key in ("format", *KEYS, "weights_sha256")
            if model.has_rt_info([SECTION, key])
        }
    info = ExportInfo.from_properties(properties, path)
    if properties.get("weights_sha256") != json.dumps(sha256(weights)):
        raise InputError(f"'{weights}' is damaged, or belongs to another '{path.name}'. Copy or export both again.")
    options = openvino_options(threads)
    if device.upper().partition(".")[0] not in {name.partition(".")[0] for name in core.available_devices}:
        raise _no_device(device, "OpenVINO")
    with _reading(path, "an OpenVINO model"):
        run = openvino_run(core.compile_model(model, device.upper(), options))
    if info.batch and info.canvas:
        return info, run, (0, 0)

    def compile_for(shape: tuple[int, ...]) -> Run:
        fixed = model.clone()
        fixed.reshape(dict(zip(INPUTS, (list(shape), [shape[0], 2]), strict=True)))
        return openvino_run(core.compile_model(fixed, device.upper(), options))

    return info, specialised(run, compile_for), (0, 0)


def openvino_options(threads: int | None) -> dict[str, Any]:
    """What a model is compiled with: one prediction at a time, as soon as can be, in float32 where it is not int8."""
    # Processors with bfloat16 would use it unasked.
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    return options


def specialised(run: Run, compile_for: Callable[[tuple[int, ...]], Run]) -> Run:
    """`run`, but a graph of its own for each of a few shapes of images that come often: those of a camera or a video.

    OpenVINO works out every shape anew in each call where they may change: a fifth to a half of its time. Compiling
    takes it some tenths of a second, so a shape (batch, height and width) has to come OFTEN first.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    own: dict[tuple[int, ...], Run] = {}
    lock = threading.Lock()

    def choose(shape: tuple[int, ...]) -> Run:
        with lock:
            if shape not in own:
                seen[shape] += 1
                if seen[shape] <= OFTEN or len(own) == SPECIALISED:
                    return run
                own[shape] = compile_for(shape)
            return own[shape]

    return lambda images, image_sizes: choose(images.shape)(images, image_sizes)


def openvino_run(compiled: Any) -> Run:
    """How an export's openvino.CompiledModel is called, from any thread: it has room for the results of one call."""
    lock = threading.Lock()

    def run(images: np.ndarray, image_sizes: np.ndarray) -> list[np.ndarray]:
        with lock:
            found = compiled(dict(zip(INPUTS, (images, image_sizes), strict=True)), share_inputs=True)
            return [found[name] for name in OUTPUTS]

    return run


def _open_torch(path: Path, device: str, threads: int | None) -> tuple[ExportInfo, Run, tuple[int, int]]:
    # torchvision brings the operator for suppression.
    torch = require("torchvision", "torch", package="torch torchvision", what=f"'{path}'")
    if device != "cpu":
        raise InputError(f"device={device!r}: a .pt2 runs on the CPU; load the checkpoint itself for another device.")
    with _reading(path, "a torch.export file"), zipfile.ZipFile(path) as archive:
        check_sums(archive)
        about = [name for name in archive.namelist() if name.endswith(f"/extra/{SECTION}.json")]
        properties = dict(json.loads(archive.read(about[0]))) if about else {}
    # Before torch, which unpickles parts of the file and evaluates expressions; no protection from who means harm.
    info = ExportInfo.from_properties(properties, path)
    with _reading(path, "a torch.export file"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own file format
        module = torch.export.load(str(path)).module()
    if threads:
        torch.set_num_threads(threads)

    def run(images: np.ndarray, image_sizes: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            outputs = module(torch.from_numpy(images), torch.from_numpy(image_sizes))
        return [output.numpy() for output in outputs]

    return info, run, SMALLEST_TORCH_CANVAS


# How each kind of file is opened; other files are checkpoints.
OPENERS = {".onnx": _open_onnx, ".xml": _open_openvino, ".pt2": _open_torch}


def check_threads(threads: int | None) -> None:
    """Raises InputError where it is neither None nor a whole number, 1 or more."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads={threads}; expected a whole number, 1 or more, or nothing.")


def is_export(path: str | Path) -> bool:
    """Whether a file's name is that of an export; anything else is taken for a checkpoint."""
    return Path(path).suffix in OPENERS


def sha256(path: str | Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reading(path: Path, what: str) -> AbstractContextManager[None]:
    return _told(path, f"cannot be read as {what}: it is damaged, or not one", "Export it again.")


@contextmanager
def _told(path: Path, problem: str, remedy: str) -> Iterator[None]:
    """What the runtimes raise on damaged files has no common base: theirs, zipfile's, pickle's, json's."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"'{path}' {problem} ({reason}). {remedy}") from error


def _no_device(device: str, runtime: str) -> InputError:
    return InputError(f"device={device!r}: {runtime} as installed here has no such device; use device=cpu.")
