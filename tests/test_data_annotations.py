"""What is read against the JSON read naively, and a message for every way an annotation file can be wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detector.data.annotations import load_annotations, read_annotations
from detector.data.index import AnnotationIndex
from detector.errors import InputError

pytestmark = pytest.mark.filterwarnings("error")

Change = Callable[[dict[str, Any]], Any]


def load(root: Path, change: Change | None = None, **options: Any) -> AnnotationIndex:
    """Load the tiny data set after `change` has edited its JSON."""
    path = root / "annotations" / "train.json"
    content = json.loads(path.read_text())
    if change is not None:
        change(content)
        path.write_text(json.dumps(content))
    return load_annotations(path, root / "images", **options)


def drop(section: str, position: int, key: str) -> Change:
    return lambda content: content[section][position].pop(key)


def put(section: str, position: int, key: str, value: Any) -> Change:
    return lambda content: content[section][position].update({key: value})


def test_index_by_hand(tiny_coco: Path) -> None:
    index = load(tiny_coco)
    assert len(index) == 4
    assert index.image_ids == [10, 7, 42, 99]
    assert index.class_names == ("car", "cat", "kite")
    assert index.category_ids == (3, 17, 90)
    assert index.sizes.tolist() == [[48, 64], [60, 40], [50, 50], [40, 80]]
    assert index.offsets.tolist() == [0, 2, 4, 4, 5]
    assert index.areas.tolist() == [100, 60, 600, 36, 300]
    boxes, labels, crowd = index.objects(0)
    assert boxes.tolist() == [[4, 6, 24, 16], [30.5, 20.25, 40.5, 32.25]]
    assert labels.tolist() == [0, 1]
    assert crowd.tolist() == [False, False]
    assert index.objects(1)[2].tolist() == [True, False]
    assert [part.shape for part in index.objects(2)] == [(0, 4), (0,), (0,)]
    assert index.counts == {"images": 4, "boxes": 5, "crowds": 1, "empty": 1, "clipped": 0, "degenerate": 0}
    assert [str(part.dtype) for part in (index.boxes, index.labels, index.crowd)] == ["float32", "int64", "bool"]


def test_real_coco_against_the_json(shared: Path) -> None:
    root = shared / "data" / "coco-permissive-320"
    path = root / "annotations" / "instances_val_permissive.json"
    index = load_annotations(path, root / "images")
    content = json.loads(path.read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert len(index.class_names) == 80
    assert index.category_ids == tuple(sorted(names))
    for i, image in enumerate(content["images"]):
        theirs = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes, labels, crowd = index.objects(i)
        assert [index.class_names[label] for label in labels] == [names[a["category_id"]] for a in theirs]
        assert crowd.tolist() == [bool(a["iscrowd"]) for a in theirs]
        xywh = np.array([a["bbox"] for a in theirs]).reshape(-1, 4)
        np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], xywh[:, 2:], atol=0.02)
        np.testing.assert_allclose(boxes[:, :2], xywh[:, :2], atol=0.02)
    assert index.counts["crowds"] == sum(a["iscrowd"] for a in content["annotations"]) > 0
    assert index.read(0).shape == (*index.sizes[0], 3)


def test_without_a_declared_size_nothing_is_clipped(tiny_coco: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        del content["images"][0]["width"]
        content["annotations"][1]["bbox"] = [-5, 0, 500, 10]

    index = load(tiny_coco, change)
    assert index.sizes[0].tolist() == [0, 0]
    assert index.objects(0)[0][0].tolist() == [-5, 0, 495, 10]
    assert index.counts["clipped"] == 0
    assert index.read(0).shape == (48, 64, 3)


def test_areas_that_are_none_are_said(tiny_coco: Path) -> None:
    """Boxes of 600, 200, 1200, 120 and 72 square pixels; COCO's own code leaves -1 out of AP without a word."""
    found: dict[str, Any] = {}
    for area in (None, 100, -1, 0, 5000):

        def change(content: dict[str, Any], area: float | None = area) -> None:
            content["annotations"][0]["area"] = area

        found[str(area)] = [one for one in load(tiny_coco, change).faults if one.check == "areas"]
    assert not found["None"]
    assert not found["100"]
    for area in ("-1", "0", "5000"):
        (fault,) = found[area]
        assert (fault.severity, fault.examples) == ("warning", (f"annotation id 1: {area} in a box of 600",))


def test_missing_iscrowd_is_no_crowd_and_segmentation_is_ignored(tiny_coco: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            del annotation["iscrowd"], annotation["area"]
            annotation["segmentation"] = {"counts": "abc", "size": [1, 1]}

    index = load(tiny_coco, change)
    assert not index.crowd.any()
    assert index.areas.tolist() == [200, 120, 1200, 72, 600]


def test_empty_images_are_kept_unless_told_otherwise(tiny_coco: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        kept = load(tiny_coco)
        left_out = load(tiny_coco, keep_empty=False)
    assert kept.image_ids == [10, 7, 42, 99]
    assert left_out.image_ids == [10, 7, 99]
    assert left_out.counts["empty"] == 0
    assert left_out.other_ids == {42}
    np.testing.assert_array_equal(left_out.objects(2)[0], kept.objects(3)[0])
    assert "4 images, 1 without a box" in caplog.messages[0]
    assert "3 of 4 images are used" in caplog.messages[-1]
    assert "1 crowd" in kept.summary()


def test_limit_takes_the_first(tiny_coco: Path) -> None:
    index = load(tiny_coco, limit=2)
    assert index.image_ids == [10, 7]
    assert index.offsets.tolist() == [0, 2, 4]
    assert index.labels.tolist() == [0, 1, 2, 0]
    assert load(tiny_coco, limit=100).counts == load(tiny_coco).counts


def test_text_ids_and_no_annotations(tiny_coco: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image["id"] = f"image-{image['id']}"
        content["annotations"] = []

    index = load(tiny_coco, change)
    assert index.image_ids[0] == "image-10"
    assert index.boxes.shape == (0, 4)
    assert index.counts["empty"] == 4


@pytest.mark.parametrize(
    ("change", "repaired"),
    [
        (put("annotations", 2, "area", None), 1),
        (put("annotations", 2, "iscrowd", "1"), 1),
        (put("annotations", 1, "iscrowd", None), 1),
        (put("annotations", 1, "iscrowd", "0"), 1),
        (put("annotations", 1, "iscrowd", "false"), 1),
        (put("annotations", 1, "difficult", None), 1),
        (put("annotations", 1, "ignore", "0"), 1),
        (put("annotations", 1, "bbox", ["4", "6", "20", "10"]), 1),
        (put("annotations", 1, "image_id", 10.0), 1),
        (put("annotations", 1, "image_id", "10"), 1),
        (put("annotations", 1, "category_id", "3"), 1),
        (put("images", 0, "id", 10.0), 1),
        (put("images", 0, "width", "64"), 1),
        (put("images", 0, "height", 48.0), 1),
        (put("images", 2, "width", None), 1),
        (put("categories", 1, "id", "3"), 1),
        (lambda c: [a.update(iscrowd=str(a["iscrowd"])) for a in c["annotations"]], 5),
    ],
)
def test_what_is_plain_is_repaired_and_counted(
    tiny_coco: Path, change: Change, repaired: int, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load(tiny_coco)
    index = load(tiny_coco, change)
    for name in ("offsets", "boxes", "xywh", "labels", "crowd", "difficult"):
        np.testing.assert_array_equal(getattr(index, name), getattr(expected, name))
    assert (index.image_ids, index.category_ids) == (expected.image_ids, expected.category_ids)
    assert all(type(number) is int for number in (*index.image_ids, *index.category_ids))
    assert [(fault.check, fault.count) for fault in index.faults] == [("repaired_values", repaired)]
    assert f"train.json: {repaired} values" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le"])
def test_every_encoding_of_json(tiny_coco: Path, encoding: str) -> None:
    path = tiny_coco / "annotations" / "train.json"
    expected = load(tiny_coco)
    path.write_bytes(path.read_text().encode(encoding))
    np.testing.assert_array_equal(load_annotations(path, tiny_coco / "images").boxes, expected.boxes)


def test_difficult_and_ignored_objects(tiny_coco: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][1]["difficult"] = 1
        content["annotations"][3]["ignore"] = True

    assert load(tiny_coco, change).difficult.tolist() == [True, True, True, False, False]


def test_all_faults_are_collected_and_the_first_is_refused(tiny_coco: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0]["bbox"] = [1, 2, 3]
        content["annotations"][1]["image_id"] = 5
        content["annotations"][2]["category_id"] = 6
        content["images"][0]["width"] = -3

    with pytest.raises(InputError, match=r"`width` of image id 10 is -3.*3 more of its entries.*tools/doctor\.py"):
        load(tiny_coco, change)
    index = read_annotations(tiny_coco / "annotations" / "train.json", tiny_coco / "images")
    assert [(fault.check, fault.count) for fault in index.faults] == [
        ("entries", 1), ("entries", 1), ("unknown_images", 1), ("unknown_categories", 1),
    ]  # fmt: skip
    assert index.annotation_ids.tolist() == [4, 5]
    assert index.describe(0) == "annotation 4 of image 10"


def test_declared_classes_count_even_when_unused(tiny_coco: Path) -> None:
    index = load(tiny_coco, lambda c: c["categories"].append({"id": -4, "name": "unused"}))
    assert index.class_names == ("unused", "car", "cat", "kite")
    assert index.objects(0)[1].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda c: c.pop("images"), ["`images`", "COCO"]),
        (lambda c: c.pop("annotations"), ["`annotations`", "add an empty"]),
        (lambda c: c.pop("categories"), ["`categories`"]),
        (lambda c: c.update(images={}), ["`images`", "no list"]),
        (lambda c: c["annotations"].append(3), ["entry 5 of `annotations`", "correct"]),
        (lambda c: c.update(images=[], annotations=[]), ["`images` is empty", "at least one"]),
        (lambda c: c.update(categories=[]), ["`categories` is empty", "declare"]),
        (drop("images", 1, "id"), ["image number 1", "`id`", "add or correct it"]),
        (drop("images", 1, "file_name"), ["image id 7", "`file_name`", "add or correct it"]),
        (put("images", 1, "id", [1]), ["`id` of image id [1]", "an integer or a text"]),
        (put("images", 1, "file_name", ""), ["`file_name` of image id 7", "expected a file name"]),
        (put("images", 1, "width", 0), ["`width` of image id 7", "positive integer", "correct"]),
        (put("images", 1, "height", "tall"), ["`height` of image id 7", "'tall'", "positive integer"]),
        (put("images", 1, "height", float("inf")), ["`height` of image id 7", "positive integer"]),
        (put("images", 1, "id", 10), ["image id 10", "more than once", "renumber"]),
        (drop("annotations", 2, "bbox"), ["annotation id 3", "`bbox`", "add or correct it"]),
        (drop("annotations", 2, "image_id"), ["annotation id 3", "`image_id`"]),
        (drop("annotations", 2, "category_id"), ["annotation id 3", "`category_id`"]),
        (put("annotations", 2, "image_id", 1234), ["image_id 1234 of annotation id 3", "`images`", "remove these"]),
        (put("annotations", 2, "image_id", [7]), ["`image_id` of annotation id 3", "expected an id"]),
        (
            put("annotations", 2, "category_id", 4),
            ["category_id 4 of annotation id 3", "add the entry"],
        ),
        (put("annotations", 2, "bbox", [1, 2, 3]), ["`bbox` of annotation id 3", "[1, 2, 3]", "4 finite numbers"]),
        (put("annotations", 2, "bbox", [1, 2, float("nan"), 4]), ["`bbox` of annotation id 3", "finite", "remove"]),
        (put("annotations", 2, "bbox", [1, 2, float("inf"), 4]), ["`bbox` of annotation id 3", "finite"]),
        (put("annotations", 2, "bbox", None), ["`bbox` of annotation id 3", "None"]),
        (put("annotations", 2, "bbox", [1, 2, "x", 4]), ["`bbox` of annotation id 3", "'x'"]),
        (put("annotations", 2, "area", float("nan")), ["`area` of annotation id 3", "a finite number", "correct"]),
        (drop("categories", 1, "id"), ["category number 1", "`id`", "add or correct it"]),
        (drop("categories", 1, "name"), ["category id 3", "`name`", "add or correct it"]),
        (put("categories", 1, "id", None), ["`id` of category id None", "an integer"]),
        (put("categories", 1, "name", None), ["`name` of category id 3", "a text"]),
        (put("images", 1, "file_name", "data:image/png;base64,AAAA"), ["`file_name` of image id 7", "data:image"]),
        (put("images", 1, "file_name", "A" * 5000), ["`file_name` of image id 7", "AAA", "expected a file name"]),
        (put("annotations", 2, "iscrowd", "maybe"), ["`iscrowd` of annotation id 3", "'maybe'", "0 or 1"]),
        (put("categories", 1, "id", 17), ["category id 17", "more than once", "renumber"]),
        (put("categories", 1, "name", "cat"), ["category name 'cat'", "more than once"]),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tiny_coco: Path, change: Change, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load(tiny_coco, change)
    for part in ["train.json", *parts]:
        assert part in str(caught.value)


def test_wrong_files_and_folders(tiny_coco: Path) -> None:
    path, images = tiny_coco / "annotations" / "train.json", tiny_coco / "images"
    cases: list[tuple[Path, Path, str]] = [
        (tiny_coco / "none.json", images, "none.json: no such annotation file; check the path"),
        (tiny_coco, images, "no such annotation file"),
        (path, tiny_coco / "pictures", "pictures: no such folder; give the folder"),
    ]
    for text, message in (
        ("[]", "holds a JSON list"),
        ('{"images": [', "not valid JSON"),
        ("\xff", "byte 0 of this annotation file is no UTF-8"),
    ):
        broken = tiny_coco / f"broken{len(cases)}.json"
        broken.write_text(text, encoding="latin-1")
        cases.append((broken, images, f"{broken}: {message}"))
    for annotation_file, image_dir, message in cases:
        with pytest.raises(InputError) as caught:
            load_annotations(annotation_file, image_dir)
        assert message in str(caught.value)


def test_nothing_left(tiny_coco: Path) -> None:
    with pytest.raises(InputError, match=r"train\.json: no image has a box.*keep_empty"):
        load(tiny_coco, lambda c: c.update(annotations=[]), keep_empty=False)
    with pytest.raises(InputError, match=r"limit=0.*leave it out"):
        load(tiny_coco, limit=0)


def test_class_names_of_a_checkpoint(tiny_coco: Path) -> None:
    assert load(tiny_coco, class_names=["car", "cat", "kite"]).class_names == ("car", "cat", "kite")
    data, detector = "only the data set has", "only the detector has"
    for other, more in (
        (["car", "dog", "kite"], f"; {data} 'cat' and {detector} 'dog'."),
        (["car", "cat"], f"; {data} 'kite'."),
        (["Car", "kite", "cat", "dog"], f"; {data} 'car' and {detector} 'Car', 'dog'."),
    ):
        with pytest.raises(InputError) as caught:
            load(tiny_coco, class_names=other)
        for part in ("3 classes ('car', 'cat', 'kite')", repr(other)[1:-1], more, "or train a detector"):
            assert part in str(caught.value)


def test_classes_in_the_order_of_a_detector(tiny_coco: Path) -> None:
    """Every box keeps the name that the file gives it, and its class the id there."""
    index = load(tiny_coco, class_names=["kite", "car", "cat"])
    assert (index.class_names, index.category_ids) == (("kite", "car", "cat"), (90, 3, 17))
    content = json.loads((tiny_coco / "annotations" / "train.json").read_text())
    names = {one["id"]: one["name"] for one in content["categories"]}
    written = {one["id"]: names[one["category_id"]] for one in content["annotations"]}
    labels = zip(index.annotation_ids.tolist(), index.labels.tolist(), strict=True)
    assert {number: index.class_names[label] for number, label in labels} == written
