"""What is written in one layout and read from it is what it was, as far as the layout can say it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detector.apps.prepare_data import PrepareDataOptions, prepare_data
from detector.data.image_files import match_files
from detector.data.index import AnnotationIndex
from detector.data.splits import DataOptions, load_split, read_splits
from detector.errors import InputError


def convert(source: Path, to: str, out: Path) -> Path:
    prepare_data(PrepareDataOptions.parse({"source": str(source), "to": to, "out": str(out)}))
    return out


def read(root: Path) -> dict[str, AnnotationIndex]:
    splits = {name: match_files(index) for name, index in read_splits(DataOptions(root=str(root))).items()}
    assert not any(index.faults for index in splits.values())
    return splits


def boxes_by_name(index: AnnotationIndex, row: int) -> list[tuple]:
    rows = range(*index.offsets[row : row + 2])
    return [(index.class_names[index.labels[i]], bool(index.difficult[i]), *index.corners[i]) for i in rows]


def assert_same(a: dict[str, AnnotationIndex], b: dict[str, AnnotationIndex], difficult: bool, atol: float) -> None:
    for name in a:
        # YOLO's images come in the order of their names; an image of both splits has become b_2 in the second.
        stems = [Path(file).stem.removesuffix("_2") for file in b[name].file_names]
        b[name] = b[name].select([stems.index(Path(file).stem) for file in a[name].file_names])
        assert a[name].sizes.tolist() == b[name].sizes.tolist()
        for i in range(len(a[name])):
            ours, theirs = boxes_by_name(a[name], i), boxes_by_name(b[name], i)
            assert [row[: 1 + difficult] for row in ours] == [row[: 1 + difficult] for row in theirs]
            places = [np.array([row[2:] for row in rows]).reshape(-1, 4) for rows in (ours, theirs)]
            np.testing.assert_allclose(*places, atol=atol)


@pytest.fixture
def source(tiny_coco: Path) -> Path:
    """Different splits, a difficult object, no crowd region, two files of one name, odd class names."""
    for split, left_out in (("train", 99), ("val", 10)):
        path = tiny_coco / "annotations" / f"{split}.json"
        content = json.loads(path.read_text())
        content["images"] = [one for one in content["images"] if one["id"] != left_out]
        content["annotations"] = [one | {"iscrowd": 0} for one in content["annotations"] if one["image_id"] != left_out]
        content["annotations"][0]["difficult"] = 1
        for category, name in zip(content["categories"], ("<kite> & 'Bär\"", "no", "cat: 3"), strict=True):
            category["name"] = name
        path.write_text(json.dumps(content))
    return tiny_coco


@pytest.mark.parametrize("layout", ["voc", "yolo", "coco"])
def test_there_and_back(source: Path, tmp_path: Path, layout: str) -> None:
    before = read(source)
    other = convert(source, layout, tmp_path / layout)
    there = read(other)
    back = read(convert(other, "coco", tmp_path / "back"))
    for after in (there, back):
        assert_same(before, after, difficult=layout != "yolo", atol=1e-4)
        assert all(set(after[name].class_names) == set(before[name].class_names) for name in before)
    assert [index.class_names for index in there.values()] == [index.class_names for index in before.values()]
    for i in range(3):  # in the same order by now
        np.testing.assert_array_equal(there["val"].read(i), before["val"].read(i))


def test_a_crowd_is_difficult_in_voc_and_left_out_of_yolo(tiny_coco: Path, tmp_path: Path) -> None:
    voc, yolo = (read(convert(tiny_coco, to, tmp_path / to))["train"] for to in ("voc", "yolo"))
    assert voc.difficult.sum() == 1
    assert len(voc.labels) == 5
    assert len(yolo.labels) == 4


def test_what_sticks_out_is_cut_off_for_yolo_alone(tiny_coco: Path, tmp_path: Path) -> None:
    path = tiny_coco / "annotations/train.json"
    path.write_text(path.read_text().replace("[4, 6, 20, 10]", "[-4, 6, 100, 10]"))
    voc, yolo = (read(convert(tiny_coco, to, tmp_path / to))["train"] for to in ("voc", "yolo"))
    assert voc.corners[0].tolist() == [-4, 6, 96, 16]
    np.testing.assert_allclose(yolo.corners[0], [0, 6, 64, 16], atol=1e-6)


def test_an_image_that_exif_turns_is_written_turned(tiny_coco: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tiny_coco / "images/b.jpg").rotate(90, expand=True).save(tiny_coco / "images/b.jpg", exif=exif)
    for layout in ("voc", "yolo"):
        written = read(convert(tiny_coco, layout, tmp_path / layout))["train"]
        place = next(i for i, name in enumerate(written.file_names) if name == "b.jpg")
        with Image.open(written.path(place)) as image:
            assert image.getexif().get(0x0112, 1) == 1
        assert written.read(place).shape == (60, 40, 3)


def test_what_is_refused(tiny_coco: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not empty"):
        convert(tiny_coco, "voc", tiny_coco)
    with pytest.raises(InputError, match=r"convert needs to="):
        prepare_data(PrepareDataOptions(source=str(tiny_coco)))
    (tiny_coco / "images/a.png").unlink()
    with pytest.raises(InputError, match="no such file"):
        convert(tiny_coco, "voc", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def change(root: Path, split: str, **changes: object) -> None:
    path = root / "annotations" / f"{split}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_splits_that_declare_other_classes_are_refused(tiny_coco: Path, tmp_path: Path) -> None:
    """As training does: a number of YOLO's would be one class here and another there."""
    change(tiny_coco, "val", categories=[{"id": i, "name": n} for i, n in ((17, "kite"), (3, "car"), (90, "cat"))])
    with pytest.raises(InputError, match=r"splits that declare different classes.*same `categories`"):
        convert(tiny_coco, "yolo", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("layout", ["voc", "yolo", "coco"])
def test_a_size_that_is_not_the_files_is_refused(tiny_coco: Path, tmp_path: Path, layout: str) -> None:
    Image.new("RGB", (128, 96)).save(tiny_coco / "images/a.png")
    with pytest.raises(InputError, match=r"a\.png: declared 64 x 48, is 128 x 96.*correct `width`"):
        convert(tiny_coco, layout, tmp_path / "new")


def test_an_image_that_cannot_be_read_is_refused_and_nothing_stays(tiny_coco: Path, tmp_path: Path) -> None:
    (tiny_coco / "images/empty.jpg").write_bytes(b"no image")
    before = set(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"empty\.jpg"):
        convert(tiny_coco, "yolo", tmp_path / "new")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", "", ".mpo"])
@pytest.mark.parametrize("turned", [False, True])
def test_suffixes_that_no_folder_reader_knows(tiny_coco: Path, tmp_path: Path, suffix: str, turned: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    image = Image.open(tiny_coco / "images/b.jpg")
    (image.rotate(90, expand=True) if turned else image).save(tiny_coco / "images/b.jpg", exif=exif)
    (tiny_coco / "images/b.jpg").rename(tiny_coco / f"images/b{suffix}")
    for split in ("train", "val"):
        path = tiny_coco / "annotations" / f"{split}.json"
        path.write_text(path.read_text().replace("b.jpg", f"b{suffix}"))
    written = read(convert(tiny_coco, "yolo", tmp_path / "yolo"))["train"]
    assert written.read(written.file_names.index("b.jpg")).shape == (60, 40, 3)
    assert len(written) == 4


def test_a_format_of_another_suffix_is_encoded_anew(tiny_coco: Path, tmp_path: Path) -> None:
    pixels = Image.open(tiny_coco / "images/a.png")
    pixels.save(tiny_coco / "images/a.tga")
    for split in ("train", "val"):
        path = tiny_coco / "annotations" / f"{split}.json"
        path.write_text(path.read_text().replace("a.png", "a.tga"))
    written = read(convert(tiny_coco, "yolo", tmp_path / "yolo"))["train"]
    np.testing.assert_array_equal(written.read(written.file_names.index("a.png")), np.asarray(pixels))


@pytest.mark.parametrize("name", ["🐱", 'a"b\\c', "\x7f\x85\u2028", "Bär", "no", "  x "])
def test_any_class_name_comes_back_from_yolo(tiny_coco: Path, tmp_path: Path, name: str) -> None:
    categories = [{"id": i, "name": n} for i, n in ((90, name), (3, "car"), (17, "cat"))]
    for split in ("train", "val"):
        change(tiny_coco, split, categories=categories)
    before, after = read(tiny_coco)["train"], read(convert(tiny_coco, "yolo", tmp_path / "yolo"))["train"]
    assert after.class_names == before.class_names
    assert name in after.class_names


@pytest.mark.parametrize("file", ["photo .jpg", " photo.jpg", ".photo.jpg"])
def test_names_that_lists_or_folders_lose(tiny_coco: Path, tmp_path: Path, file: str) -> None:
    (tiny_coco / "images/b.jpg").rename(tiny_coco / "images" / file)
    for split in ("train", "val"):
        path = tiny_coco / "annotations" / f"{split}.json"
        path.write_text(path.read_text().replace("b.jpg", file))
    for layout in ("voc", "yolo"):
        written = read(convert(tiny_coco, layout, tmp_path / layout))["train"]
        assert sorted(written.file_names) == ["a.png", "c.jpg", "empty.jpg", "photo.jpg"]


def test_links_are_followed_and_an_interrupt_leaves_nothing(
    tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "far" / "target")
    convert(tiny_coco, "yolo", tmp_path / "link")
    assert (tmp_path / "far/target/data.yaml").is_file()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("detector.data.convert._write_lines", interrupted)
    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_coco, "yolo", tmp_path / "new")
    assert set(tmp_path.iterdir()) == before


def test_the_frame_of_boxes_can_be_said(tiny_coco: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down: both frames have the same sides
    Image.open(tiny_coco / "images/b.jpg").save(tiny_coco / "images/b.jpg", exif=exif)
    options = {"source": str(tiny_coco), "to": "yolo"}
    with pytest.raises(InputError, match=r"in tools/prepare_data\.py exif_boxes="):
        prepare_data(PrepareDataOptions.parse(options | {"out": str(tmp_path / "a")}))
    for frame in ("turned", "stored"):
        out = tmp_path / frame
        prepare_data(PrepareDataOptions.parse(options | {"out": str(out), "exif_boxes": frame}))
        written = read(out)["train"]
        stored = np.asarray(Image.open(tiny_coco / "images/b.jpg"))
        pixels = written.read(written.file_names.index("b.jpg"))
        expected = stored[::-1, ::-1] if frame == "turned" else stored
        assert np.abs(pixels.astype(int) - expected).mean() < 8  # JPEG once more


def test_lvis_lists_stay(tiny_coco: Path, tmp_path: Path) -> None:
    """Without them a converted set could not be scored by LVIS's rules any more."""
    for split in ("train", "val"):
        path = tiny_coco / "annotations" / f"{split}.json"
        content = json.loads(path.read_text())
        for place, image in enumerate(content["images"]):
            image |= {"neg_category_ids": [90, 17][: place % 3], "not_exhaustive_category_ids": [3]}
        for category, frequency in zip(content["categories"], "rfc", strict=True):
            category["frequency"] = frequency
        path.write_text(json.dumps(content))
    prepare_data(PrepareDataOptions(source=str(tiny_coco), to="coco", out=str(tmp_path / "new")))
    before, after = (load_split(DataOptions(root=str(root)), "val") for root in (tiny_coco, tmp_path / "new"))
    assert after.lvis == before.lvis
    assert after.frequencies == before.frequencies == ("f", "c", "r")


def test_a_place_that_cannot_be_replaced_is_refused_at_once(
    tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A volume of a container, for example, is an empty folder."""
    out = tmp_path / "volume"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    with pytest.raises(InputError, match=r"volume is where a disk or a volume begins; give a folder inside it"):
        prepare_data(PrepareDataOptions(source=str(tiny_coco), to="coco", out=str(out)))


@pytest.mark.parametrize("options", [{"what": "split"}, {"to": "voc"}, {"to": "yolo"}, {"to": "coco"}])
def test_file_names_that_no_list_can_hold(tmp_path: Path, options: dict[str, Any]) -> None:
    """Of an archive from another system: named before anything is written, where there are lists."""
    source = tmp_path / "source"
    for folder in ("images", "labels"):
        (source / folder).mkdir(parents=True)
    for i in range(8):
        name = "caf\udce9" if i == 3 else f"{i}"
        noise = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(noise).save(source / "images" / f"{name}.png")
        (source / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.2 0.2")
    (source / "data.yaml").write_text("names: [cat]\n")
    given = {"source": str(source)} | options | ({} if "what" in options else {"out": str(tmp_path / "out")})
    if options.get("to") in ("yolo", "coco"):
        prepare_data(PrepareDataOptions.parse(given))
        read = read_splits(DataOptions(root=str(tmp_path / "out")))
        assert sum(len(index) for index in read.values()) == 8
        return
    with pytest.raises(InputError, match=r"'caf\\udce9.png': no UTF-8, as lists are; rename the file, or convert"):
        prepare_data(PrepareDataOptions.parse(given))
    assert not (tmp_path / "out").exists()
    assert not list(source.glob("*.txt"))
