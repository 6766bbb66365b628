"""How long a prediction takes on this machine: part by part, beside named peers, by number of threads."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from detector.data.preprocess import canvas_size, prepare
from detector.data.progress import progress
from detector.errors import InputError
from detector.evaluation.clock import Clock
from detector.export.formats import convert_for_openvino, import_openvino
from detector.export.quantize import import_nncf, quiet
from detector.inference.detector import Detector
from detector.inference.loading import load
from detector.inference.runtime import OFTEN, openvino_options
from detector.lab.cost import detection_multiply_adds, multiply_adds
from detector.lab.latency import WARM_UP
from detector.lab.processes import Maker, take_turns_apart

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


@dataclass(frozen=True)
class Timing:
    """One contestant with one number of threads.

    Attributes:
        name, threads: who and how.
        seconds: of each turn.
        share: its time divided by that of the checkpoint in torch: the median over the turns.
    """

    name: str
    threads: int
    seconds: list[float]
    share: float

    def percentile(self, share: float) -> float:
        """Milliseconds that this share of the turns took at most."""
        return 1000 * float(np.quantile(self.seconds, share))

    def to_dict(self) -> dict[str, Any]:
        p50, p90, p99 = (self.percentile(share) for share in (0.5, 0.9, 0.99))
        times = {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "times_of_torch": self.share}
        return {"name": self.name, "threads": self.threads, **times}


def contest_predictions(
    ckpt: str | Path,
    image: np.ndarray,
    *,
    threads: Iterable[int],
    turns: int,
    exports: Sequence[str | Path] = (),
    budgets: Sequence[int] = (),
) -> list[Timing]:
    """From an image in memory to its boxes, all contestants taking turns, each in a process of its own.

    Args:
        ckpt: a checkpoint, in torch, folded.
        image: uint8 RGB (h, w, 3).
        threads: numbers to try.
        turns: of each, after WARM_UP that are not counted.
        exports: files of tools/export.py.
        budgets: numbers of proposals that the checkpoint is run with too.

    Raises:
        InputError: a contestant fails.
    """
    timings = []
    for number in threads:
        makers: dict[str, Maker] = {TORCH: partial(_torch_call, ckpt, image, number)}
        makers |= {
            f"{TORCH}, {budget} proposals": partial(_torch_call, ckpt, image, number, max_proposals=budget)
            for budget in budgets
        }
        makers |= {Path(path).name: partial(_export_call, path, image, number) for path in exports}
        makers |= {f"torchvision {name}": partial(_peer_call, name, image, number) for name in (*PEERS, NO_PROPOSALS)}
        times = take_turns_apart(makers, progress(range(WARM_UP + turns), _counted(number), unit="turn"), settle=SETTLE)
        for name, seconds in times.items():
            share = statistics.median(own / base for own, base in zip(seconds, times[TORCH], strict=True))
            timings.append(Timing(name, number, seconds, share))
    return timings


def _torch_call(ckpt: str | Path, image: np.ndarray, threads: int, **options: Any) -> Callable[[], object]:
    torch.set_num_threads(threads)
    detector = Detector.load(ckpt, "cpu")
    return lambda: detector.predict(image, **options)


def _export_call(path: str | Path, image: np.ndarray, threads: int) -> Callable[[], object]:
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


def _peer_call(name: str, image: np.ndarray, threads: int) -> Callable[[], object]:
    torch.set_num_threads(threads)
    model = peer(name)

    @torch.inference_mode()
    def call() -> object:
        return model([_tensor(image)])

    return call


def _tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def parts(detector: Detector, image: np.ndarray, turns: int) -> dict[str, float]:
    """Median milliseconds of each part of one prediction with this detector, in order.

    The borders are forward hooks. pre-process: reading the source, resize, padding, normalisation; RPN: with the
    proposals' decoding and suppression; post-process: the head's boxes, their suppression, restoring.
    """
    network, clock = detector.network, Clock()

    def book(part: str) -> Callable[..., None]:
        def hook(*_: object) -> None:  # not the seconds: what a hook gives replaces the module's input or output
            clock.book(part)

        return hook

    borders = [
        network.backbone.register_forward_pre_hook(book("pre-process")),
        network.backbone.register_forward_hook(book("backbone")),
        network.neck.register_forward_hook(book("neck")),
        network.head.thin.register_forward_pre_hook(book("RPN")),
        network.head.register_forward_hook(book("head")),
    ]
    seconds: dict[str, list[float]] = {}
    try:
        for turn in range(WARM_UP + turns):
            clock = Clock()
            detector.predict(image)
            clock.book("post-process")
            if turn >= WARM_UP:
                for part, spent in clock.seconds.items():
                    seconds.setdefault(part, []).append(spent)
    finally:
        for border in borders:
            border.remove()
    return {part: 1000 * statistics.median(spent) for part, spent in seconds.items()}


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
    threads: Iterable[int],
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
    times = {}
    with tempfile.TemporaryDirectory() as folder:
        files = write_peers(image, Path(folder))
        for number in threads:
            makers: dict[str, Maker] = {
                name: partial(_exported_peer_call, path, image, number) for name, path in files.items()
            }
            makers |= {Path(path).name: partial(_network_call, path, image, number) for path in exports}
            title = f"exported networks, {_counted(number)}"
            times[number] = take_turns_apart(
                makers, progress(range(WARM_UP + turns), title, unit="turn"), settle=SETTLE
            )
    return times


def _counted(threads: int) -> str:
    return f"{threads} thread" + "s" * (threads > 1)


def exported_peer_names(name: str) -> tuple[str, str]:
    """What a detector of torchvision is called in OpenVINO, in float32 and in int8."""
    return f"{name} (OpenVINO)", f"{name} (OpenVINO, int8)"


def write_peers(image: np.ndarray, folder: Path) -> dict[str, Path]:
    """Write torchvision's detectors for images of this size, calibrated on it; by their `exported_peer_names`.

    Raises:
        InputError: openvino or nncf is not installed.
    """
    openvino, nncf = import_openvino(), import_nncf()
    files: dict[str, Path] = {}
    for name in PEERS:
        model = _convert_peer(name, image)
        whole, quantized = folder / f"{name}.xml", folder / f"{name}.int8.xml"
        openvino.save_model(model, whole, compress_to_fp16=False)
        # Read again: in the file there are no nodes that nobody uses, on which NNCF fails.
        model = openvino.Core().read_model(whole)
        with quiet(nncf):
            model = nncf.quantize(model, nncf.Dataset([_tensor(image).numpy()]), subset_size=1)
        openvino.save_model(model, quantized, compress_to_fp16=False)
        files |= dict(zip(exported_peer_names(name), (whole, quantized), strict=True))
    return files


def _convert_peer(name: str, image: np.ndarray) -> Any:
    class OneImage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = peer(name)

        def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            found = self.model([image])[0]
            return found["boxes"], found["scores"], found["labels"]

    pixels = _tensor(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's code about being traced
        model = convert_for_openvino(OneImage(), example_input=pixels)
    model.reshape(list(pixels.shape))
    return model


def _exported_peer_call(path: Path, image: np.ndarray, threads: int) -> Callable[[], object]:
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", openvino_options(threads))
    values = _tensor(image).numpy()
    return lambda: compiled(values, share_inputs=True)


def _network_call(path: str | Path, image: np.ndarray, threads: int) -> Callable[[], object]:
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
        code = f"from detector.lab.prediction import _peer_call; _peer_call({name!r}, image, {threads})()"
        found[f"torchvision {name}"] = peak_memory(setup + code)
    return found
