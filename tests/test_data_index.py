"""The arrays of an index that is chosen from, copied and counted, and its images in the frame of their boxes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from detector.data.annotations import load_annotations, read_annotations
from detector.data.index import AnnotationIndex, look_up
from detector.errors import InputError

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def index(tiny_coco: Path) -> AnnotationIndex:
    return load_annotations(tiny_coco / "annotations" / "train.json", tiny_coco / "images")


def test_clipping_and_dropping_are_counted(tiny_coco: Path) -> None:
    extra_boxes = [[-5, -5, 20, 20], [60, 40, 10, 20], [70, 2, 5, 5], [5, 5, 0, 4], [5, 5, 4, -2], [1, 1, 63.005, 5]]
    content = json.loads((tiny_coco / "annotations" / "train.json").read_text())
    content["annotations"] = [
        {"id": k, "image_id": 10, "category_id": 3, "bbox": box} for k, box in enumerate(extra_boxes)
    ]
    index = read_annotations(content)
    assert index.objects(0)[0].tolist() == [[0, 0, 15, 15], [60, 40, 64, 48], [1, 1, 64, 6]]
    assert index.xywh[index.offsets[0] : index.offsets[1]].tolist() == extra_boxes
    assert index.degenerate.tolist() == [False, False, True, True, True, False]
    assert index.areas[:2].tolist() == [400, 200]
    assert "3 without area inside it (not trained on; counted by metrics, can never be found)" in index.summary()
    assert index.counts == {"images": 4, "boxes": 3, "crowds": 0, "empty": 3, "clipped": 2, "degenerate": 3}


def test_select_keeps_boxes_with_their_images(index: AnnotationIndex) -> None:
    part = index.select([3, 0])
    assert part.image_ids == [99, 10]
    assert part.other_ids == {7, 42}
    for new, old in ((0, 3), (1, 0)):
        for ours, theirs in zip(part.objects(new), index.objects(old), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert part.annotation_ids.tolist() == [1, 2, 4]
    assert part.images.tolist() == [0, 1, 1]


def test_images_counted_from_the_end(index: AnnotationIndex) -> None:
    for i in range(4):
        for ours, theirs in zip(index.objects(i - 4), index.objects(i), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert index.select([-1, -4]).xywh.tolist() == index.select([3, 0]).xywh.tolist()


def test_ids_are_looked_up_as_number_and_as_text() -> None:
    known = {7: 0, "8": 1, "nine": 2}
    for unhashable in ([], [[7]], [{"a": 7}], [([7],)]):
        numbers, other_type = look_up([7, "7", 8, "8", "nine", "ten", None, 7.5, *unhashable], known)
        assert numbers.tolist() == [0, 0, 1, 1, 2, -1, -1, -1, *[-1] * len(unhashable)]
        assert np.flatnonzero(other_type).tolist() == [1, 2]


def test_index_is_flat_and_survives_pickling(index: AnnotationIndex) -> None:
    copy = pickle.loads(pickle.dumps(index))
    np.testing.assert_array_equal(copy.boxes, index.boxes)
    assert all(array.dtype != object for array in (index.sizes, index.offsets, index.boxes, index.labels, index.areas))
    index.objects(0)[0][:] = -1
    assert (index.boxes >= 0).all()


def test_boxes_of_turned_images_are_in_the_declared_frame(tiny_coco: Path, index: AnnotationIndex) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn for display; the file says 64 wide, 48 high
    stored = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    Image.fromarray(stored).save(tiny_coco / "images" / "a.png", exif=exif)
    np.testing.assert_array_equal(index.read(0), cv2.rotate(stored, cv2.ROTATE_90_CLOCKWISE))
    stored = stored.transpose(1, 0, 2)
    Image.fromarray(stored).save(tiny_coco / "images" / "a.png", exif=exif)
    np.testing.assert_array_equal(index.read(0), stored)


def test_an_image_of_another_size(tiny_coco: Path, index: AnnotationIndex) -> None:
    Image.new("RGB", (30, 20)).save(tiny_coco / "images" / "a.png")
    with pytest.raises(InputError) as caught:
        index.read(0)
    for part in ("image id 10", "a.png", "30 x 20", "width 64 and height 48", "train.json", "correct width"):
        assert part in str(caught.value)


def test_a_damaged_image_names_file_and_id(tiny_coco: Path, index: AnnotationIndex) -> None:
    (tiny_coco / "images" / "sub" / "c.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InputError, match=r"image id 99: .*c\.jpg.*take it out"):
        index.read(3)


def test_a_missing_image_names_file_and_id(tiny_coco: Path, index: AnnotationIndex) -> None:
    (tiny_coco / "images" / "empty.jpg").unlink()
    with pytest.raises(InputError, match=r"image id 42: .*empty\.jpg: no such file; check"):
        index.read(2)
