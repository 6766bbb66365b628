"""Time is booked on the part that took it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
from scored_data import write_scored_data

from detector.data.annotations import load_annotations
from detector.data.index import AnnotationIndex
from detector.evaluation import clock as clock_module
from detector.evaluation.clock import Clock
from detector.inference.detector import Detector
from detector.training import task as task_module
from detector.training.data_module import DetectionData
from detector.training.run_options import RunOptions
from detector.training.task import DetectionTask
from detector.training.timing import PartTimes
from detector.training.trainer import NOISE

# Of each batch of two: passes through the network, one for each canvas size, and images.
STEPS = ((1, 2), (2, 2), (1, 1))


class FakeTime:
    """Stands still but for the delays that a test puts in, so that a busy machine changes nothing."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def slowed(self, function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def slow(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return function(*args, **kwargs)

        return slow


@pytest.mark.filterwarnings(*(f"ignore:{message}" for message in NOISE))
def test_a_delay_shows_in_its_own_part(
    tmp_path: Path, small_detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_scored_data(tmp_path / "data", small_detector)
    index = load_annotations(root / "annotations/val.json", root / "images")
    data = DetectionData(
        index, small_detector.preprocessing, RunOptions.parse({"val": {"batch_size": 2}, "workers": 0})
    )
    fake = FakeTime()
    monkeypatch.setattr(clock_module, "time", fake)
    head = small_detector.network.head
    head.thin.register_forward_pre_hook(fake.slowed(lambda *_: None, 1))  # in the forward pass
    monkeypatch.setattr(head, "detect", fake.slowed(head.detect, 10))  # after it
    monkeypatch.setattr(task_module, "compute_metrics", fake.slowed(task_module.compute_metrics, 100))
    monkeypatch.setattr(AnnotationIndex, "read", fake.slowed(AnnotationIndex.read, 1000))
    task = DetectionTask(small_detector, index)
    clock = Clock()
    times = PartTimes(clock)
    trainer = lightning.Trainer(
        callbacks=[times], accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.validate(task, data, verbose=False)
    # Five images of three canvas sizes in batches of two: four passes through the network, in three steps.
    assert clock.seconds == {"load": 0, "decode": 5 * 1000, "network": 4, "post-process": 4 * 10, "metrics": 100}
    assert len(times.seconds_per_image) == 3
    assert sum(times.seconds_per_image) == pytest.approx(sum(passes * 11 / images for passes, images in STEPS))
    assert not head._forward_hooks
    assert not small_detector.network.backbone._forward_pre_hooks
