"""Pascal VOC's layout against torchvision's reader, the same data as COCO JSON, and values by hand."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import VOCDetection

from detector.data.index import AnnotationIndex
from detector.data.splits import DataOptions, load_split, load_splits, read_splits, read_unsplit
from detector.errors import InputError

OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>"
    "<ymax>{}</ymax></bndbox></object>"
)


def xml(name: str, *objects: tuple, size: str = "<size><width>40</width><height>30</height></size>") -> str:
    return (
        f"<annotation>\n<filename>{name}</filename>{size}\n"
        + "\n".join(OBJECT.format(*o) for o in objects)
        + "</annotation>"
    )


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """a to train, b and c to validate; the lists leave d out, which alone has a zebra."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for name, objects in (
        ("a", [("dog", 0, 1, 1, 40, 30), ("cat", 1, "10.5", "3", "20.25", "8")]),
        ("b", []),
        ("c", [("dog", 0, 5, 6, 7, 8)]),
        ("d", [("zebra", 0, 5, 6, 7, 8)]),
    ):
        Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        (tmp_path / "Annotations" / f"{name}.xml").write_text(xml(f"{name}.jpg", *objects))
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("b\nc\n")
    return tmp_path


def read(root: Path, split: str = "train") -> AnnotationIndex:
    return load_split(DataOptions(root=str(root)), split)


def test_by_hand(devkit: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        splits = load_splits(DataOptions(root=str(devkit)))
    assert "VOC: 1 train, 2 val images, 3 classes" in caplog.messages
    train, val = splits["train"], splits["val"]
    assert train.class_names == val.class_names == ("cat", "dog", "zebra")
    # The first pixel is 1: the whole image is 1, 1, 40, 30.
    assert train.xywh.tolist() == [[0, 0, 40, 30], [9.5, 2, 10.75, 6]]
    assert train.sizes.tolist() == [[30, 40]]
    assert train.difficult.tolist() == [False, True]
    assert (val.image_ids, val.file_names, val.offsets.tolist()) == (["b", "c"], ["b.jpg", "c.jpg"], [0, 0, 1])


def test_difficult_objects_are_ignored_in_training_alone(devkit: Path) -> None:
    assert read(devkit).objects(0)[2].tolist() == [False, True]
    trained = load_split(DataOptions(root=str(devkit), difficult="trained"), "train")
    assert trained.objects(0)[2].tolist() == [False, False]
    (devkit / "ImageSets/Main/val.txt").write_text("a\n")
    val = read(devkit, "val")
    assert val.crowd.tolist() == [False, False]  # an ordinary object for COCO's metrics
    assert val.difficult.tolist() == [False, True]  # and none for VOC's


def test_a_flat_folder_and_other_lists(devkit: Path) -> None:
    by_list = DataOptions.parse({"root": str(devkit), "val": {"annotations": "ImageSets/Main/train.txt"}})
    assert load_split(by_list, "val").image_ids == ["a"]
    flat = devkit / "flat"
    for split, names in (("train", "a"), ("valid", "bc")):
        (flat / split).mkdir(parents=True)
        for name in names:
            shutil.copy(devkit / "JPEGImages" / f"{name}.jpg", flat / split)
            shutil.copy(devkit / "Annotations" / f"{name}.xml", flat / split)
    splits = load_splits(DataOptions(root=str(flat)))
    assert [index.image_ids for index in splits.values()] == [["a"], ["b", "c"]]
    assert splits["val"].class_names == ("cat", "dog")
    np.testing.assert_array_equal(splits["train"].xywh, read(devkit).xywh)


def test_the_classes_are_those_of_the_detector_or_of_a_list(devkit: Path) -> None:
    known = ("zebra", "dog", "cat", "cow")
    assert load_split(DataOptions(root=str(devkit)), "val", known).class_names == known
    with pytest.raises(InputError, match="declares 3 classes"):
        load_split(DataOptions(root=str(devkit)), "val", ("cat", "dog"))
    (devkit / "classes.txt").write_text("dog\nzebra\ncat\n")
    assert read(devkit).class_names == ("dog", "zebra", "cat")


BOMB = '<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotation><filename>&b;</filename></annotation>'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (xml("a.jpg", ("cat", 0, 1, 1, 4, 4), ("dog", 0, 1, "x", 4, 4)), ["a.xml:4, object 2: ymin 'x'", "a number"]),
        (xml("a.jpg", ("", 0, 1, 1, 4, 4)), ["a.xml:3, object 1", "name where a text"]),
        (xml("a.jpg", ("dog", 0, 1, 1, 4, "nan")), ["a.xml:3, object 1", "4 finite numbers"]),
        (xml("a.jpg", ("dog", "maybe", 1, 1, 4, 4)), ["a.xml:3, object 1", "'maybe'", "0 or 1"]),
        (xml("a.jpg", ("dog", 0, 1, 1, 4, 4)).replace("<xmax>4</xmax>", ""), ["a.xml:3, object 1", "xmax ''"]),
        (xml("a.jpg", size="<size><width>-3</width><height>5</height></size>"), ["image id 'a'", "-3"]),
        ("<annotation><object>", ["Annotations/a.xml", "no element found"]),
        ("", ["Annotations/a.xml", "no element found"]),
        (BOMB, ["Annotations/a.xml", "DOCTYPE"]),
        ("<html></html>", ["Annotations/a.xml", "<html>, expected <annotation>"]),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', ["Annotations/a.xml", "klingon"]),
        (b'<?xml version="1.0"?><annotation>\xff</annotation>', ["Annotations/a.xml", "invalid token"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_file_and_line(devkit: Path, content: str | bytes, words: list[str]) -> None:
    path = devkit / "Annotations/a.xml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        read(devkit)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert sum(fault.count for fault in read_splits(DataOptions(root=str(devkit)), ("val",))["val"].faults) == 0


def test_other_encodings_and_odd_files(devkit: Path) -> None:
    path = devkit / "Annotations/a.xml"
    content = xml("other.jpg", ("Bär", 0, 1, 1, 4, 4), size="<size><width>0</width><height>0</height></size>")
    part = "<part><name>head</name><bndbox><xmin>9</xmin></bndbox></part></object>"
    content = content.replace("</object>", part)
    for encoding in ("utf-8", "utf-16", "iso-8859-1", "windows-1252"):
        path.write_bytes(f'<?xml version="1.0" encoding="{encoding}"?>{content}'.encode(encoding))
        index = read(devkit)
        assert [index.class_names[label] for label in index.labels] == ["Bär"]
        assert index.xywh.tolist() == [[0, 0, 4, 4]]
        assert index.file_names == ["a.jpg"]  # the file beside counts, not a name that was true once
        assert index.sizes.tolist() == [[0, 0]]  # 0: the tool did not know


def test_files_that_are_not_there(devkit: Path) -> None:
    (devkit / "ImageSets/Main/train.txt").write_text("a\n\nnowhere\n")
    with pytest.raises(InputError, match=re.escape("ImageSets/Main/train.txt:3: no file Annotations/nowhere.xml")):
        read(devkit)
    (devkit / "JPEGImages/c.jpg").unlink()
    with pytest.raises(InputError, match=r"image id 'c': .*c.jpg: no such file"):
        read(devkit, "val")
    empty = devkit / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="no XML file here"):
        load_split(DataOptions(root=str(empty), format="voc"), "val")


def test_the_same_as_coco_json(shared: Path) -> None:
    root = {"root": str(shared / "data/voc07-384")}
    if not Path(root["root"]).is_dir():
        pytest.skip("needs voc07-384")
    mine = read_splits(DataOptions.parse(root), ("val",))["val"]
    theirs = DataOptions.parse(root | {"format": "coco", "val": {"images": "JPEGImages"}})
    other = read_splits(theirs, ("val",))["val"]
    other = other.select([other.file_names.index(name) for name in mine.file_names])
    assert len(mine) == 2508
    assert mine.class_names == other.class_names
    for name in ("sizes", "labels", "difficult", "crowd", "offsets"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(other, name), name)
    np.testing.assert_allclose(mine.corners, other.corners, atol=0.0501)  # the XML has one decimal


def test_the_same_as_torchvision(shared: Path, tmp_path: Path) -> None:
    root = shared / "data/voc07-384"
    if not root.is_dir():
        pytest.skip("needs voc07-384")
    (tmp_path / "VOCdevkit").mkdir()
    (tmp_path / "VOCdevkit/VOC2007").symlink_to(root)
    theirs = VOCDetection(str(tmp_path), year="2007", image_set="val")
    mine = read_splits(DataOptions(root=str(root)), ("val",))["val"]
    assert len(theirs) == len(mine)
    for i in range(0, len(mine), 100):
        image, target = theirs[i]
        objects = target["annotation"]["object"]
        rows = slice(*mine.offsets[i : i + 2])
        assert mine.file_names[i] == target["annotation"]["filename"]
        assert mine.sizes[i].tolist() == [image.height, image.width]
        assert [mine.class_names[label] for label in mine.labels[rows]] == [o["name"] for o in objects]
        assert mine.difficult[rows].tolist() == [o["difficult"] == "1" for o in objects]
        ends = [[float(o["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax")] for o in objects]
        np.testing.assert_allclose(mine.corners[rows] + (1, 1, 0, 0), ends)


def test_suffixes_in_capitals(devkit: Path) -> None:
    (devkit / "Annotations/a.xml").rename(devkit / "Annotations/a.XML")
    assert len(read(devkit).labels) == 2
    for path in (devkit / "ImageSets/Main").iterdir():
        path.unlink()
    whole = read_unsplit(DataOptions(root=str(devkit)))
    assert whole is not None
    assert sorted(whole.image_ids) == ["a", "b", "c", "d"]


def test_a_list_of_training_images_alone_is_split(devkit: Path) -> None:
    """What it leaves out is kept for a test: nothing of that is trained on."""
    (devkit / "ImageSets/Main/val.txt").rename(devkit / "ImageSets/Main/test.txt")
    (devkit / "ImageSets/Main/train.txt").write_text("a\nd\n")
    whole = read_unsplit(DataOptions(root=str(devkit)))
    assert whole is not None
    assert whole.image_ids == ["a", "d"]
    given = DataOptions.parse({"root": str(devkit), "val": {"annotations": "ImageSets/Main/test.txt"}})
    assert {name: index.image_ids for name, index in load_splits(given).items()} == {
        "train": ["a", "d"],
        "val": ["b", "c"],
    }


def test_one_folder_of_training_images(devkit: Path) -> None:
    flat = devkit / "flat"
    (flat / "train").mkdir(parents=True)
    for name in "acd":
        shutil.copy(devkit / "JPEGImages" / f"{name}.jpg", flat / "train")
        shutil.copy(devkit / "Annotations" / f"{name}.xml", flat / "train")
    whole = read_unsplit(DataOptions(root=str(flat)))
    assert whole is not None
    assert whole.image_ids == ["a", "c", "d"]


@pytest.mark.parametrize("given", ["train", "val"])
def test_a_list_for_one_split_leaves_the_others_to_the_other(devkit: Path, given: str) -> None:
    """Not drawn from all: what is scored would have been trained on."""
    for path in (devkit / "ImageSets/Main").iterdir():
        path.unlink()
    (devkit / "mine.txt").write_text("d\na\n")
    options = DataOptions.parse({"root": str(devkit), given: {"annotations": "mine.txt"}})
    splits = load_splits(options)
    other = {"train": "val", "val": "train"}[given]
    assert splits[given].image_ids == ["d", "a"]
    assert sorted(splits[other].image_ids) == ["b", "c"]
    for name in ("train", "val"):
        assert load_splits(options, (name,))[name].image_ids == splits[name].image_ids


def test_a_folder_without_a_split_that_cannot_be_read_is_named(devkit: Path) -> None:
    for path in (*(devkit / "ImageSets/Main").iterdir(), *(devkit / "Annotations").glob("[bcd].xml")):
        path.unlink()
    (devkit / "Annotations/a.xml").write_text("<annotation>")
    with pytest.raises(InputError, match=r"Annotations/a\.xml: not an annotation in XML"):
        load_splits(DataOptions(root=str(devkit)))


@pytest.mark.parametrize("listed", ["zebra dog cat", ""])
def test_ids_do_not_follow_the_order_of_a_detector(devkit: Path, listed: str) -> None:
    """Detections are written with them, and of two detectors they are compared."""
    if listed:
        (devkit / "classes.txt").write_text("\n".join(listed.split()))
    ids = []
    for names in (None, ("cat", "dog", "zebra"), ("zebra", "cat", "dog")):
        index = load_split(DataOptions(root=str(devkit)), "val", class_names=names)
        assert names is None or index.class_names == names
        assert [index.class_names[label] for label in index.objects(1)[1]] == ["dog"]
        ids.append(dict(zip(index.class_names, index.category_ids, strict=True)))
    assert ids[0] == ids[1] == ids[2]


@pytest.mark.parametrize("turn", [1, -1])
def test_of_two_files_the_one_that_is_named_is_the_image(
    devkit: Path, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    """A mask, or a preview, of the same name; in whichever order the folder gives them."""
    Image.new("RGB", (40, 30)).save(devkit / "JPEGImages/a.png")
    for name in ("b.gif", "b.png"):  # neither is named
        Image.new("RGB", (40, 30)).save(devkit / "JPEGImages" / name)
    (devkit / "JPEGImages/b.jpg").unlink()
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path))[::turn])
    assert read(devkit).file_names == ["a.jpg"]
    assert read(devkit, "val").file_names == ["b.gif", "c.jpg"]


def test_a_folder_for_one_split(tmp_path: Path) -> None:
    """Images and XML files side by side, in a folder each, of which one has no usual name."""
    for folder, names in (("train", "ab"), ("test", "c")):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.new("RGB", (40, 30)).save(tmp_path / folder / f"{name}.jpg")
            (tmp_path / folder / f"{name}.xml").write_text(xml(f"{name}.jpg", ("dog", 0, 5, 6, 7, 8)))
    splits = load_splits(DataOptions.parse({"root": str(tmp_path), "val": {"annotations": "test"}}))
    assert {name: index.file_names for name, index in splits.items()} == {"train": ["a.jpg", "b.jpg"], "val": ["c.jpg"]}
    np.testing.assert_allclose(splits["val"].objects(0)[0], [[4, 5, 7, 8]])
