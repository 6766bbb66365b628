"""Names and frames as the image files have them: what boxes lie on is what was painted there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detector.data.annotations import load_annotations
from detector.data.index import AnnotationIndex
from detector.data.splits import DataOptions, load_split
from detector.errors import InputError

# What is stored of an image that people see, by EXIF orientation.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.transpose(1, 0, 2),
    6: lambda seen: np.rot90(seen, 1),
    7: lambda seen: seen.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda seen: np.rot90(seen, -1),
}
WIDE, LOW = 96, 64  # of what people see
FAR, NEAR = [70, 10, 20, 12], [10, 12, 20, 14]  # x, y, width, height: on the wide frame alone, on both
RED = np.array([255, 0, 0])


class Folder:
    """A data set of images with one red object each."""

    def __init__(self, root: Path) -> None:
        (root / "images").mkdir(parents=True)
        self.root, self.images, self.annotations = root, [], []  # type: ignore[var-annotated]

    def add(
        self,
        orientation: int,
        box: list[int],
        frame: str = "turned",
        declared: str | None = "stored",
        size: tuple[int, int] = (LOW, WIDE),
        suffix: str = "png",
    ) -> None:
        """An image with a box in one frame, and the width and height of one."""
        seen = np.zeros((*size, 3), np.uint8)
        pixels = seen if frame == "turned" else np.ascontiguousarray(STORED[orientation](seen))
        x, y, width, height = box
        pixels[y : y + height, x : x + width] = RED
        stored = STORED[orientation](seen) if frame == "turned" else pixels
        number = len(self.images)
        exif = Image.Exif()
        exif[0x0112] = orientation
        lossless = {"lossless": True} if suffix == "webp" else {}
        name = f"{number}.{suffix}"
        Image.fromarray(np.ascontiguousarray(stored)).save(self.root / "images" / name, exif=exif, **lossless)
        entry: dict[str, Any] = {"id": number, "file_name": name}
        if declared is not None:
            sides = stored.shape if declared == "stored" else seen.shape
            entry |= {"width": sides[1], "height": sides[0]}
        self.images.append(entry)
        self.annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": box})

    def load(self, **options: Any) -> AnnotationIndex:
        content = {"images": self.images, "annotations": self.annotations, "categories": [{"id": 1, "name": "red"}]}
        path = self.root / "train.json"
        path.write_text(json.dumps(content))
        return load_annotations(path, self.root / "images", **options)


def check_objects(index: AnnotationIndex) -> None:
    """Every box holds its red object, whole and alone."""
    for i in range(len(index)):
        image = index.read(i)
        x1, y1, x2, y2 = index.objects(i)[0][0].astype(int)
        red = (image == RED).all(axis=2)
        assert red[y1:y2, x1:x2].all(), i
        assert red.sum() == (y2 - y1) * (x2 - x1), i
        assert 0 in index.sizes[i] or tuple(index.sizes[i]) == image.shape[:2]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "set")


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("declared", ["stored", "turned", None])
@pytest.mark.parametrize("frame", ["stored", "turned"])
def test_boxes_decide_the_frame(
    folder: Folder, orientation: int, declared: str | None, frame: str, caplog: pytest.LogCaptureFixture
) -> None:
    box = FAR if frame == "turned" else [10, 70, 20, 12]  # low on the frame that is stored, which is high
    folder.add(orientation, box, frame, declared)
    folder.add(orientation, NEAR, frame, "stored")  # fits both: as the other
    index = folder.load()
    check_objects(index)
    swapped = (declared not in (None, frame)) + (frame == "turned")
    assert [(fault.check, fault.count) for fault in index.faults] == ([("exif_frame", swapped)] if swapped else [])
    assert caplog.text.count("belong to another frame than the boxes") == bool(swapped)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("suffix", ["tif", "webp"])
@pytest.mark.parametrize("frame", ["stored", "turned"])
def test_other_kinds_of_files(folder: Folder, orientation: int, suffix: str, frame: Any) -> None:
    folder.add(orientation, NEAR, frame, "stored", suffix=suffix)
    folder.add(orientation, NEAR, frame, None, suffix=suffix)
    with pytest.raises(InputError, match=r"data\.exif_boxes"):
        folder.load()
    check_objects(folder.load(exif_boxes=frame))


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("frame", ["stored", "turned"])
def test_where_boxes_cannot_tell_it_is_refused_unless_told(folder: Folder, orientation: int, frame: Any) -> None:
    folder.add(1, FAR)
    folder.add(orientation, NEAR, frame)
    with pytest.raises(InputError, match=r"image id 1 \(1\.png\).*data\.exif_boxes=turned .*data\.exif_boxes=stored"):
        folder.load()
    index = folder.load(exif_boxes=frame)
    check_objects(index)
    folder.images[1].pop("width")
    with pytest.raises(InputError, match=r"data\.exif_boxes"):
        folder.load()


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_other_images_tell_the_frame_of_one_that_was_upside_down(folder: Folder, orientation: int) -> None:
    folder.add(orientation, FAR)
    folder.add(6, NEAR, declared="turned")
    check_objects(folder.load())
    folder.add(8, [10, 70, 20, 12], "stored")  # two tools
    with pytest.raises(InputError, match=r"image id 0.*data\.exif_boxes"):
        folder.load()


def test_each_image_by_its_own_boxes_where_two_tools_wrote_the_file(folder: Folder) -> None:
    folder.add(6, FAR)
    folder.add(6, [10, 70, 20, 12], "stored")
    folder.add(1, FAR)
    check_objects(folder.load())


def test_boxes_that_contradict_each_other(folder: Folder) -> None:
    folder.add(6, FAR)
    folder.annotations.append({"id": 9, "image_id": 0, "category_id": 1, "bbox": [10, 70, 20, 12]})
    with pytest.raises(InputError, match=r"image id 0.*data\.exif_boxes"):
        folder.load()
    assert folder.load(exif_boxes="turned").sizes.tolist() == [[LOW, WIDE]]


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_images_without_a_box_need_nothing(folder: Folder, orientation: int) -> None:
    folder.add(orientation, NEAR)
    folder.annotations.pop()
    assert folder.load().faults == ()


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_square_has_the_same_sides_in_both_frames_and_other_places(folder: Folder, orientation: int) -> None:
    folder.add(orientation, NEAR, size=(64, 64))
    with pytest.raises(InputError, match=r"image id 0.*data\.exif_boxes"):
        folder.load()
    assert folder.load(exif_boxes="turned").read(0).shape == (64, 64, 3)
    folder.add(6, FAR)  # whose box tells the frame, of both
    assert folder.load().upright.tolist() == [True, True]


def test_the_option_of_a_data_set(folder: Folder) -> None:
    folder.add(3, FAR, "stored")
    folder.load(exif_boxes="stored")
    data = {"root": str(folder.root), "train": {"annotations": "train.json"}}
    with pytest.raises(InputError, match="exif_boxes"):
        load_split(DataOptions.parse(data), "train")
    check_objects(load_split(DataOptions.parse(data | {"exif_boxes": "stored"}), "train"))
    with pytest.raises(InputError, match=r"data\.exif_boxes=upright: expected stored or turned"):
        DataOptions.parse(data | {"exif_boxes": "upright"}, "data")


@pytest.mark.parametrize(
    "name",
    [
        r"sub\0.png",
        r"C:\data\set\images\sub\0.png",
        "D:/photos/sub/0.png",
        r"\\server\share\sub\0.png",
        "/data/somebody/set/images/sub/0.png",
        r".\sub\0.png",
    ],
)
def test_names_of_another_machine(folder: Folder, name: str, caplog: pytest.LogCaptureFixture) -> None:
    folder.add(1, FAR)
    (folder.root / "images" / "sub").mkdir()
    (folder.root / "images" / "0.png").rename(folder.root / "images" / "sub" / "0.png")
    folder.images[0]["file_name"] = name
    index = folder.load()
    assert index.file_names == ["sub/0.png"]
    assert [(fault.check, fault.count) for fault in index.faults] == [("foreign_names", 1)]
    assert "1 names of files with the folders of another machine" in caplog.text
    check_objects(index)


def test_a_name_with_a_backslash_that_is_there(folder: Folder) -> None:
    folder.add(1, FAR)
    (folder.root / "images" / "0.png").rename(folder.root / "images" / r"a\0.png")
    folder.images[0]["file_name"] = r"a\0.png"
    assert folder.load().faults == ()


def test_names_of_another_machine_that_lead_nowhere_or_to_one_file(folder: Folder) -> None:
    for _ in range(3):
        folder.add(1, FAR)
    folder.images[1]["file_name"] = r"C:\a\0.png"  # 0.png is another entry's
    folder.images[2]["file_name"] = "/b/absent.png"
    with pytest.raises(InputError, match=r"train\.json: image id 1: .*no such file; check image_dir.*1 more"):
        folder.load()
    assert folder.load(limit=1).file_names == ["0.png"]


def test_all_missing_images_are_counted_before_training(folder: Folder) -> None:
    for _ in range(12):
        folder.add(1, FAR)
    for i in range(8, 12):
        (folder.root / "images" / f"{i}.png").unlink()
    with pytest.raises(InputError, match=r"image id 8: .*8\.png: no such file.*3 more of its entries"):
        folder.load()
