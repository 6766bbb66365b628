"""A whole run in this process: what it leaves behind, and that it goes on exactly where it stopped."""

from __future__ import annotations

import csv
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scored_data import write_scored_data

from detector.errors import InputError
from detector.inference.detector import Detector
from detector.training import task as task_module
from detector.training.run import TrainOptions, train
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
            "augment": {"photometric": 0.5, "scale": [0.7, 1.4]}, "ema": 0.5, "freeze": {"stages": 0},
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
def stopped(run: Run, tmp_path: Path) -> Path:
    """A run of four epochs in `whole`, and what of it there was after two."""

    def keep(task: DetectionTask) -> None:
        if task.current_epoch == 2:
            shutil.copytree("whole", "stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetectionTask, "on_train_epoch_start", keep)
        score_in_turn(patch, 0.3, 0.2, 0.1, 0.1)
        run(run_dir="whole", schedule=epochs(4))
    return Path("stopped")


def test_a_resumed_run_ends_as_an_undisturbed_one(run: Run, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with everything that draws: sampling of anchors and RoIs, augmentation, order of the images."""
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


@pytest.mark.parametrize("place", [pytest.param("same", marks=pytest.mark.slow), "moved", "elsewhere"])
def test_the_best_is_not_forgotten_where_a_run_moves(
    run: Run, stopped: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place == "moved":
        stopped = stopped.rename("moved")
    score_in_turn(monkeypatch, 0.25, 0.1)  # the first epoch had 0.3
    resumed = run(ckpt=str(stopped / "last.ckpt"), resume=True, run_dir="elsewhere" if place == "elsewhere" else None)
    assert load(resumed / "best.ckpt")["global_step"] == 2
    assert (said(resumed)["best"]["AP"], said(resumed)["best"]["step"]) == (0.3, 2)
    assert [row["step"] for row in rows(resumed) if row["AP"]] == ["2", "4", "6", "8"]


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


def test_one_small_image_is_refused_in_the_fields_words(run: Run) -> None:
    with pytest.raises(InputError, match=r"too small for batch normalisation: .*train\.batch_size"):
        run(
            train={"batch_size": 1}, input={"short_side": 32, "long_side": 32}, ckpt=None,
            freeze={"stages": 0, "batch_norm": False},
        )  # fmt: skip
