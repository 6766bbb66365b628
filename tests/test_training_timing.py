"""Time is booked on the part that took it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
from scored_data import write_scored_data

from detector.api import Detector
from detector.data.coco import load_coco
from detector.evaluation.clock import Clock
from detector.training import task as task_module
from detector.training.data_module import DetectionData
from detector.training.run import NOISE
from detector.training.task import DetectionTask
from detector.training.timing import PartTimes


def slowed(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slow


@pytest.mark.filterwarnings(*(f"ignore:{message}" for message in NOISE))
def test_a_delay_shows_in_its_own_part(
    tmp_path: Path, small_detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_scored_data(tmp_path / "data", small_detector)
    index = load_coco(root / "annotations/val.json", root / "images")
    data = DetectionData(
        train=None, val=index, preprocessing=small_detector.preprocessing, transform=None, train_batch_size=1,
        val_batch_size=2, workers=0, cache=False,
    )  # fmt: skip
    head = small_detector.network.head
    monkeypatch.setattr(head, "thin", slowed_module(head.thin, 0.1))  # in the forward pass
    monkeypatch.setattr(head, "detect", slowed(head.detect, 0.2))  # after it
    monkeypatch.setattr(task_module, "evaluate", slowed(task_module.evaluate, 0.8))
    task = DetectionTask(small_detector)
    task.val_index = index
    clock = Clock()
    times = PartTimes(clock)
    start = time.perf_counter()
    trainer = lightning.Trainer(
        callbacks=[times], accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.validate(task, data, verbose=False)
    whole = time.perf_counter() - start
    # Five pictures of three canvas sizes in batches of two: four passes through the network, in three steps.
    seconds = clock.seconds
    assert set(seconds) == {"load", "decode", "network", "post-process", "metrics"}
    assert len(times.seconds_per_image) == 3
    # The delays, and less than one delay more; a busy machine gets twice that.
    assert 0.4 <= seconds["network"] < 0.4 + 0.8
    assert 0.8 <= seconds["post-process"] < 0.8 + 0.8
    assert 0.8 <= seconds["metrics"] < 0.8 + 0.8
    assert seconds["decode"] < 0.8
    assert sum(seconds.values()) <= whole
    assert min(times.seconds_per_image) >= 0.3 / 2
    assert not head._forward_hooks
    assert not small_detector.network.backbone._forward_pre_hooks


def slowed_module(module: Any, seconds: float) -> Any:
    module.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return module
