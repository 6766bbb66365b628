"""Detections: what they accept, and the forms that they turn into."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detector.data.collate import Batch
from detector.errors import InputError
from detector.inference.detections import Detections

NAMES = ("cat", "dog", "bird")


@pytest.fixture
def found() -> Detections:
    return Detections(
        boxes=np.array([[10, 20, 30, 60], [0, 0, 100, 80], [5.25, 6.5, 7.75, 9.5]], np.float32),
        scores=np.array([0.9, 0.5, 0.1], np.float32),
        labels=np.array([2, 0, 2], np.int64),
        class_names=NAMES,
        image_size=(80, 100),
        path="street.jpg",
    )


def nothing() -> Detections:
    return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), NAMES, (80, 100))


@pytest.mark.parametrize(
    ("boxes", "scores", "labels"),
    [((2, 4), (3,), (3,)), ((3, 5), (3,), (3,)), ((3, 4), (3,), (2,)), ((0,), (0,), (0,)), ((3, 4), (3,), (3, 1))],
)
def test_shapes_that_disagree_are_refused(boxes: tuple, scores: tuple, labels: tuple) -> None:
    with pytest.raises(ValueError, match=r"expected \(D, 4\), \(D,\), \(D,\)") as error:
        Detections(np.zeros(boxes), np.zeros(scores), np.zeros(labels, np.int64), NAMES, (80, 100))
    assert str(boxes) in str(error.value)


def test_names_and_length(found: Detections) -> None:
    assert found.names == ["bird", "cat", "bird"]
    assert len(found) == 3
    assert nothing().names == []
    assert len(nothing()) == 0


def test_above_keeps_the_threshold_itself_and_everything_else(found: Detections) -> None:
    kept = found.above(0.5)
    assert kept.scores.tolist() == found.scores[:2].tolist()
    assert kept.boxes.tolist() == found.boxes[:2].tolist()
    assert kept.labels.tolist() == [2, 0]
    assert (kept.class_names, kept.image_size, kept.path) == (NAMES, (80, 100), "street.jpg")
    assert len(found.above(0.95)) == 0
    assert len(found.above(0.0)) == 3
    assert len(nothing().above(0.5)) == 0


def test_coco_results_come_back(found: Detections) -> None:
    rows = found.to_coco("image 7", category_ids=(3, 17, 90))
    assert [row["category_id"] for row in rows] == [90, 3, 90]
    assert rows[0]["bbox"] == [10, 20, 20, 40]
    assert {row["image_id"] for row in rows} == {"image 7"}
    x, y, width, height = np.array([row["bbox"] for row in json.loads(json.dumps(rows))]).T
    np.testing.assert_array_equal(np.stack((x, y, x + width, y + height), axis=1).astype(np.float32), found.boxes)
    np.testing.assert_array_equal(np.array([row["score"] for row in rows], np.float32), found.scores)


def test_coco_results_do_not_lose_precision_far_from_the_origin() -> None:
    box = np.array([[4095.3, 2047.7, 4095.9, 2048.1]], np.float32)
    row = Detections(box, np.ones(1, np.float32), np.zeros(1, np.int64), NAMES, (3000, 5000)).to_coco(1)[0]
    x, y, width, height = row["bbox"]
    assert np.array([x, y, x + width, y + height], np.float32).tolist() == box[0].tolist()


def test_coco_ids_count_from_one_by_default(found: Detections) -> None:
    assert [row["category_id"] for row in found.to_coco(7)] == [3, 1, 3]
    assert nothing().to_coco(7) == []


def test_dictionary_is_plain_json(found: Detections) -> None:
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain == found.to_dict()
    assert plain["names"] == ["bird", "cat", "bird"]
    assert (plain["height"], plain["width"], plain["path"]) == (80, 100, "street.jpg")
    assert np.array(plain["boxes"], np.float32).tolist() == found.boxes.tolist()
    empty = json.loads(json.dumps(nothing().to_dict()))
    assert empty["boxes"] == empty["scores"] == empty["labels"] == empty["names"] == []


def test_a_line_of_json(found: Detections) -> None:
    line = replace(found, path="straße\n.jpg", frame=7, time=0.28).to_json()
    assert "\n" not in line
    assert "straße" in line
    plain = json.loads(line)
    assert (plain["path"], plain["frame"], plain["time"], plain["error"]) == ("straße\n.jpg", 7, 0.28, None)
    assert plain["boxes"][1] == [0, 0, 100, 80]
    assert set(plain) == {*(f.name for f in fields(Detections)), "names", "height", "width"} - {
        "class_names", "image_size",
    }  # fmt: skip


def test_masks_and_classes_keep_everything_else(found: Detections) -> None:
    frame = replace(found, frame=7, time=0.28)
    for kept in (frame.of([2]), frame.where(np.array([True, False, True])), frame.where(np.array([0, 2]))):
        assert kept.labels.tolist() == [2, 2]
        assert kept.boxes.tolist() == found.boxes[[0, 2]].tolist()
        assert (kept.path, kept.frame, kept.time, kept.image_size) == ("street.jpg", 7, 0.28, (80, 100))
    assert frame.above(0.5).frame == 7
    assert len(frame.of([])) == len(frame.of([1])) == len(nothing().of([0])) == 0


def test_table(found: Detections) -> None:
    pandas = pytest.importorskip("pandas")
    table = replace(found, frame=3, time=0.12).to_pandas()
    assert list(table.columns) == ["path", "frame", "time", "label", "name", "score", "x1", "y1", "x2", "y2"]
    assert table["name"].tolist() == ["bird", "cat", "bird"]
    np.testing.assert_array_equal(table[["x1", "y1", "x2", "y2"]].to_numpy(np.float32), found.boxes)
    np.testing.assert_array_equal(table["score"].to_numpy(np.float32), found.scores)
    assert set(table["frame"]) == {3}
    empty = nothing().to_pandas()
    assert (len(empty), list(empty.columns)) == (0, list(table.columns))
    assert len(pandas.concat([table, table])) == 6


@pytest.mark.filterwarnings("ignore")  # its imports' own
def test_supervision(found: Detections) -> None:
    supervision = pytest.importorskip("supervision")
    theirs = found.to_supervision()
    assert isinstance(theirs, supervision.Detections)
    np.testing.assert_array_equal(theirs.xyxy, found.boxes)
    np.testing.assert_array_equal(theirs.confidence, found.scores)
    np.testing.assert_array_equal(theirs.class_id, found.labels)
    assert theirs["class_name"].tolist() == found.names
    np.testing.assert_allclose(theirs.area, [20 * 40, 100 * 80, 2.5 * 3])
    assert len(theirs[theirs.confidence > 0.3]) == 2
    assert len(nothing().to_supervision()) == 0


@pytest.mark.parametrize("package", ["pandas", "supervision"])
def test_what_is_not_installed_is_named(found: Detections, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"pip install {package}"):
        getattr(found, f"to_{package}")()


def test_crops_are_what_lies_in_the_boxes(found: Detections, tmp_path: Path) -> None:
    image = np.arange(80 * 100 * 3, dtype=np.uint32).astype(np.uint8).reshape(80, 100, 3)
    crops = found.crop(image)
    np.testing.assert_array_equal(crops[0], image[20:60, 10:30])
    np.testing.assert_array_equal(crops[1], image)
    np.testing.assert_array_equal(crops[2], image[6:10, 5:8])  # 5.25, 6.5, 7.75, 9.5, outwards
    crops[1][:] = 0
    assert image.any()
    Image.fromarray(image).save(tmp_path / "a.png")
    again = replace(found, path=str(tmp_path / "a.png")).crop()
    np.testing.assert_array_equal(again[0], crops[0])
    assert nothing().crop(image) == []
    np.testing.assert_array_equal(found.crop(image[..., ::-1], bgr=True)[1], image)
    drawn = [np.asarray(one) for one in (found.draw(image), found.draw(image[..., ::-1], bgr=True))]
    np.testing.assert_array_equal(*drawn)


def test_a_crop_has_a_pixel_at_least() -> None:
    boxes = np.array([[100, 80, 100, 80], [3, 3, 3, 3], [99.5, 0, 100, 80]], np.float32)
    thin = Detections(boxes, np.ones(3, np.float32), np.zeros(3, np.int64), NAMES, (80, 100))
    assert [crop.shape for crop in thin.crop(np.zeros((80, 100, 3), np.uint8))] == [(1, 1, 3), (1, 1, 3), (80, 1, 3)]


@pytest.mark.parametrize("changes", [{"path": None}, {"frame": 3}, {"path": "https://host/a.jpg"}, {"error": "broken"}])
def test_an_image_that_cannot_be_read_again(found: Detections, changes: dict) -> None:
    for action in (replace(found, **changes).crop, replace(found, **changes).draw):
        with pytest.raises(InputError, match="give the image"):
            action()


def test_a_crop_of_another_image(found: Detections) -> None:
    with pytest.raises(InputError, match="the image is 99x80, the detections belong to one of 100x80"):
        found.crop(np.zeros((80, 99, 3), np.uint8))


def test_fields_cannot_be_replaced(found: Detections) -> None:
    with pytest.raises(AttributeError):
        found.scores = np.zeros(3, np.float32)  # type: ignore[misc]


def test_draw_gives_an_image_of_the_same_size(found: Detections) -> None:
    black = np.zeros((80, 100, 3), np.uint8)
    picture = found.draw(black)
    assert isinstance(picture, Image.Image)
    assert picture.size == (100, 80)
    assert np.asarray(picture).any()
    # All that there is: the last has a score of 0.1.
    sure = np.asarray(found.draw(black, threshold=0.5))
    assert (np.asarray(picture)[:20, :40] != sure[:20, :40]).any()
    np.testing.assert_array_equal(sure, found.above(0.5).draw(black))


def test_an_image_that_was_searched_is_read_again_whatever_its_size(
    found: Detections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was searched with a larger max_pixels than Pillow's limit."""
    path = tmp_path / "large.png"
    Image.new("RGB", (100, 80)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's refuses above twice that
    large = replace(found, path=str(path))
    assert large.draw().size == (100, 80)
    assert large.draw(path).size == (100, 80)
    assert len(large.crop()) == 3
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert len(large.crop()) == 3


def test_draw_without_an_image_says_what_to_give() -> None:
    with pytest.raises(InputError, match="give the image"):
        nothing().draw()


def test_batch_moves_every_tensor_and_keeps_the_ids() -> None:
    batch = Batch(
        images=torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        image_sizes=torch.full((2, 2), 32),
        boxes=torch.zeros(2, 1, 4),
        labels=torch.full((2, 1), -1),
        crowd=torch.zeros(2, 1, dtype=torch.bool),
        scales=torch.ones(2, 2, dtype=torch.float64),
        original_sizes=torch.full((2, 2), 32),
        image_ids=("a", "b"),
    )
    moved = batch.to("meta")
    tensors = {name: value for name, value in vars(moved).items() if name != "image_ids"}
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert {name: t.dtype for name, t in tensors.items()} == {name: getattr(batch, name).dtype for name in tensors}
    assert moved.image_ids == ("a", "b")
    assert len(moved) == 2
