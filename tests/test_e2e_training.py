"""Training, resuming, evaluation and prediction, as a user runs them: the real tools, each in a process of its own."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import termios
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scored_data import overrides_of, write_scored_data
from tool_runner import ROOT, Outcome, run_process, run_tool, tool_environment

from detector.evaluation.metrics import METRICS
from detector.inference.detector import Detector
from detector.training.schedule import ScheduleOptions

pytestmark = pytest.mark.slow

# The demo on a dozen small images, a row of history for each step.
DEMO = (
    "backbone=v2_0.5x", "data.generate={seed: 0, train: 12, val: 4, size: 96}", "input.short_side=96",
    "input.long_side=96", "train.batch_size=4", "val.batch_size=3", "val.every=1", "trainer.log_every=1",
    "optimizer.lr=0.002", "optimizer.base_batch=16", "schedule.warmup_steps=100", "schedule.warmup_factor=0.01",
)  # fmt: skip
FILES = ("best.ckpt", "last.ckpt", "config.yaml", "metrics.csv", "metrics.json", "train_batch.png", "curves.png")


def history(run: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows of steps and the rows of validations."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["loss"]], [row for row in rows if row["AP"]]


def tensorboard_steps(run: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("loss")]


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


class Lab:
    """A run of two epochs from random weights that already find something, on five images of three canvas sizes."""

    def __init__(self, folder: Path, detector: Detector) -> None:
        self.folder, self.detector = folder, detector
        detector.save(folder / "start.ckpt")
        self.root = write_scored_data(folder / "data", detector)

    def train(self, *overrides: str) -> Outcome:
        arguments = [
            "recipe=finetune", f"data.root={self.root}", f"ckpt={self.folder / 'start.ckpt'}", "run_dir=run",
            "backbone.weights=null", "input.short_side=64", "input.long_side=96", "train.batch_size=2",
            "val.batch_size=2", "val.every=1", "trainer.log_every=1", "schedule.epochs=2", "schedule.warmup_steps=0",
            "augment.scale=[1, 1]", "augment.photometric=0", "optimizer.lr=1e-5", "ema=0.5",
            "optimizer.base_batch=8", "schedule.kind=cosine", "schedule.final_share=0.01",
            *overrides_of(self.detector.options.spec()), *overrides,
        ]  # fmt: skip
        return run_tool("train", *arguments, cwd=self.folder)


@pytest.fixture
def lab(tmp_path: Path, small_detector: Detector) -> Lab:
    return Lab(tmp_path, small_detector)


def test_training_from_nothing_leaves_a_whole_run_directory(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/train.py"), *DEMO, "schedule.epochs=2"]
    outcome = run_process(command, tmp_path).ok()
    (run,) = (tmp_path / "runs/demo/v2_0.5x").iterdir()
    assert sorted(path.name for path in run.iterdir()) == sorted([*FILES, "tensorboard"])
    assert tensorboard_steps(run) == [0, 1, 2, 3, 4, 5]
    steps, validations = history(run)
    assert [(int(row["step"]), int(row["epoch"])) for row in steps] == [(i, (i - 1) // 3) for i in range(1, 7)]
    assert [int(row["step"]) for row in validations] == [3, 6]
    # The learning rate of each step, 4 images where lr is for 16; a fifth of the run is warm-up.
    assert [float(row["lr"]) for row in steps[:2]] == pytest.approx([0.002 / 4 * 0.01, 0.002 / 4])
    with Image.open(run / "train_batch.png") as picture:
        assert min(picture.size) > 90
    # Lines, not bars, where nobody watches; and nothing that a newcomer would worry about.
    assert outcome.out == ""
    for noise in ("Warning", "warn", "GPU available", "litlogger", "deprecated", "\r"):
        assert noise not in outcome.err
    assert "after epoch 2 of 2: AP 0." in outcome.err
    assert str(run.relative_to(tmp_path)) in outcome.err


def test_a_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = [sys.executable, str(ROOT / "tools/train.py"), *DEMO, "schedule.epochs=1", "trainer.progress_every=1"]
    shown = b""
    with subprocess.Popen(command, cwd=tmp_path, env=tool_environment(), stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        with suppress(OSError):  # the other side has closed
            while chunk := os.read(ours, 4096):
                shown += chunk
    os.close(ours)
    text = shown.decode()
    assert process.returncode == 0, text
    assert "Epoch 0: 100%" in text
    assert "loss=" in text
    assert "v_num" not in text
    assert "Warning" not in text


def test_evaluation_is_pycocotools_and_equals_what_training_said(lab: Lab) -> None:
    lab.train().ok()
    run_tool("eval", "ckpt=run/last.ckpt", cwd=lab.folder).ok()
    figures = json.loads((lab.folder / "run/eval/metrics.json").read_text())
    assert set(figures) == {*METRICS, "per_class"}
    assert list(figures["per_class"]) == ["cat", "dog", "bird"]
    assert 0.05 < figures["AP"] < 0.95
    oracle = pycocotools_figures(lab.root / "annotations/val.json", lab.folder / "run/eval/detections.json")
    ours = [-1.0 if figures[name] is None else figures[name] for name in METRICS]
    assert ours == pytest.approx(oracle, abs=1e-12)
    said = json.loads((lab.folder / "run/metrics.json").read_text())["last"]
    assert [said[name] for name in METRICS] == pytest.approx([figures[name] for name in METRICS], abs=1e-6)
    assert load(lab.folder / "run/last.ckpt")["detector"]["provenance"]["metrics"] == pytest.approx(
        {name: said[name] for name in METRICS}
    )


def pycocotools_figures(annotations: Path, detections: Path) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(None):
        truth = COCO(str(annotations))
        truth.dataset["info"] = {}
        scores = COCOeval(truth, truth.loadRes(str(detections)), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return [float(value) for value in scores.stats]


def test_evaluation_equals_prediction_box_for_box(lab: Lab) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the tool's process: another number sums in another order
    try:
        detector = Detector.load(lab.folder / "start.ckpt", "cpu")
        truth = json.loads((lab.root / "annotations/val.json").read_text())
        ids = [category["id"] for category in truth["categories"]]
        predicted = [
            row
            for image in truth["images"]
            for found in detector.predict(lab.root / "images" / image["file_name"], score_threshold=0)
            for row in found.to_coco(image["id"], ids)
        ]
    finally:
        torch.set_num_threads(threads)
    figures = []
    for size in (1, 3):
        arguments = (f"ckpt={lab.folder / 'start.ckpt'}", f"data.root={lab.root}", "trainer.accelerator=cpu")
        run_tool("eval", *arguments, f"val.batch_size={size}", f"out=eval{size}", cwd=lab.folder).ok()
        figures.append(json.loads((lab.folder / f"eval{size}/metrics.json").read_text()))
    assert json.loads((lab.folder / "eval1/detections.json").read_text()) == predicted
    assert len(predicted) > 50
    # Batch mates change sums in their last digits, and nothing else: canvases are not shared between sizes.
    assert [figures[0][name] for name in METRICS] == pytest.approx([figures[1][name] for name in METRICS], abs=1e-6)


def test_prediction_writes_images_and_json(lab: Lab) -> None:
    (lab.root / "images/deeper").mkdir()
    (lab.root / "images/0.png").rename(lab.root / "images/deeper/1.png")
    arguments = (f"source={lab.root / 'images'}", "out=found", "score_threshold=0.02")
    run_tool("predict", f"ckpt={lab.folder / 'start.ckpt'}", *arguments, cwd=lab.folder).ok()
    rows = json.loads((lab.folder / "found/detections.json").read_text())
    assert len(rows) == 5
    for row in rows:
        with Image.open(row["path"]) as source, Image.open(lab.folder / row["annotated"]) as annotated:
            assert annotated.size == source.size == (row["width"], row["height"])
            assert (np.asarray(annotated) != np.asarray(source)).any()
        assert len(row["boxes"]) == len(row["scores"]) == len(row["names"]) > 0
        assert min(row["scores"]) >= 0.02
    assert {Path(row["annotated"]).relative_to("found").as_posix() for row in rows} == {
        "1.png", "2.png", "3.png", "4.png", "deeper/1.png"
    }  # fmt: skip


def test_numbers_as_names_of_files_and_folders(lab: Lab) -> None:
    (lab.root / "images").rename(lab.folder / "2024")
    run_tool("predict", "ckpt=start.ckpt", "source=2024", "out=7", cwd=lab.folder).ok()
    assert (lab.folder / "7/detections.json").is_file()


def test_resume_goes_on_with_the_run_as_it_was_configured(lab: Lab) -> None:
    lab.train("schedule.epochs=1", "schedule.kind=steps", "schedule.milestones=[0.5]").ok()
    before, first_rows = load(lab.folder / "run/last.ckpt"), history(lab.folder / "run")
    assert (before["epoch"], before["global_step"]) == (0, 2)
    # Nothing but this: architecture, data and recipe are those of the run.
    run_tool("train", "ckpt=run/last.ckpt", "resume=true", "schedule.epochs=3", cwd=lab.folder).ok()
    after, (steps, validations) = load(lab.folder / "run/last.ckpt"), history(lab.folder / "run")
    assert (after["epoch"], after["global_step"]) == (2, 6)
    assert [int(row["step"]) for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [int(row["step"]) for row in validations] == [2, 4, 6]
    assert (steps[:2], validations[:1]) == first_rows
    moments = [load_["optimizer_states"][0]["state"][0]["step"] for load_ in (before, after)]
    assert [int(step) for step in moments] == [2, 6]
    # A milestone at half of 6 steps; lr 1e-5 for 8 images, 2 a step. (Step 3 has what step 2 of the shorter run left.)
    assert [float(row["lr"]) for row in steps[3:]] == pytest.approx([2.5e-7] * 3)
    assert tensorboard_steps(lab.folder / "run") == [0, 1, 2, 3, 4, 5]
    message = run_tool("train", "ckpt=run/last.ckpt", "resume=true", cwd=lab.folder).error()
    assert "has finished its 3 epochs; raise schedule.epochs" in message
    message = run_tool("train", "ckpt=run/last.ckpt", "resume=true", "recipe=demo", cwd=lab.folder).error()
    assert "a resumed run keeps its recipe" in message
    message = run_tool(
        "train", "ckpt=run/last.ckpt", "resume=true", "schedule.epochs=9", "neck.width=32", cwd=lab.folder
    ).error()
    wanted = {"name": "cem", "width": 32}
    assert f"neck is {wanted}, but the checkpoint was trained with" in message


def test_a_killed_run_goes_on_from_its_last_epoch(lab: Lab) -> None:
    """SIGKILL some epochs in: what is resumed ends with the history of a run that was never disturbed."""
    lab.train("schedule.epochs=6", "run_dir=whole").ok()
    arguments = ["recipe=finetune", f"data.root={lab.root}", "run_dir=killed"]
    config = (lab.folder / "whole/config.yaml").read_text()
    command = [line[2:].strip("'") for line in config.split("overrides:\n")[1].splitlines() if line.startswith("- ")]
    command = [sys.executable, str(ROOT / "tools/train.py"), *command[:-1], *arguments]
    with subprocess.Popen(
        command, cwd=lab.folder, env=tool_environment(), stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (lab.folder / "killed/metrics.csv").is_file() and len(history(lab.folder / "killed")[1]) >= 2:
                break
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    done = load(lab.folder / "killed/last.ckpt")["global_step"]
    assert 2 <= done < 12
    run_tool("train", "ckpt=killed/last.ckpt", "resume=true", cwd=lab.folder).ok()
    whole, resumed = history(lab.folder / "whole"), history(lab.folder / "killed")
    assert [row["step"] for row in resumed[0]] == [str(step) for step in range(1, 13)]
    assert [row["step"] for row in resumed[1]] == [row["step"] for row in whole[1]]
    assert [row["lr"] for row in resumed[0]] == [row["lr"] for row in whole[0]]
    schedule = ScheduleOptions(kind="cosine", epochs=6, warmup_steps=0, final_share=0.01)
    expected = [1e-5 / 4 * schedule.factor(step, 12) for step in range(12)]
    assert [float(row["lr"]) for row in resumed[0]] == pytest.approx(expected, rel=1e-3)
    assert load(lab.folder / "killed/last.ckpt")["global_step"] == 12
    assert not list((lab.folder / "killed").glob(".*"))


@pytest.mark.parametrize(
    ("kind", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_interrupt_leaves_a_run_that_can_go_on(lab: Lab, kind: signal.Signals, code: int, word: str) -> None:
    arguments = [f"data.root={lab.root}", *DEMO[2:], *overrides_of(lab.detector.options.spec()), "schedule.epochs=500"]
    command = [sys.executable, str(ROOT / "tools/train.py"), "recipe=finetune", "backbone.weights=null", *arguments]
    with subprocess.Popen(
        [*command, "run_dir=run", "train.batch_size=2"], cwd=lab.folder, env=tool_environment(),
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            if "after epoch 2 of 500" in line:
                break
        process.send_signal(kind)
        rest = process.communicate(timeout=60)[1]
    assert process.returncode == code, rest
    assert rest.endswith(f"{word}\n")
    assert "Traceback" not in rest
    steps = load(lab.folder / "run/last.ckpt")["global_step"]
    assert steps >= 2
    epochs = load(lab.folder / "run/last.ckpt")["epoch"] + 2
    run_tool("train", "ckpt=run/last.ckpt", "resume=true", f"schedule.epochs={epochs}", cwd=lab.folder).ok()
    assert load(lab.folder / "run/last.ckpt")["global_step"] > steps


def test_checkpoints_are_data_and_hold_the_average(lab: Lab) -> None:
    lab.train().ok()
    for name in ("best.ckpt", "last.ckpt"):
        checkpoint = load(lab.folder / "run" / name)
        assert set(checkpoint["state_dict"]) == set(load(lab.folder / "start.ckpt")["state_dict"])
        differs = [
            key for key, value in checkpoint["state_dict"].items()
            if not torch.equal(value, checkpoint["current_model_state"][key])
        ]  # fmt: skip
        assert "network.head.class_logits.weight" in differs
        about = checkpoint["detector"]
        assert about["provenance"]["config"]["optimizer"]["lr"] == 1e-5
        assert about["class_names"] == ["cat", "dog", "bird"]


def test_fine_tuning_on_other_classes_takes_all_but_the_class_layers(lab: Lab) -> None:
    annotations = lab.root / "annotations"
    for path in annotations.iterdir():
        content = json.loads(path.read_text())
        content["categories"].append({"id": 91, "name": "fish"})
        path.write_text(json.dumps(content))
    outcome = lab.train("optimizer.lr=1e-12", "schedule.epochs=1", "ema=null").ok()
    assert re.search(r"\| classes +\| background, 'cat', 'dog', 'bird' \| 'fish' +\| - +\|", outcome.err)
    tuned, start = (load(lab.folder / name)["state_dict"] for name in ("run/last.ckpt", "start.ckpt"))
    moved = {key for key, value in tuned.items() if value.shape != start[key].shape}
    assert moved == {"network.head.class_logits.weight", "network.head.class_logits.bias"}
    kept = [key for key in tuned if key not in moved and "running" not in key and "batches" not in key]
    assert all(torch.allclose(tuned[key], start[key], atol=1e-6) for key in kept)
    run_tool("eval", "ckpt=run/last.ckpt", cwd=lab.folder).ok()
    assert "fish" in json.loads((lab.folder / "run/eval/metrics.json").read_text())["per_class"]


@pytest.mark.parametrize("tool", ["train", "eval", "predict"])
def test_help(tmp_path: Path, tool: str) -> None:
    text = run_tool(tool, "--help", cwd=tmp_path).ok().out
    assert f"python tools/{tool}.py" in text
    assert "ckpt" in text
    assert list(tmp_path.iterdir()) == []
