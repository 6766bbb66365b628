"""Two processes on one CPU (gloo), started by Lightning and by torchrun. A hang fails by its time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from scored_data import SIZES, overrides_of, write_scored_data
from tool_runner import ROOT, Outcome, run_process, run_tool, tool_environment

from detector.evaluation.metrics import METRICS
from detector.inference.detector import Detector

pytestmark = pytest.mark.slow

LIMIT = 240.0
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
LAUNCHERS = ("lightning", "torchrun")


def run_two(launcher: str, tool: str, *overrides: str, cwd: Path) -> Outcome:
    path = str(ROOT / f"tools/{tool}.py")
    if launcher == "torchrun":
        return run_process([*TORCHRUN, path, *overrides, "trainer.accelerator=cpu"], cwd, LIMIT)
    command = [sys.executable, path, *overrides, "trainer.devices=2", "trainer.accelerator=cpu"]
    return run_process(command, cwd, LIMIT)


def score(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    figures, detections = ((folder / name).read_text() for name in ("metrics.json", "detections.json"))
    return json.loads(figures), json.loads(detections)


def training(root: Path, detector: Detector) -> list[str]:
    return [
        "recipe=finetune", f"data.root={root}", "backbone.weights=null", "input.short_side=64", "input.long_side=96",
        "train.batch_size=1", "val.batch_size=2", "val.every=1", "trainer.log_every=1", "schedule.epochs=1",
        "optimizer.lr=0.001", "optimizer.base_batch=8", "schedule.warmup_steps=0",
        *overrides_of(detector.options.spec()),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("launcher", "count", "empty"),
    [("torchrun", 5, ()), ("lightning", 5, (1, 3)), ("torchrun", 1, ())],
    ids=["torchrun", "lightning, one rank without objects", "one image for two"],
)
def test_two_processes_score_as_one(
    tmp_path: Path, small_detector: Detector, launcher: str, count: int, empty: tuple[int, ...]
) -> None:
    # Images of one size are shared out in the file's order: the odd ones to rank 1.
    sizes = SIZES[:count] if not empty else SIZES[:1] * count
    root = write_scored_data(tmp_path / "data", small_detector, sizes, empty)
    small_detector.save(tmp_path / "detector.ckpt")
    arguments = (f"ckpt={tmp_path / 'detector.ckpt'}", f"data.root={root}", "val.batch_size=2")
    run_tool("eval", *arguments, "trainer.accelerator=cpu", "out=one", cwd=tmp_path).ok()
    outcome = run_two(launcher, "eval", *arguments, "out=two", cwd=tmp_path).ok()
    (one, one_found), (two, two_found) = score(tmp_path / "one"), score(tmp_path / "two")
    assert 0.05 < one["AP"] < 0.95
    assert [two[name] for name in METRICS] == pytest.approx([one[name] for name in METRICS], abs=1e-12)
    assert two["per_class"] == pytest.approx(one["per_class"], abs=1e-12)
    keys = ("image_id", "category_id")
    assert [[row[key] for key in keys] for row in two_found] == [[row[key] for key in keys] for row in one_found]
    for name in ("metrics.json", "detections.json"):
        assert outcome.err.count(f"{name} in two") == 1
    assert outcome.err.count("val.json: ") == 1


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_training_with_two_processes(tmp_path: Path, small_detector: Detector, launcher: str) -> None:
    root = write_scored_data(tmp_path / "data", small_detector)
    outcome = run_two(launcher, "train", *training(root, small_detector), cwd=tmp_path).ok()
    # One run directory, though every rank reads the clock; written once.
    (run,) = (tmp_path / "runs/finetune/v2_1x").iterdir()
    assert {path.name for path in run.iterdir()} == {
        "best.ckpt", "last.ckpt", "config.yaml", "metrics.csv", "metrics.json", "train_batch.png", "curves.png",
        "tensorboard",
    }  # fmt: skip
    rows = (run / "metrics.csv").read_text().splitlines()
    # 5 images, one a step and process: 3 steps (one image comes twice), then the validation.
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2", "3", "3"]
    # The rate is for 8 images a step.
    assert float(rows[1].split(",")[2]) == pytest.approx(0.001 * 2 / 8)
    assert outcome.err.count("run directory: ") == 1
    assert "Warning" not in outcome.err
    # What the processes said together is what one process says of the same checkpoint.
    run_tool("eval", f"ckpt={run / 'last.ckpt'}", "trainer.accelerator=cpu", "out=one", cwd=tmp_path).ok()
    said = json.loads((run / "metrics.json").read_text())["last"]
    figures, _ = score(tmp_path / "one")
    assert [figures[name] for name in METRICS] == pytest.approx([said[name] for name in METRICS], abs=1e-6)


def test_a_run_is_overwritten_once_both_have_read_it(tmp_path: Path, small_detector: Detector) -> None:
    """From its own weights: the second process reads them after the first one has."""
    arguments = (*training(write_scored_data(tmp_path / "data", small_detector), small_detector), "run_dir=run")
    small_detector.save(tmp_path / "start.ckpt")
    run_tool("train", *arguments, "ckpt=start.ckpt", "trainer.accelerator=cpu", cwd=tmp_path).ok()
    run_two("lightning", "train", *arguments, "ckpt=run/last.ckpt", "overwrite=true", "seed=5", cwd=tmp_path).ok()
    written = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    assert written["detector"]["provenance"]["config"]["seed"] == 5
    assert (tmp_path / "run/tensorboard").is_dir()


def test_training_where_a_rank_sees_no_object(tmp_path: Path, small_detector: Detector) -> None:
    """One image for each process a step: every loss has to take part in the backward pass on both.

    Of four images one has objects (a split without any is refused), so in one of an epoch's two steps neither
    process sees any, and in the other one process, whatever the order.
    """
    root = write_scored_data(tmp_path / "data", small_detector, SIZES[:1] * 4, (0, 1, 2))
    val = root / "annotations/val.json"
    val.write_text(json.dumps(json.loads(val.read_text()) | {"annotations": []}))
    arguments = training(root, small_detector)
    run_two("lightning", "train", *arguments, "schedule.epochs=2", "run_dir=run", cwd=tmp_path).ok()
    checkpoint = torch.load(tmp_path / "run/last.ckpt", map_location="cpu", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    assert json.loads((tmp_path / "run/metrics.json").read_text())["last"]["AP"] is None


def test_training_on_an_image_that_cannot_be_read_ends_both(tmp_path: Path, small_detector: Detector) -> None:
    root = write_scored_data(tmp_path / "data", small_detector, SIZES[:1] * 4)
    (root / "images/3.png").write_bytes((root / "images/3.png").read_bytes()[:200])
    arguments = (*training(root, small_detector), "data.cache=false", "run_dir=run")
    outcome = run_two("lightning", "train", *arguments, cwd=tmp_path)
    assert outcome.code != 0
    assert outcome.err.count("image id 97: ") == 1
    assert "Traceback" not in outcome.err


def test_scoring_an_image_that_one_rank_cannot_read_ends_both(tmp_path: Path, small_detector: Detector) -> None:
    """Lightning's own processes end together in training, above; of torchrun's each ends by itself."""
    root = write_scored_data(tmp_path / "data", small_detector, SIZES[:1] * 4)
    small_detector.save(tmp_path / "detector.ckpt")
    (root / "images/3.png").write_bytes((root / "images/3.png").read_bytes()[:200])  # id 97, rank 1
    arguments = (f"ckpt={tmp_path / 'detector.ckpt'}", f"data.root={root}")
    outcome = run_two("torchrun", "eval", *arguments, cwd=tmp_path)
    assert outcome.code != 0
    assert "error (rank 1): image id 97: " in outcome.err
    assert not (tmp_path / "eval/metrics.json").exists()


@pytest.mark.parametrize(("launcher", "told"), [("lightning", "one"), ("lightning", "all"), ("torchrun", "one")])
def test_sigterm_ends_both_and_leaves_a_whole_checkpoint(
    tmp_path: Path, small_detector: Detector, launcher: str, told: str
) -> None:
    """Sent to the first process, as `kill` does, or to all, as a scheduler does."""
    root = write_scored_data(tmp_path / "data", small_detector)
    path, arguments = str(ROOT / "tools/train.py"), (*training(root, small_detector), "schedule.epochs=500")
    start = TORCHRUN if launcher == "torchrun" else (sys.executable,)
    command = [*start, path, *arguments, "run_dir=run", "trainer.accelerator=cpu", "trainer.devices=2"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=tool_environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if "after epoch 2 of 500" in line:
                    break
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            (os.killpg if told == "all" else os.kill)(process.pid, signal.SIGTERM)
            rest = process.communicate(timeout=60)[1]
            left = [file for child in children for file in Path("/proc").glob(f"{child}/cmdline") if file.read_bytes()]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert len(children) >= 1
    assert left == []
    if launcher == "lightning":
        assert process.returncode == 143, rest
        assert "Traceback" not in rest
    assert torch.load(tmp_path / "run/last.ckpt", weights_only=True)["global_step"] >= 3
    Detector.load(tmp_path / "run/last.ckpt")


def test_too_few_images_for_the_processes(tmp_path: Path, small_detector: Detector) -> None:
    root = write_scored_data(tmp_path / "data", small_detector, SIZES[:1])
    outcome = run_two("torchrun", "train", *training(root, small_detector), cwd=tmp_path)
    assert outcome.code != 0
    assert outcome.err.count("error: The training split has 1 images, fewer than one batch on each of 2 devices") == 1


def test_two_numbers_of_processes(tmp_path: Path) -> None:
    command = [*TORCHRUN, str(ROOT / "tools/train.py"), "trainer.devices=3"]
    outcome = run_process(command, tmp_path, LIMIT)
    assert "error: trainer.devices=3, but torchrun started 2 processes" in outcome.err
    assert 'tools/train.py", line' not in outcome.err
