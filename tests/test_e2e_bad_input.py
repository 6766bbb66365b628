"""What a user gets wrong, through the real tools: exit code 2, no traceback, a message with the thing and a remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tool_runner import Outcome, run_tool

from detector.data.preprocess import Preprocessing
from detector.inference.detector import Detector
from detector.models.build import NetworkOptions, build_network

# A network and a run that take a second.
SMALL = (
    "backbone=v2_0.5x", "backbone.weights=null", "input.short_side=64", "input.long_side=96", "train.batch_size=2",
    "val.batch_size=2", "schedule.epochs=1", "data.cache=false", "workers=1",
)  # fmt: skip
CLASSES = ("car", "cat", "kite")  # of tiny_coco, by id


def edit(annotations: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(annotations.read_text())
    change(content)
    annotations.write_text(json.dumps(content))


def finetune(root: Path, *overrides: str) -> Outcome:
    run_dir = f"run_dir={root.parent / 'run'}"
    return run_tool("train", "recipe=finetune", f"data.root={root}", run_dir, *SMALL, *overrides, cwd=root.parent)


def assert_says(message: str, *parts: str) -> None:
    assert [part for part in parts if part not in message] == [], message


@pytest.fixture
def checkpoint(tmp_path: Path, small_spec: dict[str, Any]) -> Path:
    """A detector of tiny_coco's classes, as `save` writes it."""
    path = tmp_path / "detector.ckpt"
    Detector(NetworkOptions.parse(small_spec), CLASSES, Preprocessing(short_side=64, long_side=96)).save(path)
    return path


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["backbone=v2_3x"], ["backbone=v2_3x does not exist", "did you mean backbone=v2_", "v2star_1x"]),
        (["recipe=finetun"], ["did you mean recipe=finetune?"]),
        (["shedule.epochs=3"], ["shedule.epochs is not a key", "did you mean schedule.epochs"]),
        (["data.generate={seed: 0, count: 9}"], ["data.generate.count is not a key"]),
        (["recipe=finetune"], ["data.root is not set", "data.root=DIR", "recipe=demo"]),
        (["recipe=paper"], ["annotations/instances_train2017.json", "looked in", "cocodataset.org", "recipe=demo"]),
        (["resume=true"], ["resume=true needs", "ckpt=RUN_DIR/last.ckpt"]),
        (["ckpt=nowhere.ckpt"], ["No checkpoint at 'nowhere.ckpt'", "best.ckpt"]),
        (["train.batch_size=abc"], ["train.batch_size=abc: expected a whole number, 1 or more"]),
        (["train.batch_size=2.5"], ["train.batch_size=2.5"]),
        (["train.batch_size=null"], ["train.batch_size=null"]),
        (["schedule.epochs=-1"], ["schedule.epochs=-1: expected a whole number, 1 or more, or null"]),
        (["schedule.epochs=null"], ["Neither schedule.epochs nor schedule.images is set"]),
        (["optimizer.lr=fast"], ["optimizer.lr=fast: expected a number above 0"]),
        (["optimizer.lr=nan"], ["optimizer.lr=NaN"]),
        (["optimizer.name=lion"], ["optimizer.name=lion: expected sgd or adamw"]),
        (["optimizer.lr_scales={hed: 2}"], ["no parameter starts with 'hed'"]),
        (["trainer.devices=0"], ["trainer.devices=0"]),
        (["trainer.devices=[0]", "trainer.accelerator=cpu"], ["trainer.devices=[0]", "a CPU has no number", "=1"]),
        (["seed=4294967296"], ["seed=4294967296: expected a whole number from 0 to"]),
        (["trainer.precision=8"], ["trainer.precision=8: expected 32-true or bf16-mixed"]),
        (["freeze.stages=7"], ["freeze.stages=7: expected 0 or 1 or 2"]),
        (["augment.scale=[1.5, 0.5]"], ["augment.scale=[1.5, 0.5]", "lowest <= highest"]),
        (["augment.flip=2"], ["augment.flip=2: expected a number from 0 to 1"]),
        (["input.short_side=0"], ["input.short_side=0"]),
        (["input.short_side=512"], ["short_side=512, long_side=256", "short_side must be at most long_side"]),
        (["rpn.channels=0"], ["rpn.channels=0: expected a whole number from 1 to 65536"]),
        (["rpn.channels=many"], ["rpn.channels=many: expected a whole number from 1 to 65536"]),
        (["light_head.sampling=best"], ["light_head.sampling=best", "ohem or random"]),
        (["neck.name=fpn"], ["neck.name=fpn: expected one of", "none", "cem"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
@pytest.mark.slow
def test_a_wrong_value(tmp_path: Path, overrides: list[str], parts: list[str]) -> None:
    few = [] if overrides[0].startswith("recipe=") else ["data.generate.train=2", "data.generate.val=1"]
    assert_says(run_tool("train", "backbone=v2_0.5x", *few, *overrides, cwd=tmp_path).error(), *parts)


def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    message = run_tool("train", "trainer.accelerator=gpu", cwd=tmp_path).error()
    assert_says(message, "trainer.accelerator=gpu", "no GPU", "cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tool", ["train", "eval", "predict"])
def test_a_place_that_cannot_be_written(tmp_path: Path, tiny_coco: Path, checkpoint: Path, tool: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    place = tmp_path / "file" / "out"
    if tool == "train":
        outcome = finetune(tiny_coco, f"run_dir={place}")
    elif tool == "eval":
        outcome = run_tool("eval", f"ckpt={checkpoint}", f"data.root={tiny_coco}", f"out={place}", cwd=tmp_path)
    else:
        source = f"source={tiny_coco / 'images/a.png'}"
        outcome = run_tool("predict", f"ckpt={checkpoint}", source, f"out={place}", cwd=tmp_path)
    assert_says(outcome.error(), str(tmp_path / "file"), f"Choose another {'run_dir' if tool == 'train' else 'out'}=.")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda c: c.pop("categories"), ["no list under the key `categories`"]),
        (lambda c: c["annotations"][1].pop("bbox"), ["annotation id 2", "`bbox`"]),
        (lambda c: c["annotations"][1].update(image_id=5), ["annotation", "image", "5"]),
        (lambda c: c["annotations"][1].update(category_id=4), ["annotation", "category", "4"]),
        (lambda c: c.update(images=[], annotations=[]), ["train.json"]),
        (lambda c: c["images"].append(c["images"][0]), ["image id 10 appears more than once"]),
        (lambda c: c["categories"][0].update(name="train"), ["train", "kite", "must declare the same"]),
    ],
    ids=["section", "key", "image", "category", "empty", "repeated", "classes"],
)
@pytest.mark.slow
def test_a_mistake_in_the_annotations(
    tiny_coco: Path, change: Callable[[dict[str, Any]], Any], parts: list[str]
) -> None:
    edit(tiny_coco / "annotations/train.json", change)
    assert_says(finetune(tiny_coco).error(), *parts)


def test_annotations_that_are_not_json(tiny_coco: Path) -> None:
    (tiny_coco / "annotations/val.json").write_text('{"images": [')
    assert_says(finetune(tiny_coco).error(), "val.json: not valid JSON", "fetch it again")


def test_a_missing_image(tiny_coco: Path) -> None:
    (tiny_coco / "images/b.jpg").unlink()
    assert_says(finetune(tiny_coco).error(), "image id 7", "images/b.jpg", "no such file")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cache", ["true", "false"])
def test_an_unreadable_image(tiny_coco: Path, workers: int, cache: str) -> None:
    """Wherever it is met: while decoding ahead, in the training process, or in a loader process."""
    picture = tiny_coco / "images/sub/c.jpg"
    picture.write_bytes(picture.read_bytes()[:300])
    message = finetune(tiny_coco, f"workers={workers}", f"data.cache={cache}").error()
    assert_says(message, "image id 99", "sub/c.jpg")
    assert "worker process" not in message
    assert len(message.splitlines()) == 1


@pytest.mark.slow
def test_boxes_without_area_or_outside_are_counted_and_training_goes_on(tiny_coco: Path) -> None:
    boxes = {0: [10, 5, -30, 20], 1: [200, 200, 9, 9], 3: [30, 20, 500, 12]}
    edit(
        tiny_coco / "annotations/train.json",
        lambda content: [content["annotations"][i].update(bbox=box) for i, box in boxes.items()],
    )
    outcome = finetune(tiny_coco).ok()
    assert "train.json: 4 images" in outcome.err
    assert "1 boxes clipped to the image, 2 without area inside it" in outcome.err
    assert "(not trained on; counted by metrics, can never be found)" in outcome.err


@pytest.mark.slow
def test_other_classes_than_the_checkpoint(tmp_path: Path, tiny_coco: Path, checkpoint: Path) -> None:
    edit(tiny_coco / "annotations/val.json", lambda content: content["categories"][1].update(name="bus"))
    message = run_tool("eval", f"ckpt={checkpoint}", f"data.root={tiny_coco}", cwd=tmp_path).error()
    assert_says(message, "'bus', 'cat', 'kite'", "'car', 'cat', 'kite'", "train a detector on this data set")


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["eval", "predict", "train"])
@pytest.mark.parametrize("kind", ["other", "truncated", "text", "weights"])
def test_a_file_that_is_no_checkpoint(tmp_path: Path, tiny_coco: Path, checkpoint: Path, tool: str, kind: str) -> None:
    path = tmp_path / "wrong.ckpt"
    if kind == "other":
        torch.save({"model": {"weight": torch.zeros(2)}, "epoch": 3}, path)
    elif kind == "truncated":
        path.write_bytes(checkpoint.read_bytes()[:5000])
    elif kind == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    rest = {
        "eval": (f"data.root={tiny_coco}",),
        "predict": (f"source={tiny_coco / 'images'}",),
        "train": ("recipe=finetune", f"data.root={tiny_coco}", f"run_dir={tmp_path / 'run'}", *SMALL),
    }[tool]
    message = run_tool(tool, f"ckpt={path}", *rest, cwd=tmp_path).error()
    assert_says(message, str(path), "not a detector checkpoint" if kind in ("other", "weights") else "truncated")


@pytest.mark.slow
def test_weights_of_another_backbone(tmp_path: Path, tiny_coco: Path, small_spec: dict[str, Any]) -> None:
    path = tmp_path / "weights.pth"
    torch.save(build_network(NetworkOptions.parse(small_spec), 3).backbone.state_dict(), path)
    message = finetune(tiny_coco, f"backbone.weights={path}").error()
    assert_says(message, str(path), "made for another architecture", "(8, 3, 3, 3), expected (24, 3, 3, 3)")


@pytest.mark.slow
def test_a_checkpoint_with_another_backbone(tiny_coco: Path, checkpoint: Path) -> None:
    message = finetune(tiny_coco, f"ckpt={checkpoint}").error()
    assert_says(message, "backbone=v2_0.5x asks for backbone.stem_channels=24", "but it is 8", "ckpt=null")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_the_images(tiny_coco: Path) -> None:
    wild = ("optimizer.lr=1e30", "optimizer.clip_norm=null", "optimizer.name=sgd", "schedule.warmup_steps=0")
    message = finetune(tiny_coco, *wild, "schedule.epochs=9").error()
    assert_says(message, "not finite", "on the images [", "optimizer.lr", "last.ckpt")
    named = json.loads(message.split("on the images ")[1].split("]")[0] + "]")
    assert set(named) <= {10, 7, 42, 99}
    assert len(named) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("nowhere.jpg", ["nowhere.jpg", "no such file"]),
        ("notes.jpg", ["notes.jpg"]),
        ("empty", ["empty"]),
    ],
)
def test_nothing_to_predict_on(tmp_path: Path, checkpoint: Path, source: str, parts: list[str]) -> None:
    (tmp_path / "notes.jpg").write_text("not a picture")
    (tmp_path / "empty").mkdir()
    assert_says(run_tool("predict", f"ckpt={checkpoint}", f"source={source}", cwd=tmp_path).error(), *parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "part"),
    [("score_threshold=1.5", "0 to 1"), ("score_threshold=abc", "0 to 1"), ("batch_size=0", "1 or more"),
     ("device=tpu9", "device 'tpu9'"), ("source=no_*.jpg", "no_*.jpg")],
)  # fmt: skip
def test_a_wrong_value_for_prediction(
    tmp_path: Path, tiny_coco: Path, checkpoint: Path, override: str, part: str
) -> None:
    source = f"source={tiny_coco / 'images'}"
    assert part in run_tool("predict", f"ckpt={checkpoint}", source, override, cwd=tmp_path).error()
