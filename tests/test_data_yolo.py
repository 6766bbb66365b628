"""YOLO's layout against a naive reader, and a message for every way a line can be wrong."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from detector.data.index import AnnotationIndex
from detector.data.splits import DataOptions, find_format, load_split, load_splits, read_splits, read_unsplit
from detector.errors import InputError

YAML = "path: {}\ntrain: images/train\nval: images/val\nnames: {{0: cat, 7: dog}}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a, b (without a label file) and c (with an empty one) to train, d to validate; 40 wide, 30 high."""
    for name in ("train/a", "train/b", "train/c", "val/d"):
        for kind, suffix in (("images", ".png"), ("labels", ".txt")):
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
            if suffix == ".png":
                Image.new("RGB", (40, 30)).save(tmp_path / kind / f"{name}{suffix}")
    (tmp_path / "labels/train/a.txt").write_text("0 0.5 0.5 0.25 0.2\n\n7 0.1 0.2 0.5 0.2 0.3 0.9\n")
    (tmp_path / "labels/train/c.txt").write_text("")
    (tmp_path / "labels/val/d.txt").write_bytes(b"\xef\xbb\xbf7 0.9 0.5 0.4 1.0\r\n")
    (tmp_path / "data.yaml").write_text(YAML.format(tmp_path))
    return tmp_path


def read(root: Path, split: str = "train") -> AnnotationIndex:
    return load_split(DataOptions(root=str(root)), split)


def test_by_hand(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        splits = load_splits(DataOptions(root=str(folder)))
    assert "YOLO: 3 train, 1 val images, 2 classes" in caplog.messages
    train, val = splits["train"], splits["val"]
    assert train.class_names == ("cat", "dog")
    assert train.image_ids == ["a.png", "b.png", "c.png"]
    assert train.offsets.tolist() == [0, 2, 2, 2]
    np.testing.assert_allclose(train.xywh, [[15, 12, 10, 6], [4, 6, 16, 21]])  # the second: what holds the polygon
    np.testing.assert_allclose(val.xywh, [[28, 0, 12, 30]])  # what sticks out is cut off
    assert train.sizes.tolist() == [[30, 40]] * 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 0.5 0.5 0.2", ["4 numbers", "class x y width height"]),
        ("0 0.5 0.5 0.2 0.2 0.9", ["6 numbers", "polygon"]),
        ("0 0.5 x 0.2 0.2", ["'x' is no share"]),
        ("cat 0.5 0.5 0.2 0.2", ["'cat' is no class"]),
        ("0.5 0.5 0.5 0.2 0.2", ["'0.5' is no class"]),
        ("0 20 15 10 6", ["'20' is no share", "0 to 1"]),
        ("0 0.5 -0.2 0.2 0.2", ["'-0.2' is no share"]),
        ("0 0.5 nan 0.2 0.2", ["'nan' is no share"]),
        ("3 0.5 0.5 0.2 0.2", ["category_id 3", "names"]),
    ],
)
def test_a_wrong_line_is_named(folder: Path, line: str, words: list[str]) -> None:
    (folder / "labels/train/b.txt").write_text(f"0 0.5 0.5 0.2 0.2\n{line}\n")
    with pytest.raises(InputError) as error:
        read(folder)
    for word in ["labels/train/b.txt:2", *words]:
        assert word in str(error.value)


def test_files_that_cannot_be_read(folder: Path) -> None:
    (folder / "labels/train/b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"labels/train/b.txt: labels cannot be read \(no UTF-8\)"):
        read(folder)
    (folder / "labels/train/b.txt").write_text("0 0.5 0.5 0.2 0.2")
    (folder / "images/train/b.png").write_text("no image")
    with pytest.raises(InputError, match=r"b.png: this image cannot be read, so labels/train/b.txt"):
        read(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("names: !!python/object/apply:os.system ['touch x']", "not plain YAML"),
        ("names: [cat", "line 1"),
        ("- cat", "no mapping"),
        ("train: images/train", "no classes"),
        ("names: [cat]\ntrain: images/nowhere\nval: images/val", "images/nowhere; correct the path"),
        ("names: [cat]\ntrain: 3\nval: images/val", "`train` is 3"),
        ("names: [cat, cat]\ntrain: images/train\nval: images/val", "'cat' appears more than once"),
        ("[" * 1500, "data.yaml"),
    ],
)
def test_a_description_that_cannot_be_used(folder: Path, content: str, words: str) -> None:
    (folder / "data.yaml").write_text(content)
    with pytest.raises(InputError, match=re.escape(words)):
        read(folder)


@pytest.mark.parametrize("given", ["../images/train", "[images/train]", "train.txt", "images/train", "validation"])
def test_every_form_of_a_split(folder: Path, given: str) -> None:
    lines = [f"./images/train/{name}.png" for name in "ab"] + [str(folder / "images/train/c.png")]
    (folder / "train.txt").write_text("\n".join(lines))
    if given == "validation":
        (folder / "data.yaml").write_text("names: {0: cat, 7: dog}\ntrain: images/train\nvalidation: images/val")
    else:
        (folder / "data.yaml").write_text(f"names: {{0: cat, 7: dog}}\ntrain: {given}\nval: images/val")
    splits = load_splits(DataOptions(root=str(folder)))
    assert [index.image_ids for index in splits.values()] == [["a.png", "b.png", "c.png"], ["d.png"]]


def test_a_list_that_is_given_is_no_json(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "few.txt").write_text("images/val/d.png")
    with caplog.at_level(logging.INFO):
        splits = load_splits(DataOptions.parse({"root": str(folder), "val": {"annotations": "few.txt"}}))
    assert splits["val"].image_ids == ["d.png"]
    assert "YOLO: 3 train, 1 val images, 2 classes" in caplog.messages


def test_without_a_description(folder: Path) -> None:
    (folder / "data.yaml").unlink()
    (folder / "labels/classes.txt").write_text("\n".join(["cat", *"123456", "dog"]))
    assert read(folder).labels.tolist() == [0, 7]
    assert read(folder, "val").image_ids == ["d.png"]


def test_labels_are_in_the_frame_that_people_see(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn: 30 wide, 40 high
    Image.new("RGB", (40, 30)).save(folder / "images/val/d.jpg", exif=exif)
    (folder / "images/val/d.png").unlink()
    index = read(folder, "val")
    assert index.sizes.tolist() == [[40, 30]]
    np.testing.assert_allclose(index.xywh, [[21, 0, 9, 40]])
    assert index.read(0).shape == (40, 30, 3)


def test_against_a_naive_reader(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    expected = {}
    for i in range(20):
        width, height = rng.integers(20, 80, 2).tolist()
        Image.new("L", (width, height)).save(tmp_path / "images" / f"{i}.png")
        rows = [(int(rng.integers(3)), *rng.uniform(0, 1, 4).round(4).tolist()) for _ in range(rng.integers(5))]
        (tmp_path / "labels" / f"{i}.txt").write_text("".join(f"{' '.join(map(str, row))}\n" for row in rows))
        expected[f"{i}.png"] = [
            (label, max(x - w / 2, 0) * width, max(y - h / 2, 0) * height, min(x + w / 2, 1) * width,
             min(y + h / 2, 1) * height)
            for label, x, y, w, h in rows
        ]  # fmt: skip
    (tmp_path / "data.yaml").write_text("names: [a, b, c]\ntrain: images\nval: images")
    index = read_splits(DataOptions(root=str(tmp_path)), ("val",))["val"]
    assert sorted(index.image_ids) == sorted(expected)
    for i, name in enumerate(index.image_ids):
        rows = slice(*index.offsets[i : i + 2])
        found = np.column_stack((index.labels[rows], index.corners[rows]))
        np.testing.assert_allclose(found, np.array(expected[name]).reshape(-1, 5), atol=1e-9)


@pytest.mark.parametrize("line", [r"images\{}.png", r"D:\data\images\{}.png", "/elsewhere/images/{}.png"])
def test_labels_of_a_list_from_another_machine(folder: Path, line: str) -> None:
    (folder / "data.yaml").write_text("train: train.txt\nval: val.txt\nnames: {0: cat, 7: dog}\n")
    for name, stems in (("train", ("train/a", "train/b", "train/c")), ("val", ("val/d",))):
        lines = [line.format(stem) for stem in stems]
        if "\\" in line:
            lines = [one.replace("/", "\\") for one in lines]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    assert read(folder).offsets.tolist() == [0, 2, 2, 2]
    assert len(read(folder, "val").labels) == 1


def test_labels_with_a_suffix_in_capitals(folder: Path) -> None:
    (folder / "labels/train/a.txt").rename(folder / "labels/train/a.TXT")
    assert read(folder).offsets.tolist() == [0, 2, 2, 2]


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("size", [(40, 30), (30, 30)])
def test_boxes_of_a_rotated_photograph_need_no_option(folder: Path, orientation: int, size: tuple[int, int]) -> None:
    """Also where both frames have the same sides: a white pixel in a corner, as people see it, is in its box."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((*size[::-1], 3), np.uint8)
    pixels[: size[1] // 4, : size[0] // 2] = 255
    Image.fromarray(pixels).save(folder / "images/train/a.png", exif=exif)
    seen = np.asarray(ImageOps.exif_transpose(Image.open(folder / "images/train/a.png")))[..., 0] > 0
    (rows, columns), (height, width) = np.nonzero(seen), seen.shape
    x1, y1, x2, y2 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
    (folder / "labels/train/a.txt").write_text("0 " + " ".join(map(str, box)))
    index = read(folder)
    np.testing.assert_array_equal(index.read(0)[..., 0] > 0, seen)
    np.testing.assert_allclose(index.objects(0)[0], [[x1, y1, x2, y2]], atol=1e-4)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_shares_of_the_sides_before_a_rotation(folder: Path, orientation: int) -> None:
    """data.exif_boxes=stored: the white corner of what is stored is in the box of its shares."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:6, :20] = 255
    Image.fromarray(pixels).save(folder / "images/train/a.png", exif=exif)
    (folder / "labels/train/a.txt").write_text("0 0.25 0.1 0.5 0.2")
    index = load_split(DataOptions(root=str(folder), exif_boxes="stored"), "train")
    np.testing.assert_array_equal(index.read(0), pixels)
    np.testing.assert_allclose(index.objects(0)[0], [[0, 0, 20, 6]], atol=1e-4)
    assert not [one for one in index.faults if one.check.startswith("exif")]


def test_a_folder_for_one_split_leaves_the_others_to_the_other(folder: Path) -> None:
    (folder / "data.yaml").write_text("names: {0: cat, 7: dog}\n")
    (folder / "images/val").rename(folder / "images/test")
    (folder / "images/train").rename(folder / "images/all")
    options = DataOptions.parse({"root": str(folder), "val": {"annotations": "images/test"}})
    splits = load_splits(options)
    assert [splits["train"].path(i).name for i in range(len(splits["train"]))] == ["a.png", "b.png", "c.png"]
    assert [splits["val"].path(i).name for i in range(len(splits["val"]))] == ["d.png"]


def test_labels_beside_the_images_as_labelimg_writes_them(folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (*(folder / "images").glob("*/*"), *(folder / "labels").glob("*/*")):
        (flat / path.name).write_bytes(path.read_bytes().replace(b"7 ", b"1 "))
    (flat / "classes.txt").write_text("cat\ndog\n")
    assert find_format(DataOptions(root=str(flat))) == "yolo"
    whole = read_unsplit(DataOptions(root=str(flat)))
    assert whole is not None
    assert whole.file_names == ["a.png", "b.png", "c.png", "d.png"]
    assert [whole.class_names[label] for label in whole.labels] == ["cat", "dog", "dog"]


@pytest.mark.parametrize("keypoints", ["0.45 0.45 0.55 0.55", "0.45 0.45 2 0.55 0.55 1"])
def test_a_box_with_keypoints_is_no_polygon(folder: Path, keypoints: str) -> None:
    """As Ultralytics lays out poses: x and y of each point, and perhaps whether it is seen."""
    with (folder / "data.yaml").open("a") as file:
        file.write("kpt_shape: [2, 3]\n")
    (folder / "labels/train/a.txt").write_text(f"0 0.5 0.5 0.25 0.2 {keypoints}\n")
    index = read(folder)
    np.testing.assert_allclose(index.objects(0)[0], [[15, 12, 25, 18]], atol=1e-4)
