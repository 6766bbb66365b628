"""Folders as the tools export them, in COCO's format: each is found by itself, with its images."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detector.data.splits import DataOptions, find_format, load_split, load_splits, read_splits, read_unsplit
from detector.errors import InputError

# The layouts: where the JSON of each split lies, the images of each split, and what names begin with in the JSON.
# COCO's as cocodataset.org publishes it; the others as those tools are known to export it, not from real exports.
SPLIT = {
    "coco": ("annotations/instances_{}2017.json", "{}2017", ""),
    "cvat, subsets": ("annotations/instances_{}.json", "images/{}", ""),
    "cvat, subsets in capitals": ("annotations/instances_{}.json", "images/{}", ""),
    "roboflow": ("{}/_annotations.coco.json", "{}", ""),
    "a folder each": ("{}/labels.json", "{}/images", "images/"),
    "beside each other": ("{}.json", "pictures", ""),
}
WORDS = {"roboflow": ("train", "valid"), "cvat, subsets in capitals": ("Train", "Validation")}
WHOLE = {
    "cvat": ("annotations/instances_default.json", "images/default", ""),
    "cvat, older": ("annotations/instances_default.json", "images", ""),
    "label studio": ("result.json", "images", "images/"),
    "fiftyone": ("labels.json", "data", ""),
    "roboflow, not split": ("train/_annotations.coco.json", "train", ""),
    "beside its images": ("annotations.json", ".", ""),
}


def lay_out(source: Path, root: Path, file: str, images: str, prefix: str) -> None:
    content = json.loads((source / "annotations/train.json").read_text())
    for entry in content["images"]:
        path = root / images / entry["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "images" / entry["file_name"], path)
        entry["file_name"] = prefix + entry["file_name"]
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(content))


@pytest.mark.parametrize("layout", SPLIT)
def test_exports_with_a_split(layout: str, tiny_coco: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, words = tmp_path / "export", WORDS.get(layout, ("train", "val"))
    for word in words:
        lay_out(tiny_coco, root, *(part.format(word) for part in SPLIT[layout]))
    caplog.set_level(logging.INFO)
    options = DataOptions(root=str(root))
    assert find_format(options) == "coco"
    splits = load_splits(options)
    assert "COCO: 4 train, 4 val images, 3 classes" in caplog.text
    for index, word in zip(splits.values(), words, strict=True):
        file, images, _ = (part.format(word) for part in SPLIT[layout])
        assert index.annotation_file == root / file
        assert f"{root}: the images of {file} are in " in caplog.text
        assert index.path(0).resolve() == (root / images / "a.png").resolve()
        assert all(index.path(i).is_file() for i in range(4))


@pytest.mark.parametrize("layout", WHOLE)
def test_exports_without_a_split(layout: str, tiny_coco: Path, tmp_path: Path) -> None:
    root = tmp_path / "export"
    lay_out(tiny_coco, root, *WHOLE[layout])
    whole = read_unsplit(DataOptions(root=str(root)))
    assert whole is not None
    assert whole.annotation_file == root / WHOLE[layout][0]
    assert all(whole.path(i).is_file() for i in range(4))
    splits = read_splits(DataOptions(root=str(root), val_share=0.5))
    assert sum(map(len, splits.values())) == 4


def test_an_evaluation_finds_the_split_of_the_training(tiny_coco: Path, tmp_path: Path) -> None:
    """It asks for one split alone; of a folder with one file both draw from that."""
    root = tmp_path / "export"
    lay_out(tiny_coco, root, *WHOLE["roboflow, not split"])
    options = DataOptions(root=str(root), val_share=0.5)
    assert load_splits(options, ("val",))["val"].image_ids == load_splits(options)["val"].image_ids


def test_images_of_a_test_split_are_found_too(tiny_coco: Path, tmp_path: Path) -> None:
    root = tmp_path / "export"
    for word in ("train", "valid", "test"):
        lay_out(tiny_coco, root, *(part.format(word) for part in SPLIT["roboflow"]))
    options = DataOptions.parse({"root": str(root), "val": {"annotations": "test/_annotations.coco.json"}})
    splits = load_splits(options)
    assert splits["train"].annotation_file == root / "train/_annotations.coco.json"
    assert splits["val"].path(0) == root / "test/a.png"


def test_the_folder_of_images_that_was_asked_for_is_not_replaced(tiny_coco: Path) -> None:
    (tiny_coco / "elsewhere").mkdir()
    options = DataOptions.parse(
        {"root": str(tiny_coco), "train": {"annotations": "annotations/train.json", "images": "elsewhere"}}
    )
    with pytest.raises(InputError, match=r"elsewhere/a\.png: no such file"):
        load_splits(options)


def test_a_folder_with_some_of_the_images_is_not_replaced_by_one_with_all(tiny_coco: Path) -> None:
    """A missing image is said, not taken from a copy that somebody keeps."""
    shutil.copytree(tiny_coco / "images", tiny_coco / "backup")
    (tiny_coco / "images/a.png").unlink()
    with pytest.raises(InputError, match=r"images/a\.png: no such file"):
        load_splits(DataOptions(root=str(tiny_coco)))


def test_two_files_that_may_be_the_split_are_not_guessed_between(tiny_coco: Path) -> None:
    for name in ("2014", "2017"):
        shutil.copy(tiny_coco / "annotations/train.json", tiny_coco / f"annotations/instances_train{name}.json")
    (tiny_coco / "annotations/train.json").unlink()
    options = DataOptions(root=str(tiny_coco), missing="Give data.train.annotations=FILE.")
    with pytest.raises(InputError, match=r"No .*annotations/train\.json here .* Give data\.train\.annotations=FILE\."):
        load_splits(options)


@pytest.mark.parametrize("file", ["annotations/train.json", "train/_annotations.coco.json"])
def test_one_split_of_a_folder_without_is_the_one_that_is_drawn(tmp_path: Path, file: str) -> None:
    """An int8 export asks for the training split alone, and must not see what it is judged on."""
    rng = np.random.default_rng(0)
    images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(20)]
    folder = tmp_path / ("images" if file.startswith("annotations") else "train")
    folder.mkdir()
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(folder / f"{i}.png")
    box = {"category_id": 1, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
    boxes = [box | {"id": i + 1, "image_id": i} for i in range(20)]
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]})
    )
    options = DataOptions(root=str(tmp_path))
    both = load_splits(options)
    assert 0 < len(both["val"]) < len(both["train"]) < 20
    for name, index in both.items():
        assert load_split(options, name).image_ids == index.image_ids


def test_a_yaml_file_of_something_else_makes_no_yolo(tiny_coco: Path, tmp_path: Path) -> None:
    for word in ("train", "val"):
        lay_out(tiny_coco, tmp_path / "export", *(part.format(word) for part in SPLIT["coco"]))
    (tmp_path / "export/dvc.yaml").write_text("stages: {}\n")
    assert find_format(DataOptions(root=str(tmp_path / "export"))) == "coco"
