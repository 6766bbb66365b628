"""A whole run in this process: what it leaves behind, and that it goes on exactly where it stopped."""

from __future__ import annotations

import csv
import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scored_data import renumber_classes, write_scored_data
from tensorboard.summary.writer.record_writer import RecordWriter
from tool_runner import tool_environment

from detector.cli import explain
from detector.data.preprocess import Preprocessing
from detector.errors import InputError
from detector.inference.detector import Detector
from detector.inference.operating_point import OperatingPoint
from detector.models.build import NetworkOptions
from detector.training import run_directory
from detector.training import task as task_module
from detector.training.run import TrainOptions, _operating_point, train
from detector.training.task import DetectionTask

Run = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path, small_detector: Detector, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Train on five images of three canvas sizes, two a step; seconds. The given options change the run's."""
    monkeypatch.chdir(tmp_path)
    root = write_scored_data(tmp_path / "data", small_detector)
    small_detector.save(tmp_path / "start.ckpt")

    def go(**changes: Any) -> Path:
        values: dict[str, Any] = small_detector.options.spec() | {
            "data": {"root": str(root), "cache": False}, "ckpt": str(tmp_path / "start.ckpt"), "workers": 0,
            "input": {"short_side": 64, "long_side": 96}, "train": {"batch_size": 2}, "val": {"batch_size": 8},
            "augment": {
                "photometric": 0.5, "scale": [0.7, 1.4], "iou_crop": 0.5, "zoom_out": 0.5, "batch_scale": [0.5, 1.5],
                "mosaic": 0.3,
            },
            "ema": 0.5, "freeze": {"stages": 0},
            "optimizer": {"name": "adamw", "lr": 1e-3, "base_batch": None, "lr_scales": None},
            "schedule": {"kind": "cosine", "epochs": 1, "warmup_steps": 0},
            "trainer": {"accelerator": "cpu", "log_every": 1},
        }  # fmt: skip
        return train(TrainOptions.parse(values | changes))

    return go


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def said(run_dir: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run_dir / "metrics.json").read_text())
    return metrics


def epochs(count: int) -> dict[str, Any]:
    return {"kind": "cosine", "epochs": count, "warmup_steps": 0}


def score_in_turn(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """Let the validations have these AP."""
    compute, left = task_module.compute_metrics, list(scores)
    monkeypatch.setattr(
        task_module, "compute_metrics", lambda *args, **kwargs: compute(*args, **kwargs) | {"AP": left.pop(0)}
    )


def test_the_last_epoch_is_scored_and_can_be_the_best(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    score_in_turn(monkeypatch, 0.1, 0.2)
    run_dir = run(run_dir="run", schedule=epochs(3), val={"batch_size": 8, "every": 2})
    assert [int(row["step"]) for row in rows(run_dir) if row["AP"]] == [4, 6]
    assert (said(run_dir)["last"]["epoch"], said(run_dir)["best"]["epoch"]) == (2, 2)
    assert load(run_dir / "best.ckpt")["global_step"] == 6


def test_a_checkpoint_says_from_which_score_on_each_class_is_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(0.2, 0.3, 0.4), (0.5, 0.6, 0.7)]
    points = iter([{"thresholds": one} for one in found])
    monkeypatch.setattr(task_module, "operating_point", lambda *_: next(points))
    score_in_turn(monkeypatch, 0.2, 0.1, 0.1)
    run_dir = run(run_dir="run", schedule=epochs(2))
    assert [Detector.load(run_dir / name).thresholds for name in ("best.ckpt", "last.ckpt")] == found
    # With that of another checkpoint, where the validation images are trained on; and without.
    names = ("bird", "cat", "dog")
    other = Detector(NetworkOptions(), names, Preprocessing(), operating_point=OperatingPoint(thresholds=found[0]))
    other.save("other.ckpt")
    own = Detector.load(run(run_dir="like", calibrate="other.ckpt") / "last.ckpt")
    assert dict(zip(own.class_names, own.thresholds, strict=True)) == dict(zip(names, found[0], strict=True))
    with pytest.raises(InputError, match=r"calibrate=other\.ckpt: it does not know cow\."):
        _operating_point("other.ckpt", ["cat", "cow"])
    with pytest.raises(InputError, match="calibrate=nowhere: No checkpoint at 'nowhere'"):
        _operating_point("nowhere", names)
    assert _operating_point("none", names) == OperatingPoint()


def test_a_calibration_without_thresholds_is_taken_alone_and_kept_by_the_run(run: Run) -> None:
    """So are those of a run whose classes all have few objects. Names that mean the same are the same."""
    known = OperatingPoint(calibration=(2.0, 0.5))
    Detector(NetworkOptions(), ("Dog", "cat", "bird"), Preprocessing(), operating_point=known).save("other.ckpt")
    assert _operating_point("other.ckpt", ["cat", "dog"]) == known
    Detector(NetworkOptions(), ("cat", "dog", "bird"), Preprocessing()).save("nothing.ckpt")
    with pytest.raises(InputError, match=r"calibrate=nothing\.ckpt: it knows nothing of its scores\."):
        _operating_point("nothing.ckpt", ["cat", "dog"])
    run_dir = run(run_dir="run", calibrate="other.ckpt")
    Path("other.ckpt").unlink()
    resumed = run(
        ckpt=str(run_dir / "last.ckpt"), resume=True, schedule=epochs(2), overrides=("schedule.epochs=2",)
    )  # fmt: skip
    assert Detector.load(resumed / "last.ckpt").operating_point == known


def test_two_runs_in_one_process(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two directories, the same result, and nothing of the first is left in the process."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    before = dict(os.environ), list(warnings.filters), torch.get_num_threads()
    first = run()
    assert (dict(os.environ), list(warnings.filters), torch.get_num_threads()) == before
    second = run()
    assert first != second
    assert first.parent == second.parent == Path("runs/none/none")
    assert rows(first) == rows(second)
    states = [load(folder / "last.ckpt")["state_dict"] for folder in (first, second)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_run_is_not_overwritten_without_a_word(run: Run) -> None:
    run_dir = run(run_dir="run", seed=1)
    (run_dir / "notes.txt").write_text("mine")
    before = (run_dir / "last.ckpt").read_bytes()
    with pytest.raises(InputError, match=r"'run' holds a run\. .*overwrite=true.*ckpt=run/last\.ckpt resume=true"):
        run(run_dir="run", seed=2)
    assert (run_dir / "last.ckpt").read_bytes() == before
    # From its own weights, too.
    run(run_dir="run", seed=2, overwrite=True, ckpt="run/last.ckpt")
    assert load(run_dir / "last.ckpt")["detector"]["provenance"]["config"]["seed"] == 2
    assert [row["step"] for row in rows(run_dir)] == ["1", "2", "2"]
    assert (run_dir / "notes.txt").exists()


@pytest.fixture
def stopped(run: Run, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A run of four epochs in `whole`, and what of it there was after two; the parameter is the number of workers."""

    def keep(task: DetectionTask) -> None:
        if task.current_epoch == 2:
            shutil.copytree("whole", "stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetectionTask, "on_train_epoch_start", keep)
        score_in_turn(patch, 0.3, 0.2, 0.1, 0.1)
        run(run_dir="whole", schedule=epochs(4), workers=getattr(request, "param", 0))
    return Path("stopped")


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.slow)], indirect=True)
def test_a_resumed_run_ends_as_an_undisturbed_one(run: Run, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with everything that draws: sampling of anchors and RoIs, augmentation, order of the images.

    The data set has got other ids meanwhile: its classes come in another order, and are known by their names.
    """
    for split in ("train", "val"):
        renumber_classes(Path("data/annotations") / f"{split}.json", {3: 90, 17: 3, 90: 17})
    score_in_turn(monkeypatch, 0.1, 0.1)
    torch.rand(1000)
    resumed = run(ckpt=str(stopped / "last.ckpt"), resume=True)
    one, other = load(Path("whole/last.ckpt")), load(resumed / "last.ckpt")
    assert other["global_step"] == 8
    for part in ("state_dict", "current_model_state"):
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            assert torch.equal(value, other[part][name]), name
    assert rows(resumed) == rows(Path("whole"))


def test_a_changed_rate_counts_in_a_resumed_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that of a longer schedule: the state has the rates of the run before, the last one next to nothing."""
    run_dir = run(run_dir="run", schedule=epochs(1))
    assert load(run_dir / "last.ckpt")["lr_schedulers"][0]["_last_lr"] == [0.0, 0.0]
    rates, steps = [], DetectionTask.training_step

    def step(task: DetectionTask, *arguments: Any) -> Any:
        rates.extend(group["lr"] for group in task.trainer.optimizers[0].param_groups)
        return steps(task, *arguments)

    monkeypatch.setattr(DetectionTask, "training_step", step)
    resumed = run(
        ckpt=str(run_dir / "last.ckpt"), resume=True, schedule=epochs(2) | {"kind": "linear"},
        optimizer={"name": "adamw", "lr": 0.25, "base_batch": None, "lr_scales": None, "weight_decay": 0.125},
        overrides=("schedule.epochs=2", "schedule.kind=linear", "optimizer.lr=0.25", "optimizer.weight_decay=0.125"),
    )  # fmt: skip
    # Two steps of two epochs are left: half of the rate, and a quarter, of weights with decay and of those without.
    assert rates == pytest.approx([0.125, 0.125, 0.0625, 0.0625])
    groups = load(resumed / "last.ckpt")["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.125, 0.0]


def test_what_moves_other_weights_than_before_is_not_called_a_damaged_file(run: Run) -> None:
    run_dir = run(run_dir="run", schedule=epochs(1))
    with pytest.raises(InputError, match=r"resume=true: freeze\.stages=2 does not go with .*Leave it out"):
        run(
            ckpt=str(run_dir / "last.ckpt"), resume=True, schedule=epochs(2), freeze={"stages": 2},
            overrides=("schedule.epochs=2", "freeze.stages=2"),
        )  # fmt: skip


@pytest.mark.parametrize(
    "place", ["moved", *(pytest.param(place, marks=pytest.mark.slow) for place in ("same", "copied", "elsewhere"))]
)
def test_the_best_is_not_forgotten_where_a_run_moves(
    run: Run, stopped: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place == "moved":
        stopped = stopped.rename("moved")
    if place == "copied":
        stopped = shutil.copytree(stopped, Path("copied"))
    score_in_turn(monkeypatch, 0.25, 0.1)  # the first epoch had 0.3
    resumed = run(ckpt=str(stopped / "last.ckpt"), resume=True, run_dir="elsewhere" if place == "elsewhere" else None)
    assert load(resumed / "best.ckpt")["global_step"] == 2
    assert (said(resumed)["best"]["AP"], said(resumed)["best"]["step"]) == (0.3, 2)
    assert [row["step"] for row in rows(resumed) if row["AP"]] == ["2", "4", "6", "8"]


def test_a_run_is_not_resumed_into_that_of_another(run: Run, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (Path("whole") / "last.ckpt").read_bytes()
    with pytest.raises(InputError, match=r"'whole' holds a run"):
        run(ckpt=str(stopped / "last.ckpt"), resume=True, run_dir="whole")
    assert (Path("whole") / "last.ckpt").read_bytes() == before
    score_in_turn(monkeypatch, 0.25, 0.1)
    (Path("whole") / "best.ckpt").write_bytes(b"of another run")
    resumed = run(ckpt=str(stopped / "last.ckpt"), resume=True, run_dir="whole", overwrite=True)
    assert load(resumed / "best.ckpt")["global_step"] == 2
    assert (stopped / "last.ckpt").is_file()


@pytest.mark.slow
def test_epochs_that_are_not_scored(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """best.ckpt is written in the middle of its epoch then; last.ckpt has no metrics of weights from before."""
    score_in_turn(monkeypatch, 0.3, 0.2)

    def keep(task: DetectionTask, begin: Any = DetectionTask.on_train_epoch_start) -> None:
        begin(task)
        if task.current_epoch == 3:
            shutil.copytree("run", "after three")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetectionTask, "on_train_epoch_start", keep)
        run(run_dir="run", schedule=epochs(4), val={"batch_size": 8, "every": 2})
    about = [load(Path(name))["detector"]["provenance"] for name in ("after three/last.ckpt", "run/last.ckpt")]
    assert about[0]["metrics"] == {}
    assert about[1]["metrics"]["AP"] == 0.2
    with pytest.raises(InputError, match=r"best\.ckpt' was written before its epoch was over; resume from last\.ckpt"):
        run(ckpt="run/best.ckpt", resume=True, schedule=epochs(6))


def test_a_run_that_has_lost_its_best_finds_another(
    run: Run, stopped: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (stopped / "best.ckpt").unlink()
    score_in_turn(monkeypatch, 0.1, 0.2)
    with caplog.at_level("INFO"):
        resumed = run(ckpt=str(stopped / "last.ckpt"), resume=True)
    assert load(resumed / "best.ckpt")["global_step"] == 8
    assert said(resumed)["best"]["AP"] == 0.2
    named = next(message for message in caplog.messages if "best.ckpt" in message)
    assert all((resumed / name.strip()).exists() for name in named.partition(" in ")[0].split(","))


@pytest.mark.parametrize(
    "left", ["half a table", *(pytest.param(x, marks=pytest.mark.slow) for x in ("last.ckpt alone", "no table"))]
)
def test_a_run_goes_on_with_what_is_left_of_it(
    run: Run, stopped: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    table = stopped / "metrics.csv"
    whole = rows(Path("whole"))
    if left == "last.ckpt alone":
        Path("alone").mkdir()
        stopped = (stopped / "last.ckpt").rename("alone/last.ckpt").parent
        expected = whole[-6:]  # epochs of two steps and a validation
    elif left == "half a table":
        lines = table.read_bytes().splitlines(keepends=True)
        table.write_bytes(b"".join(lines[:3]) + lines[3][:-4])
        expected = whole[:2] + whole[-6:]
    else:
        table.write_bytes(b"\xff\x00,\n1,2\n\n")
        expected = whole[-6:]
    score_in_turn(monkeypatch, 0.1, 0.1)
    resumed = run(ckpt=str(stopped / "last.ckpt"), resume=True)
    assert rows(resumed) == expected
    assert load(resumed / "last.ckpt")["global_step"] == 8
    assert load(resumed / "best.ckpt")["global_step"] == (6 if left == "last.ckpt alone" else 2)
    assert (resumed / "curves.png").is_file()


FIT, OPTIMISER, RANDOM = "loops/fit_loop", "optimizer_states/0", "callbacks/RandomStates/ranks/0"
BEST = (
    "ModelCheckpoint{'monitor': 'AP', 'mode': 'max', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
    "'train_time_interval': None}"
)
NAN = float("nan")
DAMAGES: list[tuple[str, Any, str]] = [
    # path, value (None: there is none), what the message says beside the file's name
    (f"{OPTIMISER}/state/0/exp_avg", torch.zeros(3), "optimiser cannot"),
    (f"{OPTIMISER}/state/0/exp_avg", "text", "optimiser cannot"),
    (f"{OPTIMISER}/state/0/exp_avg", None, "(exp_avg|.exp_avg.)"),
    (f"{OPTIMISER}/state/3/exp_avg", lambda x: x * NAN, "after a step backbone.* is not finite"),
    (f"{OPTIMISER}/state/3/exp_avg_sq", lambda x: x - 1, "after a step backbone.* is not finite"),
    (f"{OPTIMISER}/state/3/step", torch.tensor(NAN), "is not finite"),
    (f"{OPTIMISER}/state", [], "optimiser cannot"),
    (f"{OPTIMISER}/param_groups", lambda x: x[:1], "optimiser cannot"),
    (f"{OPTIMISER}/param_groups/0/params", [0], "optimiser cannot"),
    (f"{OPTIMISER}/param_groups/0/betas", "ab", "optimiser cannot"),
    (f"{OPTIMISER}/param_groups/1/eps", None, "eps"),
    ("optimizer_states", [], "optimiser cannot"),
    ("optimizer_states/0", "text", "optimiser cannot"),
    ("lr_schedulers", [], "optimiser cannot"),
    ("lr_schedulers/0/base_lrs", [0.1], "the learning rates are"),
    ("lr_schedulers/0/base_lrs", [NAN, 0.1], "the learning rates are"),
    ("lr_schedulers/0/base_lrs", ["a", "b"], "optimiser cannot"),
    ("lr_schedulers/0/last_epoch", "4", "at step 4, not 4"),
    ("lr_schedulers/0/last_epoch", None, "at step 0, not 4"),
    (f"{RANDOM}/python", (3, (1, 2), None), "callbacks cannot"),
    (f"{RANDOM}/python", "text", "callbacks cannot"),
    (f"{RANDOM}/numpy", ("MT19937", list(range(624)), 10**6, 0, 0.0), "said to stand at 1000000"),
    (f"{RANDOM}/numpy", ("MT19937", [1], 0, 0, 0.0), "callbacks cannot"),
    (f"{RANDOM}/torch", torch.zeros(7), "callbacks cannot"),
    (f"{RANDOM}/torch", None, "torch"),
    ("callbacks/RandomStates", {"ranks": 3}, "callbacks cannot"),
    ("callbacks", [], "callbacks cannot"),
    ("callbacks/History", None, "there is none of History"),
    ("callbacks/History/best/AP", "0.3", "callbacks cannot"),
    (f"callbacks/{BEST}/best_model_score", torch.tensor(NAN), "its best score is nan"),
    (f"callbacks/{BEST}", None, "there is none of KeptCheckpoint"),
    ("callbacks/EMA/latest_update_step", "4", "latest_update_step is '4'"),
    ("averaging_state/n_averaged", "4", "n_averaged is a str"),
    ("averaging_state", None, "averaging_state"),
    ("current_model_state/network.backbone.conv1.0.weight", lambda x: x * NAN, "backbone.conv1.0.weight holds NaN"),
    ("state_dict/network.backbone.conv1.0.weight", lambda x: x[:1], r"backbone.conv1.0.weight is \(1, 3, 3, 3\)"),
    (f"{FIT}/epoch_progress/current/processed", 1, "epoch 0 and step 4, not 1 and 4"),
    (f"{FIT}/epoch_progress/current/ready", "2", "epoch_progress.current.ready is '2'"),
    (f"{FIT}/epoch_loop.batch_progress", None, "epoch_loop.batch_progress"),
    (FIT, [], "loops cannot"),
    ("global_step", 5, "epoch 1 and step 4, not 1 and 5"),
]


def put(content: Any, path: str, value: Any) -> None:
    *outer, last = path.split("/")
    for name in outer:
        content = content[int(name) if name.isdecimal() else name]
    place: Any = int(last) if last.isdecimal() else last
    if value is None:
        del content[place]
    else:
        content[place] = value(content[place]) if callable(value) else value


@pytest.mark.slow
def test_a_state_that_cannot_be_taken_up_is_refused_before_anything_is_overwritten(run: Run, stopped: Path) -> None:
    whole = (stopped / "last.ckpt").read_bytes()
    for place, value, words in DAMAGES:
        content = torch.load(io.BytesIO(whole), weights_only=True)
        put(content, place, value)
        torch.save(content, stopped / "last.ckpt")
        before = {path.name: path.read_bytes() for path in stopped.iterdir() if path.is_file()}
        with pytest.raises(
            InputError, match=rf"^'stopped/last\.ckpt' is damaged: its .*{words}.*another check"
        ) as caught:
            run(ckpt="stopped/last.ckpt", resume=True)
        assert "\n" not in str(caught.value)
        assert {path.name: path.read_bytes() for path in stopped.iterdir() if path.is_file()} == before, place
    (stopped / "last.ckpt").write_bytes(whole)
    run(ckpt="stopped/last.ckpt", resume=True)


def full(monkeypatch: pytest.MonkeyPatch, *names: str, code: int = errno.ENOSPC) -> None:
    """Let there be no room for files of these names."""
    replace, write = os.replace, Path.open

    def refuse(name: str) -> None:
        if name in names:
            raise OSError(code, os.strerror(code))

    def replace_(source: Any, target: Any) -> None:
        refuse(Path(target).name)
        replace(source, target)

    def open_(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "a" in mode:
            refuse(path.name)
        return write(path, mode, *args, **kwargs)

    monkeypatch.setattr(os, "replace", replace_)
    monkeypatch.setattr(Path, "open", open_)


def test_a_full_disk_ends_no_training_for_a_table_or_an_image(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def start(task: DetectionTask) -> None:
        monkeypatch.setattr(RecordWriter, "write", refuse)
        table = ["metrics.csv"] if task.current_epoch else []
        full(monkeypatch, *table, "metrics.json", "curves.png", "train_batch.png")

    monkeypatch.setattr(DetectionTask, "on_train_epoch_start", start)
    run_dir = run(run_dir="run", schedule=epochs(3))
    said = [message for message in caplog.messages if "goes on without it" in message]
    assert sorted(message.partition("'")[2].partition("'")[0] for message in said) == [
        f"run/{name}" for name in ("curves.png", "metrics.csv", "metrics.json", "tensorboard", "train_batch.png")
    ]
    assert all("No space left on device" in message for message in said)
    assert [row["step"] for row in rows(run_dir)] == ["1", "2", "2"]
    assert load(run_dir / "last.ckpt")["global_step"] == 6
    assert load(run_dir / "best.ckpt")["global_step"] in (2, 4, 6)
    assert not list(run_dir.glob(".*"))


@pytest.mark.parametrize("name", ["last.ckpt", pytest.param("best.ckpt", marks=pytest.mark.slow)])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def start(task: DetectionTask) -> None:
        if task.current_epoch == 1:
            full(patch, name, code=errno.EROFS)

    score_in_turn(monkeypatch, 0.1, 0.2, 0.3, 0.4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetectionTask, "on_train_epoch_start", start)
        with pytest.raises(InputError, match="Cannot write '") as caught:
            run(run_dir="my run", schedule=epochs(3))
    assert str(caught.value).startswith(f"Cannot write '{Path('my run').resolve() / name}': Read-only file system. ")
    assert str(caught.value).endswith(f"go on: 'ckpt={Path('my run').resolve()}/last.ckpt' resume=true.")
    assert {load(path)["global_step"] for path in Path("my run").glob("*.ckpt")} <= {2, 4}
    assert not list(Path("my run").glob(".*"))
    assert load(run(ckpt="my run/last.ckpt", resume=True) / "last.ckpt")["global_step"] == 6


def test_a_full_disk_at_the_start_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, "config.yaml")
    with pytest.raises(OSError, match="No space left") as caught:
        run(run_dir="run")
    assert explain(caught.value) == (
        "cannot write run/config.yaml: no space left on device. Make room, or choose another place."
    )


HOLD = """
import sys, time
from pathlib import Path
from detector.training.run_directory import alone
with alone(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_two_processes_do_not_write_into_one_directory(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a process that was killed leaves no lock."""
    monkeypatch.setattr(run_directory, "PATIENCE", 0.0)
    (tmp_path / "run").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, "run"], stdout=subprocess.PIPE, text=True, env=tool_environment()
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        with pytest.raises(InputError, match=r"Another process is writing a run into 'run': wait .* another run_dir"):
            run(run_dir="run", overwrite=True)
        assert list((tmp_path / "run").iterdir()) == []
        owner.send_signal(signal.SIGKILL)
    # Nor do the loader processes of a run that has ended.
    with run_directory.alone(tmp_path / "run"):
        loader = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        loader.start()
    assert run(run_dir="run") == Path("run")
    loader.kill()
    loader.join()


def test_runs_that_begin_in_one_second_have_directories_of_their_own(tmp_path: Path) -> None:
    folders = [run_directory._new_folder(tmp_path / "runs") for _ in range(4)]
    assert len({*folders}) == 4
    assert all(folder.is_dir() for folder in folders)


WRITE = """
import sys, time
from pathlib import Path
from detector.training.checkpoints import CheckpointFiles
def half(path, content):
    with path.open("wb") as file:
        file.write(bytes(content)[: len(content) // 2])
        file.flush()
        print("ready", flush=True)
        time.sleep(60)
Path.write_bytes = half
CheckpointFiles().save_checkpoint({"state_dict": dict.fromkeys(map(str, range(999)))}, Path(sys.argv[1]))
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    run: Run, stopped: Path, monkeypatch: pytest.MonkeyPatch, kind: signal.Signals
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITE, "stopped/last.ckpt"], stdout=subprocess.PIPE, text=True, env=tool_environment()
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        writer.send_signal(kind)
    assert len(list(stopped.glob(".*"))) == 1
    assert load(stopped / "last.ckpt")["global_step"] == 4
    resumed = run(ckpt="stopped/last.ckpt", resume=True)
    assert load(resumed / "last.ckpt")["global_step"] == 8
    assert not list(resumed.glob(".*"))


def test_one_small_image_is_refused_in_the_fields_words(run: Run) -> None:
    with pytest.raises(InputError, match=r"too small for batch normalisation: .*train\.batch_size"):
        run(
            train={"batch_size": 1}, input={"short_side": 32, "long_side": 32}, ckpt=None,
            freeze={"stages": 0, "batch_norm": False},
        )  # fmt: skip


@pytest.mark.parametrize("start", [True, False])
def test_nothing_is_frozen_that_has_learnt_nothing(run: Run, start: bool) -> None:
    rates = {"name": "adamw", "lr": 1e-3, "base_batch": None, "lr_scales": {"backbone": 0.15, "rpn": 0.5}}
    run_dir = run(
        freeze={"stages": 4, "batch_norm": True}, optimizer=rates, **({} if start else {"ckpt": None})
    )  # fmt: skip
    about = load(run_dir / "last.ckpt")
    config = about["detector"]["provenance"]["config"]
    assert config["optimizer"]["lr_scales"] == ({"backbone": 0.15, "rpn": 0.5} if start else {"rpn": 0.5})
    frozen = config["freeze"]
    assert frozen == ({"stages": 4, "batch_norm": True} if start else {"stages": 0, "batch_norm": False})
    norm = about["state_dict"]["network.backbone.conv1.1.running_mean"]
    given = load(Path("start.ckpt"))["state_dict"]["network.backbone.conv1.1.running_mean"]
    assert torch.equal(norm, given if start else torch.zeros_like(norm)) is start
