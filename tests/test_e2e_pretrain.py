"""Pre-training as a user runs it: the real tool, each run in a process of its own, one or two at a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from classified_data import write_classified_data
from tool_runner import ROOT, Outcome, run_process, run_tool

# Seconds on tiny images.
TINY = (
    "backbone=v2_0.5x", "input.size=32", "input.resize=32", "train.batch_size=4", "val.batch_size=4",
    "schedule.epochs=1", "workers=0", "trainer.log_every=1", "trainer.accelerator=cpu",
)  # fmt: skip
CROPS = ("pretrain=crops", "data.generate={seed: 1, train: 4, val: 2, size: 32}")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


def figures(run: Path) -> dict[str, Any]:
    last: dict[str, Any] = json.loads((run / "metrics.json").read_text())["last"]
    return last


def weights(path: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def test_crops_from_nothing(tmp_path: Path) -> None:
    # Each of the eight classes needs an image: enough scenes.
    outcome = run_tool("pretrain", *CROPS, *TINY, "data.generate.train=12", "data.generate.val=12", cwd=tmp_path).ok()
    (run,) = (tmp_path / "runs/pretrain/crops/v2_0.5x").iterdir()
    assert {path.name for path in run.iterdir()} == {
        "best.pth", "best.ckpt", "last.ckpt", "config.yaml", "metrics.csv", "metrics.json", "curves.png",
        "train_batch.png", "tensorboard",
    }  # fmt: skip
    assert figures(run)["images"] == len(list((tmp_path / "data/crops/val").rglob("*.jpg")))
    assert outcome.out == ""
    for noise in ("Warning", "warn", "GPU available", "deprecated", "\r"):
        assert noise not in outcome.err
    command = outcome.err.strip().splitlines()[-1]
    assert command == (
        "python tools/train.py recipe=finetune backbone=v2_0.5x "
        f"backbone.weights={run.relative_to(tmp_path)}/best.pth data.root=DIR"
    )


@pytest.mark.slow
def test_a_broken_image_is_named(tmp_path: Path) -> None:
    root = write_classified_data(tmp_path / "data")
    path = root / "val/bee/1.png"
    path.write_bytes(path.read_bytes()[:60])
    message = run_tool("pretrain", f"data.root={root}", *TINY, "workers=1", cwd=tmp_path).error()
    assert message.startswith(f"error: {path}: ")


@pytest.mark.slow
def test_the_weights_begin_a_detector(tmp_path: Path) -> None:
    """With the command that the last line of the log gives, made small."""
    enough = ("data.generate.train=12", "data.generate.val=12")
    command = run_tool("pretrain", *CROPS, *TINY, *enough, cwd=tmp_path).ok().err.strip().splitlines()[-1]
    tool, *arguments = command.removeprefix("python tools/").split()
    assert tool == "train.py"
    outcome = run_tool(
        "train", *["recipe=demo" if word.startswith("recipe=") else word for word in arguments[:-1]],
        "data.generate={seed: 0, train: 4, val: 2, size: 96}", "input.short_side=96", "input.long_side=96",
        "train.batch_size=2", "schedule.epochs=1", "optimizer.lr=1e-12", "optimizer.weight_decay=0", "ema=null",
        "run_dir=detector", cwd=tmp_path,
    ).ok()  # fmt: skip
    assert "best.pth, 8 of a classifier ignored" in outcome.err
    (run,) = (tmp_path / "runs/pretrain/crops/v2_0.5x").iterdir()
    state = torch.load(tmp_path / "detector/last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    for name, value in weights(run / "best.pth").items():
        if name.endswith("weight") and not name.startswith(("conv5", "fc")):
            assert torch.allclose(state[f"network.backbone.{name}"], value, atol=1e-6), name


def run_two(launcher: str, *overrides: str, cwd: Path) -> Outcome:
    path = str(ROOT / "tools/pretrain.py")
    if launcher == "torchrun":
        return run_process([*TORCHRUN, path, *overrides], cwd)
    return run_process([sys.executable, path, *overrides, "trainer.devices=2"], cwd)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "spare"), [("lightning", 1), ("torchrun", 4)])
def test_two_processes_score_as_one(tmp_path: Path, launcher: str, spare: int) -> None:
    """13 images of validation, or 16, in batches of four on two processes: each is counted once.

    What they said together is what one process says of the weights that they wrote.
    """
    root = write_classified_data(tmp_path / "data", val=3)
    for number in range(spare):
        (root / "val/ant" / f"more{number}.png").write_bytes((root / "val/cow/0.png").read_bytes())
    arguments = (f"data.root={root}", *TINY, "train.batch_size=3", "optimizer.lr=0.1", "ema=0.5")
    outcome = run_two(launcher, *arguments, "run_dir=two", cwd=tmp_path).ok()
    assert outcome.err.count("run directory: ") == 1
    assert outcome.err.count("last epoch: ") == 1
    assert "Warning" not in outcome.err
    said = figures(tmp_path / "two")
    assert said["images"] == 12 + spare
    assert said["step"] == 2  # 12 images, three a step on each of two
    top1, top5, loss = naive_figures(weights(tmp_path / "two/best.pth"), root)
    assert said["top1"] == pytest.approx(top1, abs=1e-9)
    assert said["top5"] == pytest.approx(top5, abs=1e-9)
    assert said["loss_val"] == pytest.approx(loss, rel=1e-4)


def naive_figures(state: dict[str, torch.Tensor], root: Path) -> tuple[float, float, float]:
    """By torchvision's network, in one process, one image at a time."""
    import torchvision

    from detector.data.image_folder import ImageFolder, PretrainInput, eval_view
    from detector.models.light_head_rcnn import MEAN, STD

    network = torchvision.models.shufflenet_v2_x0_5(num_classes=3).eval()
    network.load_state_dict(state)
    folder = ImageFolder(root / "val", eval_view(PretrainInput(size=32, resize=32)))
    right, loss = 0, 0.0
    with torch.no_grad():
        for i in range(len(folder)):
            image, label, _ = folder[i]
            pixels = (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
            logits = network(pixels[None])[0].double()
            right += int(logits.argmax()) == label
            loss -= float(logits.log_softmax(0)[label])
    return right / len(folder), 1.0, loss / len(folder)


@pytest.mark.slow
def test_one_image_for_two_processes(tmp_path: Path) -> None:
    """More processes than batches: the rank without images takes part in the sums."""
    root = write_classified_data(tmp_path / "data", val=1)
    for name in ("bee", "cow"):
        for path in list((root / "val" / name).iterdir())[1:]:
            path.unlink()
    run_two("lightning", f"data.root={root}", *TINY, "val.batch_size=64", "run_dir=two", cwd=tmp_path).ok()
    assert figures(tmp_path / "two")["images"] == 3
