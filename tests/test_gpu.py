"""What a GPU computes, against the CPU: losses and gradients, detections, training runs, scores. `make test-gpu`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tool_runner import run_tool

import detector
from detector.inference.detector import Detector
from detector.lab import gpu
from detector.models.build import NetworkOptions, build_network

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees"),
]
SHIPPED = ("v2_1x_voc", "v2_0.5x_voc")
# A short training on drawn scenes, from a detector of this package: it finds something after seconds.
RUN = (
    "recipe=finetune", "backbone=v2_0.5x", "data=shapes", "data.generate={seed: 0, train: 64, val: 32, size: 160}",
    "input.short_side=160", "input.long_side=160", "train.batch_size=8", "schedule.epochs=4", "val.every=4",
    "schedule.warmup_steps=8", "workers=2",
)  # fmt: skip


@pytest.fixture
def exact() -> Iterator[None]:
    """float32 as on a CPU: a GPU's own shortens the mantissa of what convolutions multiply to 10 bits (TF32)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def photographs() -> list[np.ndarray]:
    """Two, and parts of them: a person, a cat."""
    pictures = pytest.importorskip("skimage.data")
    whole = [pictures.astronaut(), pictures.cat()]
    return [
        np.ascontiguousarray(view) for image in whole for view in (image, image[:, ::-1], image[40:], image[:, 60:])
    ]


def test_losses_and_gradients_are_those_of_the_cpu(small_spec: dict[str, Any], make_batch: Any, exact: None) -> None:
    # Samples so large that nothing is left to chance; normalisation by batch statistics takes part.
    small_spec["rpn"] |= {"sample_count": 100_000, "foreground_share": 1.0}
    small_spec["light_head"] |= {"sample_count": 1000, "sampling": "ohem"}
    batch = make_batch([[(4, 4, 40, 40, 0), (50, 10, 90, 60, 2)], [(10, 20, 60, 50, 1)], []])
    found = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        network = build_network(NetworkOptions.parse(small_spec), 3).train().to(device)
        losses = network.losses(batch.to(device))
        torch.stack(list(losses.values())).sum().backward()
        gradients = {name: weight.grad.cpu() for name, weight in network.named_parameters() if weight.grad is not None}
        found[device] = ({name: loss.item() for name, loss in losses.items()}, gradients)
    (losses, gradients), (expected, reference) = found["cuda"], found["cpu"]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert gradients.keys() == reference.keys()
    # Of the whole: a bias before a normalisation has no gradient but for rounding.
    whole = torch.cat([gradient.flatten() for gradient in reference.values()]).norm()
    for name, gradient in gradients.items():
        assert (gradient - reference[name]).norm() < 1e-4 * whole, name


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_detector_finds_on_both_the_same(name: str, exact: None) -> None:
    both = {device: detector.load(name, device=device) for device in ("cpu", "cuda")}
    seen = 0
    for image in photographs():
        expected, found = (both[device].predict(image, score_threshold=0.05)[0] for device in ("cpu", "cuda"))
        assert len(found.boxes) == len(expected.boxes)
        np.testing.assert_array_equal(found.labels, expected.labels)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.02)
        seen += len(found.boxes)
    assert seen >= 8


@pytest.mark.parametrize(("precision", "apart"), [("float32", 0.02), ("bf16", 0.1)])
def test_the_gpus_own_precisions_stay_close(precision: str, apart: float) -> None:
    reference = detector.load(SHIPPED[0], device="cpu")
    fast = detector.load(SHIPPED[0], device="cuda", precision=precision)
    differences = []
    for image in photographs():
        expected = reference.predict(image, score_threshold=0.3)[0]
        found = fast.predict(image, score_threshold=0.05)[0]
        for box, label, score in zip(expected.boxes, expected.labels, expected.scores, strict=True):
            same = (found.labels == label) & (np.abs(found.boxes - box).max(axis=1) < 8)
            differences.append(np.abs(found.scores[same] - score).min() if same.any() else 1.0)
    assert len(differences) >= 8
    assert np.median(differences) < apart


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_training_runs_and_goes_on_and_scores_alike_on_the_cpu(precision: str, tmp_path: Path) -> None:
    trained = run_tool("train", *RUN, f"trainer.precision={precision}", "run_dir=run", cwd=tmp_path).ok()
    assert "on the GPU" in trained.out + trained.err
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())["last"]
    assert metrics["AP50"] > 0.05
    checkpoint = torch.load(tmp_path / "run/last.ckpt", map_location="cpu", weights_only=True)
    assert checkpoint["detector"]["provenance"]["epoch"] == 3
    Detector.load(tmp_path / "run/last.ckpt", "cpu").predict(photographs()[0])

    scores = {}
    for device in ("gpu", "cpu"):
        run_tool("eval", "ckpt=run/last.ckpt", f"trainer.accelerator={device}", f"out={device}", cwd=tmp_path).ok()
        scores[device] = json.loads((tmp_path / device / "metrics.json").read_text())["AP50"]
    assert scores["gpu"] == pytest.approx(scores["cpu"], abs=0.02)

    run_tool("train", "ckpt=run/last.ckpt", "resume=true", "schedule.epochs=5", cwd=tmp_path).ok()
    assert torch.load(tmp_path / "run/last.ckpt", map_location="cpu", weights_only=True)["epoch"] == 4


def test_the_benchmark_names_the_card(tmp_path: Path) -> None:
    run_tool("benchmark", "gpu", "backbone=v2_0.5x", "turns=1", "out=gpu.json", cwd=tmp_path).ok()
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert torch.cuda.get_device_name() in content["machine"]
    assert len(content["contestants"]) == 2 * len(gpu.BATCHES) * len((*gpu.OWN, *gpu.OTHERS))
    assert all(row["images_per_second"] > 0 for row in content["contestants"])
