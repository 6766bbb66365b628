"""Pre-training from configuration: the recipe's figures by hand, what a run writes, and that it goes on exactly."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from classified_data import CLASSES, write_classified_data
from PIL import Image
from torch import Tensor

from detector import cli
from detector.errors import InputError
from detector.models.backbones import build_backbone
from detector.models.backbones.classifier import ImageClassifier
from detector.models.backbones.contract import ClassifierOptions
from detector.models.backbones.pretrained import load_weights
from detector.models.light_head_rcnn import MEAN, STD
from detector.training.classification import ClassificationTask
from detector.training.pretrain import PretrainOptions, classifier_weights, next_command, pretrain, read_classifier

IMAGENET = 1_281_167  # training images of ILSVRC 2012
# Seconds, on images of 80 x 64.
SMALL = (
    "backbone=v2_0.5x", "input.size=64", "input.resize=64",
    "train.batch_size=4", "val.batch_size=4", "workers=0", "trainer.accelerator=cpu", "trainer.devices=1",
    "trainer.log_every=1", "optimizer.base_batch=32", "optimizer.lr=0.4",
)  # fmt: skip


def configuration(*overrides: str) -> PretrainOptions:
    options = cli.compose("pretrain", list(overrides)).options()
    assert isinstance(options, PretrainOptions)
    return options


def run(root: Path, *overrides: str, name: str = "run") -> Path:
    """Train on three classes, each of four images; the run directory, root/name."""
    if not (root / "data").exists():
        write_classified_data(root / "data")
    return pretrain(configuration(f"data.root={root / 'data'}", f"run_dir={root / name}", *SMALL, *overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of four epochs, and as `stopped` what of it there was after two."""
    root = tmp_path_factory.mktemp("pretrain")

    def keep(task: ClassificationTask) -> None:
        if task.current_epoch == 2:
            shutil.copytree(root / "run", root / "stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassificationTask, "on_train_epoch_start", keep)
        run(root, "schedule.epochs=4", "ema=0.5")
    return root


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_papers_recipe() -> None:
    """Zhang et al. 2018, section 4: 0.5 to 0 in 300,000 steps of 1024 images."""
    options = configuration("data.root=x")
    assert options.recipe_name == "imagenet"
    optimizer, schedule = options.optimizer, options.schedule
    assert [optimizer.scaled_lr(batch) for batch in (1024, 256, 64)] == pytest.approx([0.5, 0.125, 0.03125])
    epochs = schedule.epochs_for(IMAGENET)
    assert epochs == 240
    assert epochs * IMAGENET == pytest.approx(300_000 * 1024, rel=1e-3)
    for total in (300_000, 1_200_000):  # a quarter of the batch takes four times the steps
        rates = [0.5 * schedule.factor(step, total) for step in (0, total // 4, total // 2, total - 1, total)]
        assert rates == pytest.approx([0.5, 0.375, 0.25, 0.5 / total, 0])
    assert (optimizer.name, optimizer.momentum, optimizer.weight_decay) == ("sgd", 0.9, 4e-5)
    assert (options.label_smoothing, options.input.size, options.input.resize) == (0.1, 224, 256)
    assert options.train.batch_size * 4 == 1024
    # The file of the recipe says nothing that the options do not say by themselves.
    given = options.to_dict()
    for name, value in PretrainOptions(backbone={}).to_dict().items():
        if name not in ("backbone", "data", "overrides", "recipe_name", "backbone_name"):
            assert given[name] == value, name


def test_a_run_leaves_what_it_found(finished: Path) -> None:
    folder = finished / "run"
    assert {path.name for path in folder.iterdir()} == {
        "best.pth", "best.ckpt", "last.ckpt", "config.yaml", "metrics.csv", "metrics.json", "curves.png",
        "train_batch.png", "tensorboard",
    }  # fmt: skip
    steps = [row for row in rows(folder) if row["loss"]]
    validations = [row for row in rows(folder) if row["top1"]]
    # 12 images, 4 a step; the rate of 4 images where 0.4 is for 32, on its way to 0 in 12 steps.
    assert [int(row["step"]) for row in steps] == list(range(1, 13))
    assert [float(row["lr"]) for row in steps] == pytest.approx([0.05 * (12 - i) / 12 for i in range(12)], rel=1e-3)
    assert [int(row["step"]) for row in validations] == [3, 6, 9, 12]
    said = json.loads((folder / "metrics.json").read_text())
    assert set(said["last"]) == {"top1", "top5", "loss_val", "images", "epoch", "step"}
    assert (said["last"]["images"], said["last"]["step"]) == (12, 12)
    assert float(validations[-1]["top1"]) == pytest.approx(said["last"]["top1"], abs=1e-6)
    assert said["best"]["top1"] == pytest.approx(max(float(row["top1"]) for row in validations), abs=1e-6)
    with Image.open(folder / "train_batch.png") as picture:
        assert min(picture.size) > 120


def naive_top1(network: Callable[[Tensor], Tensor], root: Path) -> tuple[float, float]:
    """Top-1 and cross-entropy with Pillow and torchvision alone, one image at a time."""
    right, loss, count = 0, 0.0, 0
    view = torchvision.transforms.Compose([torchvision.transforms.CenterCrop(64), torchvision.transforms.PILToTensor()])
    for label, name in enumerate(CLASSES):
        for path in sorted((root / "val" / name).iterdir()):
            with Image.open(path) as picture:
                pixels = view(picture.convert("RGB")).double()
            image = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
            logits = network(image.float()[None])[0].double()
            right += int(logits.argmax()) == label
            loss -= logits.log_softmax(0)[label].item()
            count += 1
    return right / count, loss / count


def test_the_best_weights_are_torchvisions_network_and_score_as_said(finished: Path) -> None:
    """The keys and the figures, by torchvision's ShuffleNet V2 0.5x with three classes."""
    weights = load(finished / "run/best.pth")
    assert {type(value) for value in weights.values()} == {Tensor}
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=3)
    network.load_state_dict(weights)
    said = json.loads((finished / "run/metrics.json").read_text())["best"]
    with torch.no_grad():
        top1, loss = naive_top1(network.eval(), finished / "data")
    assert top1 == pytest.approx(said["top1"], abs=1e-9)
    assert loss == pytest.approx(said["loss_val"], rel=1e-4)
    assert load(finished / "run/best.ckpt")["global_step"] == said["step"]


def test_a_backbone_takes_the_best_weights(finished: Path) -> None:
    backbone = configuration("data.root=x", *SMALL).backbone
    trained, fresh = (build_backbone(backbone) for _ in range(2))
    network = ImageClassifier(trained, 3, ClassifierOptions(conv5_channels=1024))
    checkpoint = read_classifier(finished / "run/best.ckpt")
    network.load_state_dict({key.removeprefix("network."): value for key, value in checkpoint["state_dict"].items()})
    report = load_weights(fresh, finished / "run/best.pth")
    assert len(report.ignored) == 8  # conv5: weight, and 5 tensors of its normalisation; fc: weight, bias
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        theirs, ours = network.eval().backbone(images), fresh.eval()(images)
    for name in ("c3", "c4", "c5"):
        assert torch.equal(ours[name], theirs[name]), name
    # The moving average is what was scored and is taken; not the weights that training went on with.
    current = checkpoint["current_model_state"]["network.fc.weight"]
    assert not torch.equal(current, load(finished / "run/best.pth")["fc.weight"])


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_undisturbed_one(finished: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    (finished / "run").rename(whole)
    shutil.copytree(finished / "stopped", finished / "run")
    try:
        assert load(finished / "run/last.ckpt")["global_step"] == 6
        # Nothing but this: data, backbone and recipe are those of the run.
        resumed = pretrain(configuration(f"ckpt={finished / 'run/last.ckpt'}", "resume=true"))
        one, other = load(whole / "last.ckpt"), load(resumed / "last.ckpt")
        assert other["global_step"] == 12
        for part in ("state_dict", "current_model_state"):
            assert one[part].keys() == other[part].keys()
            for name, value in one[part].items():
                assert torch.equal(value, other[part][name]), name
        assert rows(resumed) == rows(whole)
        assert (resumed / "metrics.json").read_text() == (whole / "metrics.json").read_text()
        weights = load(whole / "best.pth"), load(resumed / "best.pth")
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    finally:
        shutil.rmtree(finished / "run")
        shutil.copytree(whole, finished / "run")


def test_a_resumed_run_finds_the_best_weights_in_the_best_checkpoint(finished: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(finished / "run", tmp_path / "moved")
    (moved / "best.pth").unlink()
    best = load(moved / "best.ckpt")
    pretrain(configuration(f"ckpt={moved / 'last.ckpt'}", "resume=true", "schedule.epochs=5"))
    weights, now = load(moved / "best.pth"), load(moved / "best.ckpt")
    assert now["classifier"]["provenance"]["metrics"]["top1"] >= best["classifier"]["provenance"]["metrics"]["top1"]
    expected = classifier_weights(now)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


def test_best_weights_that_cannot_be_written_are_named(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = shutil.copytree(finished / "run", tmp_path / "moved")
    (moved / "best.pth").unlink()
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "best.pth":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"Cannot write '.*/moved/best\.pth': No space left on device\. .* Make room"):
        pretrain(configuration(f"ckpt={moved / 'last.ckpt'}", "resume=true", "schedule.epochs=5"))


def test_resuming_refuses_what_cannot_be_changed(finished: Path, tmp_path: Path) -> None:
    checkpoint = f"ckpt={finished / 'run/last.ckpt'}"
    with pytest.raises(InputError, match=r"has finished its 4 epochs; raise schedule\.epochs"):
        pretrain(configuration(checkpoint, "resume=true"))
    with pytest.raises(InputError, match=r"pretrain=crops: a resumed run keeps its pretrain \(imagenet with v2_0\.5x"):
        pretrain(configuration(checkpoint, "resume=true", "pretrain=crops"))
    with pytest.raises(InputError, match=r"resume=true: backbone is .*, but the checkpoint was trained with"):
        pretrain(configuration(checkpoint, "resume=true", "backbone.se=true", "schedule.epochs=5"))
    write_classified_data(tmp_path / "other", classes=("ant", "bee", "dog"))
    with pytest.raises(InputError, match=r"the data set has the classes \['ant', 'bee', 'dog'\], but"):
        pretrain(configuration(checkpoint, "resume=true", "schedule.epochs=5", f"data.root={tmp_path / 'other'}"))


def test_starting_from_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The backbone's; the classifier starts anew."""
    start = torchvision.models.shufflenet_v2_x0_5(num_classes=7).state_dict()
    torch.save(start, tmp_path / "start.pth")
    seen: dict[str, Tensor] = {}
    monkeypatch.setattr(
        ClassificationTask,
        "on_train_start",
        lambda task: seen.update({name: value.clone() for name, value in task.network.state_dict().items()}),
    )
    with caplog.at_level("INFO"):
        run(tmp_path, "schedule.epochs=1", f"weights={tmp_path / 'start.pth'}")
    for name, value in start.items():
        if not name.startswith(("conv5", "fc")):
            assert torch.equal(seen[f"backbone.{name}"], value), name
    assert not torch.equal(seen["conv5.0.weight"], start["conv5.0.weight"])
    assert "12 training and 12 validation images of 3 classes, 1 epochs" in caplog.text
    assert caplog.messages[-1].endswith(
        "\npython tools/train.py recipe=finetune backbone=v2_0.5x "
        f"backbone.weights={tmp_path}/run/best.pth data.root=DIR"
    )
    # By the name that it has for a detector, too.
    assert configuration("backbone.weights=a.pth").backbone.weights == "a.pth"


def test_without_a_head_the_average_of_c5_is_classified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And in bf16, where it is asked for."""
    computed: list[torch.dtype] = []
    forward = ImageClassifier.forward

    def spy(network: ImageClassifier, images: Tensor) -> Tensor:
        logits = forward(network, images)
        computed.append(logits.dtype)
        return logits

    monkeypatch.setattr(ImageClassifier, "forward", spy)
    folder = run(tmp_path, "schedule.epochs=1", "backbone.classifier=null", "trainer.precision=bf16-mixed")
    assert {*computed} == {torch.bfloat16}
    weights = load(folder / "best.pth")
    assert weights["fc.weight"].shape == (3, 192)  # table 5: stage 4 of 0.5x
    assert not any(name.startswith("conv5") for name in weights)
    assert weights["fc.weight"].dtype == torch.float32  # what it keeps
    assert np.isfinite([float(row["loss"]) for row in rows(folder) if row["loss"]]).all()


def test_classifier_weights_have_the_names_of_torchvision() -> None:
    state = {"network.backbone.conv1.0.weight": 1, "network.conv5.0.weight": 2, "network.fc.bias": 3}
    assert classifier_weights({"state_dict": state}) == {"conv1.0.weight": 1, "conv5.0.weight": 2, "fc.bias": 3}


def test_the_next_command_keeps_the_architecture() -> None:
    overrides = ("backbone=v2_1x", "backbone.se=true", "backbone.weights=a", "backbone.classifier.dropout=0.5")
    options = PretrainOptions(backbone={}, backbone_name="v2_1x", overrides=overrides)
    assert next_command(options, Path("runs/x")) == (
        "python tools/train.py recipe=finetune backbone=v2_1x backbone.se=true backbone.weights=runs/x/best.pth "
        "data.root=DIR"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"data\.root is not set: give data\.root=DIR .*DIR/train/CLASS/.*pretrain=crops, which needs no data"),
        (["data.root=nowhere"], r"No folder nowhere/train here"),
        (["data.root=x", "ckpt=a.ckpt"], r"ckpt is for resume=true; .*weights=PATH"),
        (["ckpt=a.ckpt", "resume=true"], r"No checkpoint at 'a\.ckpt'"),
        (["resume=true"], r"resume=true needs the checkpoint"),
        (["label_smoothing=1"], r"label_smoothing=1: expected a number from 0 to below 1"),
        (["input.size=0"], r"input\.size=0: expected a whole number"),
        (["augment.colour=2"], r"augment\.colour=2: expected a number from 0 to 1"),
        (["data.root=x", "augment.scale=[0.5, 2]"], r"augment\.scale=\[0\.5, 2\.0\]: shares"),
        (["data.train="], r"data\.train=: expected a text"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        pretrain(configuration(*overrides))
    assert not any(tmp_path.iterdir())


def test_a_wrong_head_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"backbone\.classifier\.width is not a key"):
        run(tmp_path, "+backbone.classifier.width=3")
    assert not (tmp_path / "run").exists()


def test_other_files_are_no_checkpoints(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"best\.pth' is a torch file, but not a checkpoint .*weights=PATH"):
        read_classifier(finished / "run/best.pth")
    (tmp_path / "half.ckpt").write_bytes((finished / "run/last.ckpt").read_bytes()[:1000])
    with pytest.raises(InputError, match=r"half\.ckpt' cannot be read as a checkpoint"):
        read_classifier(tmp_path / "half.ckpt")
