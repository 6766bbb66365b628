"""How long a prediction takes on this machine: part by part, beside named peers, by number of threads."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from detector.data.preprocess import canvas_size, prepare
from detector.errors import InputError
from detector.evaluation.clock import Clock
from detector.export.formats import convert_for_openvino, import_packages, quiet
from detector.inference.detector import Detector
from detector.inference.loading import load
from detector.inference.openvino_core import openvino_core, signal_stack_kept
from detector.inference.runtime import OFTEN, openvino_options
from detector.lab.cost import detection_multiply_adds, multiply_adds
from detector.lab.latency import WARM_UP, Call, Maker, median_ratio, milliseconds, take_turns_apart

# The light detectors that torchvision has: two stages, and one.
PEERS = ("fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large")
# The one whose cost depends on what it proposes: it looks at all that its RPN gives a score of 0.05, at most 150. With
# random weights that is 150; with trained ones it is somewhere between that and none, so it takes part at both ends.
TWO_STAGES = PEERS[0]
NO_PROPOSALS = f"{TWO_STAGES}, no proposals"
# With random weights a peer would keep hundreds of boxes; above this it keeps none: its final NMS costs nothing.
PEER_THRESHOLD = 0.3
SETTLE = 3  # predictions before each that is timed, see `take_turns_apart`
TORCH = "torch"
PERCENTILES = (50, 90, 99)


def contest_predictions(
    ckpt: str | Path,
    image: np.ndarray,
    *,
    threads: Sequence[int],
    turns: int,
    exports: Sequence[str | Path] = (),
    budgets: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """From an image in memory to its boxes, all contestants taking turns, each in a process of its own.

    Args:
        ckpt: a checkpoint, in torch, folded.
        image: uint8 RGB (h, w, 3).
        threads: numbers to try.
        turns: of each, after WARM_UP that are not counted.
        exports: files of tools/export.py.
        budgets: numbers of proposals that the checkpoint is run with too.

    Returns:
        For each number of threads and contestant {"name", "threads", "p50_ms", "p90_ms", "p99_ms": what that share of
        the turns took at most, "times_of_torch": median over the turns of its time divided by the checkpoint's}.

    Raises:
        InputError: a contestant fails.
    """
    calls = {TORCH: partial(_torch_call, ckpt, image)}
    calls |= {f"{TORCH}, {n} proposals": partial(_torch_call, ckpt, image, max_proposals=n) for n in budgets}
    calls |= {Path(path).name: partial(_export_call, path, image) for path in exports}
    calls |= {f"torchvision {name}": partial(_peer_call, name, image) for name in (*PEERS, NO_PROPOSALS)}
    return [
        {"name": name, "threads": number}
        | {f"p{share}_ms": 1000 * float(np.percentile(seconds, share)) for share in PERCENTILES}
        | {"times_of_torch": median_ratio(seconds, times[TORCH])}
        for number, times in _by_threads(calls, threads, turns).items()
        for name, seconds in times.items()
    ]


def _by_threads(
    makers: Mapping[str, Callable[..., Call]], threads: Sequence[int], turns: int
) -> dict[int, dict[str, list[float]]]:
    """Seconds of contestants, by number of threads, then by name; each maker takes the number as `threads`."""
    found = {}
    for number in threads:
        own: dict[str, Maker] = {name: partial(maker, threads=number) for name, maker in makers.items()}
        found[number] = take_turns_apart(own, turns, f"{number} thread" + "s" * (number > 1), settle=SETTLE)
    return found


def _torch_call(ckpt: str | Path, image: np.ndarray, *, threads: int, **options: Any) -> Call:
    torch.set_num_threads(threads)
    detector = Detector.load(ckpt, "cpu")
    return lambda: detector.predict(image, **options)


def _export_call(path: str | Path, image: np.ndarray, *, threads: int) -> Call:
    detector = load(path, threads=threads)
    for _ in range(OFTEN + 1):  # as for a camera: OpenVINO has compiled for the size by then
        detector.predict(image)
    return lambda: detector.predict(image)


def peer(name: str) -> nn.Module:
    """A detector of torchvision with random weights, for its speed: one of PEERS, or NO_PROPOSALS."""
    known = TWO_STAGES if name == NO_PROPOSALS else name
    model = getattr(torchvision.models.detection, known)(weights=None, weights_backbone=None).eval()
    if known == TWO_STAGES:
        model.roi_heads.score_thresh = PEER_THRESHOLD
        model.rpn.score_thresh = 1.0 if name == NO_PROPOSALS else model.rpn.score_thresh
    else:
        model.score_thresh = PEER_THRESHOLD
    return model


def _peer_call(name: str, image: np.ndarray, *, threads: int) -> Call:
    torch.set_num_threads(threads)
    model = peer(name)

    return torch.inference_mode()(lambda: model([_tensor(image)]))


def _tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def parts(detector: Detector, image: np.ndarray, turns: int) -> dict[str, float]:
    """Median milliseconds of each part of one prediction with this detector, in order.

    The borders are forward hooks. pre-process: reading the source, resize, padding, normalisation; RPN: with the
    proposals' decoding and suppression; post-process: the head's boxes, their suppression, restoring.
    """
    network = detector.network
    borders: dict[str, Callable[..., Any]] = {
        "pre-process": network.backbone.register_forward_pre_hook,
        "backbone": network.backbone.register_forward_hook,
        "neck": network.neck.register_forward_hook,
        "RPN": network.head.thin.register_forward_pre_hook,
        "head": network.head.register_forward_hook,
    }
    seconds: dict[str, list[float]] = {part: [] for part in (*borders, "post-process")}

    def border(
        part: str, *_: object
    ) -> None:  # not the seconds: what a hook gives replaces the module's input or output
        clock.book(part)

    with contextlib.ExitStack() as hooks:
        for part, register in borders.items():
            hooks.enter_context(register(partial(border, part)))
        for turn in range(WARM_UP + turns):
            clock = Clock()
            detector.predict(image)
            clock.book("post-process")
            if turn >= WARM_UP:
                for part, spent in clock.seconds.items():
                    seconds[part].append(spent)
    return {part: milliseconds(spent) for part, spent in seconds.items()}


def network_multiply_adds(detector: Detector, image: np.ndarray, canvas: tuple[int, int] | None = None) -> int:
    """Multiply-adds of the network on this canvas (height, width), or on the one of this image."""
    height, width = canvas or canvas_size([detector.preprocessing.target_size(*image.shape[:2])])
    return detection_multiply_adds(detector.network, height, width)


def peer_multiply_adds(name: str, image: np.ndarray) -> int:
    """Multiply-adds of a torchvision detector on this image."""
    return multiply_adds(peer(name), [_tensor(image)])


def contest_networks(
    image: np.ndarray,
    exports: Sequence[str | Path],
    *,
    threads: Sequence[int],
    turns: int,
) -> dict[int, dict[str, list[float]]]:
    """Seconds of networks alone: exports on an image that is resized and padded already, and torchvision's
    detectors, which resize by themselves, as this package's OpenVINO exports run: for latency, with a fixed size, in
    float32 and, by NNCF, in int8.

    Returns:
        By number of threads, then by name: `exported_peer_names`, and the names of the files.

    Raises:
        InputError: a contestant fails; openvino or nncf is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = write_peers(image, Path(folder))
        calls = {name: partial(_exported_peer_call, path, image) for name, path in files.items()}
        calls |= {Path(path).name: partial(_network_call, path, image) for path in exports}
        return _by_threads(calls, threads, turns)


def exported_peer_names(name: str) -> tuple[str, str]:
    """What a detector of torchvision is called in OpenVINO, in float32 and in int8."""
    return f"{name} (OpenVINO)", f"{name} (OpenVINO, int8)"


def write_peers(image: np.ndarray, folder: Path) -> dict[str, Path]:
    """Write torchvision's detectors for images of this size, calibrated on it; by their `exported_peer_names`.

    Raises:
        InputError: openvino or nncf is not installed.
    """
    openvino, nncf = import_packages("openvino"), import_packages("nncf")
    files: dict[str, Path] = {}
    pixels = _tensor(image)
    for name in PEERS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's code about being traced
            model = convert_for_openvino(_OneImage(name), example_input=pixels)
        model.reshape(list(pixels.shape))
        whole, quantized = folder / f"{name}.xml", folder / f"{name}.int8.xml"
        openvino.save_model(model, whole, compress_to_fp16=False)
        # Read again: in the file there are no nodes that nobody uses, on which NNCF fails.
        model = openvino_core().read_model(whole)
        with quiet(), signal_stack_kept():
            model = nncf.quantize(model, nncf.Dataset([pixels.numpy()]), subset_size=1)
        openvino.save_model(model, quantized, compress_to_fp16=False)
        files |= dict(zip(exported_peer_names(name), (whole, quantized), strict=True))
    return files


class _OneImage(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = peer(name)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        (found,) = self.model([image])
        return found["boxes"], found["scores"], found["labels"]


def _exported_peer_call(path: Path, image: np.ndarray, *, threads: int) -> Call:
    compiled = openvino_core().compile_model(path, "CPU", openvino_options(threads))
    values = _tensor(image).numpy()
    return lambda: compiled(values, share_inputs=True)


def _network_call(path: str | Path, image: np.ndarray, *, threads: int) -> Call:
    exported = load(path, threads=threads)
    (prepared,) = prepare([image], exported.preprocessing, exported.canvas)
    return lambda: exported.detect(prepared)


# Linux counts a new program's ru_maxrss from that of the process that started it; VmHWM is its own.
_PEAK = """
import re, resource, sys
try:
    kilobytes = int(re.search("VmHWM:[^0-9]*([0-9]+)", open("/proc/self/status").read())[1])
except OSError:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
print(kilobytes / 1024)
"""


def peak_memory(code: str) -> float:
    """Peak resident memory in MB of a fresh Python process that runs `code`.

    Raises:
        InputError: the code fails.
    """
    outcome = subprocess.run([sys.executable, "-c", code + _PEAK], capture_output=True, text=True)
    if outcome.returncode:
        raise InputError(f"peak memory could not be measured: {outcome.stderr.strip().splitlines()[-1]}")
    return float(outcome.stdout.split()[-1])


def memory_of(files: Mapping[str, str | Path], size: tuple[int, int], threads: int) -> dict[str, float]:
    """Peak memory in MB of a process that loads a file and predicts once on an image (height, width); peers too."""
    height, width = size
    setup = f"import detector, numpy as np; image = np.zeros(({height}, {width}, 3), np.uint8)\n"
    found = {
        name: peak_memory(setup + f"detector.load({str(path)!r}, 'cpu', threads={threads}).predict(image)")
        for name, path in files.items()
    }
    for name in PEERS:
        code = f"from detector.lab.prediction import _peer_call; _peer_call({name!r}, image, threads={threads})()"
        found[f"torchvision {name}"] = peak_memory(setup + code)
    return found
