"""What makes a training pointless: each cause is said, it alone, by the function that training and the doctor call."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detector.data.annotations import read_annotations
from detector.data.index import AnnotationIndex
from detector.data.split_checks import check_splits, refuse_pointless
from detector.errors import InputError

Content = dict[str, Any]
Change = Callable[[Content], Any]


def content(split: str) -> Content:
    """20 images of 100 x 80, each with a cat and a dog."""
    images = [{"id": i, "file_name": f"{split}_{i}.png", "width": 100, "height": 80} for i in range(1, 21)]
    boxes = [
        {"id": 2 * i + k, "image_id": i, "category_id": k, "bbox": [40 * k, 10, 20, 30], "area": 600, "iscrowd": 0}
        for i in range(1, 21)
        for k in (1, 2)
    ]
    return {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}


def each(content: Content, **values: Any) -> None:
    for annotation in content["annotations"]:
        annotation.update(values)


def load(folder: Path, train: Change | None = None, val: Change | None = None) -> dict[str, AnnotationIndex]:
    splits = {}
    for split, change in (("train", train), ("val", val)):
        file = folder / f"{split}.json"
        values = content(split)
        if change:
            change(values)
        file.write_text(json.dumps(values))
        splits[split] = read_annotations(file, folder)
    return splits


def nothing(content: Content) -> None:
    pass


def swap_ids(content: Content) -> None:
    content["categories"] = [{"id": 2, "name": "cat"}, {"id": 1, "name": "dog"}]


def shift_ids(content: Content) -> None:
    content["categories"] = [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}]
    for annotation in content["annotations"]:
        annotation["category_id"] = {1: 7, 2: 9}[annotation["category_id"]]


def no_dogs(content: Content) -> None:
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 1]


# What is changed in train and in val; every finding above information, its severity, and a part of its examples.
CAUSES: dict[str, tuple[Change, Change, dict[str, str], str]] = {
    "nothing": (nothing, nothing, {}, ""),
    "crowds": (
        lambda c: [a.update(iscrowd=1) for a in c["annotations"][:-2]], nothing,
        {"mostly_ignored": "warning"}, "train: 95.0% of its boxes",
    ),
    "ignored": (nothing, lambda c: each(c, ignore=1), {"mostly_ignored": "warning"}, "val: 100.0%"),
    "nine of ten ignored": (nothing, lambda c: [a.update(ignore=1) for a in c["annotations"][:36]], {}, ""),
    "a class of val that train has not": (
        no_dogs, nothing, {"unlearnt_classes": "warning", "one_class": "warning"},
        "dog: 20 boxes in val, none in train",
    ),
    "a class of train that val has not": (nothing, no_dogs, {}, ""),
    "all of one class": (
        lambda c: each(c, category_id=1), no_dogs, {"one_class": "warning"}, "all 40 boxes are cat, 2 classes",
    ),
    "ids swapped": (nothing, swap_ids, {"categories_differ": "error"}, "'cat' is id 1 in train, 2 in val"),
    "other ids, same order": (
        nothing, shift_ids, {"category_ids_differ": "warning"}, "'dog' is id 2 in train, 9 in val",
    ),
    "a shared image": (
        nothing, lambda c: c["images"][3].update(file_name="./train_5.png"), {"shared_files": "warning"}, "train_5.png",
    ),
    "the whole image": (
        lambda c: [a.update(bbox=[0.5, 0, 99.5, 80]) for a in c["annotations"][::2]]
        + [c["annotations"].__delitem__(slice(1, None, 2))],
        lambda c: c["annotations"].__delitem__(slice(1, None, 2)),
        {"whole_image_boxes": "warning", "one_class": "warning"}, "train: 100.0%",
    ),
    "no box in train": (
        lambda c: c.update(annotations=[]), nothing,
        {"nothing_to_learn": "error", "empty_images": "warning"}, "train: 0 boxes",
    ),
    "only crowds in train": (
        lambda c: each(c, iscrowd=1), nothing,
        {"nothing_to_learn": "error", "mostly_ignored": "warning"}, "train: 40 boxes",
    ),
    "no box in val": (
        nothing, lambda c: c.update(annotations=[]),
        {"nothing_to_score": "warning", "empty_images": "warning"}, "val: 0 boxes",
    ),
    "nearly all empty": (
        lambda c: c["annotations"].__delitem__(slice(2, None)), nothing, {"empty_images": "warning"},
        "train: 95.0% of 20",
    ),
    "twice": (
        lambda c: c["annotations"].append(c["annotations"][3] | {"id": 900}), nothing,
        {"duplicate_boxes": "warning"}, "annotation 900 of image 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSES)
def test_each_cause_is_said_before_training(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, val, expected, example = CAUSES[name]
    splits = load(tmp_path, train, val)
    findings = [finding for finding in check_splits(splits) if finding.severity != "info"]
    assert {finding.check: finding.severity for finding in findings} == expected
    assert any(example in text for finding in findings for text in finding.examples) or not expected
    assert all(finding.remedy for finding in findings)
    with caplog.at_level(logging.WARNING):
        if "error" in expected.values():
            with pytest.raises(InputError) as caught:
                refuse_pointless(splits)
            assert example in str(caught.value)
        else:
            refuse_pointless(splits)
            assert len(caplog.messages) == len(expected)
            assert example in caplog.text


def test_images_of_one_name_in_two_folders_are_not_shared(tmp_path: Path) -> None:
    splits = load(tmp_path, val=lambda c: [image.update(file_name=f"train_{image['id']}.png") for image in c["images"]])
    assert {f.check for f in check_splits(splits)} == {"empty_images", "shared_files"}
    (tmp_path / "other").mkdir()
    splits["val"] = read_annotations(tmp_path / "val.json", tmp_path / "other")
    assert {f.check for f in check_splits(splits)} == {"empty_images"}


def test_copies_under_other_names_are_said_before_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    splits = load(tmp_path)
    rng = np.random.default_rng(0)
    noise = {i: rng.bytes(9000) for i in range(1, 21)}
    for i, content in noise.items():
        (tmp_path / f"train_{i}.png").write_bytes(content)
        (tmp_path / f"val_{i}.png").write_bytes(rng.bytes(9000 + i % 2))
    refuse_pointless(splits)
    assert caplog.messages == []
    (tmp_path / "val_3.png").write_bytes(noise[7])
    (tmp_path / "val_4.png").unlink()
    (tmp_path / "val_5.png").write_bytes(noise[8][:-1] + b"x")  # the same size, and the same bytes in the middle
    (tmp_path / "val_6.png").write_bytes(b"")
    (tmp_path / "train_6.png").write_bytes(b"")
    refuse_pointless(splits)
    (message,) = caplog.messages
    assert message.startswith("1 image files that are scored have a copy in the training split")
    assert f"train: {tmp_path / 'train_7.png'} and val: {tmp_path / 'val_3.png'}" in message


def test_one_split_is_looked_at_by_itself(tmp_path: Path) -> None:
    scored = load(tmp_path, val=no_dogs)["val"]
    assert {f.check for f in check_splits({"scored": scored})} == {"empty_images"}
    assert check_splits({}) == []
