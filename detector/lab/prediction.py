"""How long a prediction takes on this machine: part by part, beside named peers, by number of threads."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from detector.api import Detector
from detector.errors import InputError
from detector.evaluation.clock import Clock
from detector.lab.cost import multiply_adds
from detector.lab.latency import WARM_UP, take_turns
from detector.loading import load
from detector.predictor import input_scale
from detector.preprocess import canvas_size, pad, restore_boxes

# The light detectors that torchvision has: two stages, and one.
PEERS = ("fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large")
# With random weights a peer would keep hundreds of boxes; above this it keeps none, and is as fast as it can be.
PEER_THRESHOLD = 0.3
SETTLE = 3  # predictions before each that is timed, see `take_turns`


@dataclass(frozen=True)
class Timing:
    """One contestant with one number of threads.

    Attributes:
        name, threads: who and how.
        seconds: of each turn.
    """

    name: str
    threads: int
    seconds: list[float]

    def percentile(self, share: float) -> float:
        """Milliseconds that this share of the turns took at most."""
        return 1000 * float(np.quantile(self.seconds, share))

    def to_dict(self) -> dict[str, Any]:
        p50, p90, p99 = (self.percentile(share) for share in (0.5, 0.9, 0.99))
        return {"name": self.name, "threads": self.threads, "p50_ms": p50, "p90_ms": p90, "p99_ms": p99}


def contest_predictions(
    ckpt: str | Path,
    image: np.ndarray,
    *,
    threads: Iterable[int],
    turns: int,
    exports: Sequence[str | Path] = (),
    budgets: Sequence[int] = (),
    progress: Callable[[Iterable[int], str], Iterable[int]] = lambda turns, _: turns,
) -> list[Timing]:
    """From a picture in memory to its boxes, all contestants taking turns.

    Args:
        ckpt: a checkpoint, in torch, folded.
        image: uint8 RGB (h, w, 3).
        threads: numbers to try; torch's own setting comes back afterwards.
        turns: of each, after WARM_UP that are not counted.
        exports: files of tools/export.py.
        budgets: numbers of proposals that the checkpoint is run with too.
        progress: given the turns and a title, the turns again, for example a progress bar.
    """
    timings = []
    before = torch.get_num_threads()
    try:
        for number in threads:
            torch.set_num_threads(number)
            calls = _contestants(ckpt, image, number, exports, budgets)
            times = take_turns(calls, progress(range(WARM_UP + turns), f"{number} threads"), settle=SETTLE)
            timings += [Timing(name, number, seconds) for name, seconds in times.items()]
    finally:
        torch.set_num_threads(before)
    return timings


def _contestants(
    ckpt: str | Path, image: np.ndarray, threads: int, exports: Sequence[str | Path], budgets: Sequence[int]
) -> dict[str, Callable[[], object]]:
    detector = Detector.load(ckpt, "cpu")
    calls: dict[str, Callable[[], object]] = {"torch": lambda: detector.predict(image)}
    for budget in budgets:
        calls[f"torch, {budget} proposals"] = _with_budget(detector, image, budget)
    for path in exports:
        exported = load(path, threads=threads)
        calls[Path(path).name] = _predicting(exported, image)
    for name in PEERS:
        calls[f"torchvision {name}"] = _peer_call(peer(name), image)
    return calls


def _with_budget(detector: Any, image: np.ndarray, budget: int) -> Callable[[], object]:
    return lambda: detector.predict(image, max_proposals=budget)


def _predicting(detector: Any, image: np.ndarray) -> Callable[[], object]:
    return lambda: detector.predict(image)


def peer(name: str) -> nn.Module:
    """A detector of torchvision with random weights, for its speed."""
    model = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None).eval()
    if name.startswith("ssd"):
        model.score_thresh = PEER_THRESHOLD
    else:
        model.roi_heads.score_thresh = PEER_THRESHOLD
    return model


def _peer_call(model: nn.Module, image: np.ndarray) -> Callable[[], object]:
    @torch.inference_mode()
    def call() -> object:
        return model([_tensor(image)])

    return call


def _tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


@torch.inference_mode()
def parts(detector: Detector, image: np.ndarray, turns: int) -> dict[str, float]:
    """Median milliseconds of each part of one prediction with this detector, in order."""
    seconds: dict[str, list[float]] = {}
    for turn in range(WARM_UP + turns):
        clock = Clock()
        _predict_in_parts(detector, image, clock)
        if turn >= WARM_UP:
            for part, spent in clock.seconds.items():
                seconds.setdefault(part, []).append(spent)
    return {part: 1000 * statistics.median(spent) for part, spent in seconds.items()}


def _predict_in_parts(detector: Detector, image: np.ndarray, clock: Clock) -> None:
    """What `Detector.predict` does, step by step."""
    network = detector.network
    resized = detector.preprocessing(image)
    pixels, sizes = torch.from_numpy(pad([resized])), torch.tensor([resized.shape[:2]])
    clock.book("pre-process")
    features = network.backbone(network.normalise(pixels))
    clock.book("backbone")
    rpn_map, head_map = network.neck(features)
    clock.book("neck")
    objectness, deltas, anchors = network.rpn(rpn_map)
    proposals = network.rpn.propose(objectness, deltas, anchors, sizes)
    clock.book("RPN")
    output = network.head(head_map, proposals.boxes)
    clock.book("head")
    ((boxes, _, _),) = network.head.detect(output, proposals, sizes)
    clock.book("NMS")
    restore_boxes(boxes.numpy(), input_scale(image.shape[:2], resized.shape[:2]), image.shape[:2])
    clock.book("post-process")


def network_multiply_adds(detector: Detector, image: np.ndarray) -> int:
    """Of the network on the canvas of this picture."""

    class Detect(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = detector.network

        def forward(self, images: Tensor, sizes: Tensor) -> object:
            return self.network.detect(images, sizes)

    height, width = canvas_size([detector.preprocessing.target_size(*image.shape[:2])])
    return multiply_adds(Detect(), torch.zeros(1, 3, height, width, dtype=torch.uint8), torch.tensor([[height, width]]))


def peer_multiply_adds(name: str, image: np.ndarray) -> int:
    """Of a torchvision detector on this picture."""
    return multiply_adds(peer(name), [_tensor(image)])


def exported_peer(name: str, image: np.ndarray, threads: int) -> Callable[[], object]:
    """A torchvision detector in OpenVINO, as an OpenVINO export of ours runs: float32, for latency.

    Raises:
        InputError: openvino is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise InputError("openvino is not installed: pip install 'light-head-detector[openvino]'.") from error

    class OneImage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = peer(name)

        def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            found = self.model([image])[0]
            return found["boxes"], found["scores"], found["labels"]

    pixels = _tensor(image)
    model = openvino.convert_model(OneImage(), example_input=pixels)
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(model, "CPU", options)
    return lambda: compiled(_tensor(image).numpy())


def network_call(path: str | Path, image: np.ndarray, threads: int) -> Callable[[], object]:
    """An export on a picture that is resized and padded already: its network's time alone."""
    exported: Any = load(path, threads=threads)
    resized = exported.preprocessing(image)
    pixels, sizes = pad([resized]), np.array([resized.shape[:2]], np.int64)
    return lambda: exported.find(pixels, sizes)


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


def memory_of(files: Mapping[str, str | Path], size: tuple[int, int]) -> dict[str, float]:
    """Peak memory in MB of a process that loads a file and predicts once on a picture (height, width); peers too."""
    height, width = size
    picture = f"import numpy as np; image = np.zeros(({height}, {width}, 3), np.uint8)\n"
    found = {
        name: peak_memory(picture + f"import detector; detector.load({str(path)!r}, device='cpu').predict(image)")
        for name, path in files.items()
    }
    for name in PEERS:
        code = f"from detector.lab.prediction import peer, _peer_call; _peer_call(peer({name!r}), image)()"
        found[f"torchvision {name}"] = peak_memory(picture + code)
    return found
