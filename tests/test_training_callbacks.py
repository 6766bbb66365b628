"""The moving average and the history of a run, against plain loops and by reading back what was written."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import struct
import sys
import termios
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from scored_data import overrides_of, write_scored_data
from torch import Tensor, nn

from detector import cli
from detector.evaluation.metrics import METRICS
from detector.inference.detector import Detector, read_checkpoint
from detector.models.build import NetworkOptions, build_network
from detector.training.callbacks import EMA, History, ProgressLines, TimeEstimate
from detector.training.run import train
from detector.training.task import DetectionTask
from detector.training.trainer import bar_fits


def naive_average(states: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """After update n (from 1) the average moves by 1 - min(decay, (1 + n) / (10 + n)); the first state begins it."""
    average = {key: value.double() if value.is_floating_point() else value for key, value in states[0].items()}
    for n, state in enumerate(states[1:], start=1):
        rate = 1 - min(decay, (1 + n) / (10 + n))
        for key, value in state.items():
            moved = average[key] + rate * (value.double() - average[key]) if value.is_floating_point() else value
            average[key] = moved
    return average


class Small(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


def trainer_on(device: str) -> Any:
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))


def test_the_average_lies_on_the_device_of_the_run() -> None:
    """Lightning makes it before it moves the weights there."""
    callback, module = EMA(0.5), Small()
    callback.setup(trainer_on("meta"), module, "fit")
    assert callback._average_model is not None
    assert {value.device.type for value in callback._average_model.state_dict().values()} == {"meta"}
    assert {value.device.type for value in module.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("decay", [0.3, 0.998])
def test_the_average_is_the_formula(decay: float) -> None:
    torch.manual_seed(0)
    module, callback, states = Small(), EMA(decay), []
    callback.setup(trainer_on("cpu"), module, "fit")
    for step in range(1, 31):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_()
        module.layers(torch.randn(4, 1, 2, 2))
        states.append({key: value.clone() for key, value in module.state_dict().items()})
        callback.on_train_batch_end(SimpleNamespace(global_step=step), module, None, None, 0)  # type: ignore[arg-type]
    assert callback._average_model is not None
    average = callback._average_model.module.state_dict()
    for key, expected in naive_average(states, decay).items():
        assert torch.allclose(average[key].double(), expected.double(), atol=1e-6), key
    assert average["layers.1.num_batches_tracked"] == 30


def test_the_average_of_a_torchvision_backbone_is_exchanged_value_by_value(small_spec: dict[str, Any]) -> None:
    """A copy of torchvision's traced networks comes back in training mode, with graphs for both modes.

    The average is never run: its values change places with those of the network that is trained, in their order.
    """
    small_spec["backbone"] = {"name": "torchvision", "model": "resnet18"}
    module = lightning.LightningModule()
    module.network = build_network(NetworkOptions.parse(small_spec), num_classes=2)
    callback = EMA(0.5)
    callback.setup(trainer_on("cpu"), module, "fit")
    assert callback._average_model is not None
    average = callback._average_model.module
    for kind in ("named_parameters", "named_buffers"):
        assert [name for name, _ in getattr(average, kind)()] == [name for name, _ in getattr(module, kind)()]

    before = {key: value.clone() for key, value in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    moved = {key: value.clone() for key, value in module.state_dict().items()}
    module.eval()
    callback.on_validation_epoch_start(None, module)  # type: ignore[arg-type]
    assert not any(part.training for part in module.modules())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    callback.on_validation_epoch_end(None, module)  # type: ignore[arg-type]
    assert all(torch.equal(value, moved[key]) for key, value in module.state_dict().items())


def test_the_average_is_what_is_scored_and_saved(
    tmp_path: Path, small_detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_scored_data(tmp_path / "data", small_detector)
    small_detector.save(tmp_path / "start.ckpt")
    scored: list[dict[str, Tensor]] = []
    stepped: list[dict[str, Tensor]] = []

    def copy(task: DetectionTask) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in task.state_dict().items()}

    step = DetectionTask.validation_step
    monkeypatch.setattr(
        DetectionTask, "validation_step", lambda task, *rest: (scored.append(copy(task)), step(task, *rest))[1]
    )
    monkeypatch.setattr(DetectionTask, "on_train_batch_end", lambda task, *_: stepped.append(copy(task)))
    options: Any = cli.compose(
        "train",
        [
            "recipe=finetune", f"data.root={root}", f"ckpt={tmp_path}/start.ckpt", f"run_dir={tmp_path}/run",
            "backbone.weights=null", "input.short_side=64", "input.long_side=96", "train.batch_size=2",
            "val.batch_size=8", "val.every=2", "schedule.epochs=3", "optimizer.lr=0.001", "ema=0.4", "workers=0",
            "trainer.accelerator=cpu", *overrides_of(small_detector.options.spec()),
        ],
    ).options()  # fmt: skip
    train(options)
    assert len(stepped) == 6
    last = read_checkpoint(tmp_path / "run/last.ckpt")
    best = read_checkpoint(tmp_path / "run/best.ckpt")
    # Scored after epoch 2 and after the last, which no `every` leaves out; one of the two is the best.
    assert len(scored) == 2
    kept = {4: 0, 6: 1}[best["global_step"]]
    for steps, state in zip((4, 6), scored, strict=True):
        for key, value in naive_average(stepped[:steps], 0.4).items():
            assert torch.allclose(state[key].double(), value.double(), atol=1e-6), key
    for key, value in scored[kept].items():
        assert torch.equal(best["state_dict"][key], value), key
    for key, value in naive_average(stepped, 0.4).items():
        assert torch.allclose(last["state_dict"][key].double(), value.double(), atol=1e-6), key
        assert torch.equal(last["current_model_state"][key], stepped[-1][key]), key
    weight = "network.head.class_logits.weight"
    assert not torch.equal(last["state_dict"][weight], stepped[-1][weight])
    assert last["global_step"] == 6


class FakeTrainer(SimpleNamespace):
    """What the callbacks ask of a trainer, half-way through the second of three epochs."""

    def __init__(self, step: int = 0) -> None:
        super().__init__(
            is_global_zero=True, global_step=step, current_epoch=1, max_epochs=3, estimated_stepping_batches=30,
            num_val_batches=[7], state=SimpleNamespace(fn="fit"),
            callback_metrics={name: torch.tensor(1.5) for name in DetectionTask.columns.losses},
        )  # fmt: skip


def scored_task(**values: float | None) -> SimpleNamespace:
    return SimpleNamespace(metrics={name: values.get(name, 0.0) for name in METRICS} | {"per_class": {"cat": None}})


def rows(history: History) -> list[dict[str, str]]:
    with history.path.open() as file:
        return list(csv.DictReader(file))


def take_steps(history: History, first: int, last: int, batches_per_step: int = 1) -> None:
    optimizer: Any = SimpleNamespace(param_groups=[{"lr": 0.0}])
    for step in range(first, last + 1):
        trainer: Any = FakeTrainer(step - 1)
        for _ in range(batches_per_step - 1):
            history.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
        optimizer.param_groups[0]["lr"] = step / 100
        history.on_before_optimizer_step(trainer, None, optimizer)  # type: ignore[arg-type]
        optimizer.param_groups[0]["lr"] = (step + 1) / 100  # the scheduler has moved on when the batch ends
        trainer.global_step = step
        history.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("batches_per_step", [1, 3])
def test_history_has_a_row_for_each_nth_step_with_the_rate_of_that_step(tmp_path: Path, batches_per_step: int) -> None:
    history = History(tmp_path, every=4, columns=DetectionTask.columns)
    history.on_train_start(FakeTrainer(), None)  # type: ignore[arg-type]
    take_steps(history, 1, 9, batches_per_step)
    assert [(row["step"], row["lr"], row["loss"]) for row in rows(history)] == [
        ("4", "0.04", "1.5"),
        ("8", "0.08", "1.5"),
    ]


def test_history_goes_on_after_the_step_that_is_resumed(tmp_path: Path) -> None:
    history = History(tmp_path, every=1, columns=DetectionTask.columns)
    history.on_train_start(FakeTrainer(), None)  # type: ignore[arg-type]
    take_steps(history, 1, 7)
    resumed = History(tmp_path, every=1, columns=DetectionTask.columns)
    resumed.on_train_start(FakeTrainer(5), None)  # type: ignore[arg-type]
    assert [row["step"] for row in rows(resumed)] == list("12345")
    take_steps(resumed, 6, 6)
    assert [row["step"] for row in rows(resumed)] == list("123456")


def test_the_best_is_the_first_of_equals_and_survives_resuming(tmp_path: Path) -> None:
    history = History(tmp_path, every=1, columns=DetectionTask.columns)
    history.on_train_start(FakeTrainer(), None)  # type: ignore[arg-type]
    for step, ap in ((1, 0.0), (2, 0.5), (3, 0.5)):
        history.on_validation_end(FakeTrainer(step), scored_task(AP=ap))  # type: ignore[arg-type]
    (tmp_path / "best.ckpt").touch()
    resumed = History(tmp_path, every=1, columns=DetectionTask.columns)
    resumed.load_state_dict(history.state_dict())
    resumed.on_validation_end(FakeTrainer(4), scored_task(AP=0.4))  # type: ignore[arg-type]
    said = json.loads((tmp_path / "metrics.json").read_text())
    assert (said["best"]["step"], said["best"]["AP"]) == (2, 0.5)
    assert (said["last"]["step"], said["last"]["AP"]) == (4, 0.4)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_validation_split_without_objects(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = History(tmp_path, every=1, columns=DetectionTask.columns)
    history.on_train_start(FakeTrainer(), None)  # type: ignore[arg-type]
    with caplog.at_level("INFO"):
        for step in (1, 2):
            history.on_validation_end(FakeTrainer(step), scored_task(**dict.fromkeys(METRICS)))  # type: ignore[arg-type]
    assert json.loads((tmp_path / "metrics.json").read_text())["best"]["AP"] is None
    assert [row["AP"] for row in rows(history)] == ["", ""]
    assert "no AP, the validation split has no objects" in caplog.text


def test_lines_come_at_intervals_and_tell_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    lines = ProgressLines(seconds=0.0)
    lines.on_train_start(FakeTrainer(10), None)  # type: ignore[arg-type]
    lines.start -= 5.0
    with caplog.at_level("INFO"):
        lines.on_train_batch_end(FakeTrainer(20), None, None, None, 0)  # type: ignore[arg-type]
        lines.on_validation_batch_end(FakeTrainer(20), None, None, None, 3)  # type: ignore[arg-type]
        lines.seconds = 3600.0
        lines.on_train_batch_end(FakeTrainer(21), None, None, None, 0)  # type: ignore[arg-type]
    first, second = (record.getMessage() for record in caplog.records)
    # Ten steps in five seconds, ten to go.
    assert first == "epoch 2 of 3, step 20 of 30, loss 1.500, 2.00 steps/s, 0 min left"
    assert second == "validation: 4 of 7 batches"


@pytest.mark.parametrize(
    ("threads", "lost", "told"), [(2, 120, True), (2, 80, False), (1, 500, False), (8, 300, False)]
)
def test_threads_that_wait_for_each_other_are_told(
    threads: int, lost: int, told: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cores lost a second, beside 50 for each thread."""
    now, line = 0.0, TimeEstimate()
    monkeypatch.setattr("detector.training.callbacks.time.monotonic", lambda: now)
    monkeypatch.setattr("detector.training.callbacks.cores_lost", lambda: int(1000 + now * lost))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    trainer: Any = FakeTrainer()
    trainer.max_epochs, trainer.check_val_every_n_epoch, trainer.estimated_stepping_batches = 6, 4, 1260
    trainer.accumulate_grad_batches, trainer.world_size, trainer.strategy = 1, 1, trainer_on("cpu").strategy
    trainer.datamodule = SimpleNamespace(val_order=range(1200), train_batch_size=4)
    trainer.global_step = trainer.current_epoch = 0
    with caplog.at_level("INFO"):
        for batch in range(20):
            now += 0.5
            line.on_train_batch_end(trainer, None, None, None, batch)  # type: ignore[arg-type]
    hints = [message for message in caplog.messages if "wait for each other" in message]
    assert [f"OMP_NUM_THREADS={threads - 1} before" in message for message in hints] == [True] * told


def test_the_time_is_told_once_without_slow_beginnings(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 2 s; the first ones of 50 s and what is between epochs do not count."""
    now, line = 0.0, TimeEstimate()
    monkeypatch.setattr("detector.training.callbacks.time.monotonic", lambda: now)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    trainer: Any = FakeTrainer()
    trainer.max_epochs, trainer.check_val_every_n_epoch, trainer.estimated_stepping_batches = 6, 4, 1260
    trainer.accumulate_grad_batches, trainer.world_size, trainer.strategy = 3, 1, trainer_on("cpu").strategy
    trainer.datamodule = SimpleNamespace(val_order=range(1200), train_batch_size=4)
    with caplog.at_level("INFO"):
        for batch in range(40):
            if batch % 8 == 0:
                now += 500.0
                line.on_train_epoch_start(trainer, None)
            now += 50.0 if batch < 4 or batch % 8 == 0 else 2.0
            trainer.global_step, trainer.current_epoch = (batch + 1) // 3, batch // 8
            line.on_train_batch_end(trainer, None, None, None, batch)  # type: ignore[arg-type]
    # After 15 batches, 5 steps: 1,255 steps of 3 batches and 2 s; twice 300 batches of images to be scored, 2/3 s each.
    (message,) = caplog.messages
    assert message == (
        f"about {(1255 * 6 + 2 * 300 * 2 / 3) / 3600:.1f} hours: 1,255 steps of 6 s and 2 validations of 1,200 images "
        "on 2 threads"
    )


def test_a_terminal_without_a_size_has_no_room_for_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, terminal = os.openpty()
    try:
        with open(terminal, "w", closefd=False) as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            for rows, columns in ((0, 0), (0, 120), (40, 120)):
                fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
                assert bar_fits() == (rows > 0)
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True, fileno=io.StringIO().fileno))
        assert not bar_fits()
    finally:
        os.close(leader)
        os.close(terminal)
