"""The embedded data set: true boxes, no hint at the class but the outline, one seed one result."""

from __future__ import annotations

import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detector.data import scenes as scenes_module
from detector.data import shapes
from detector.data.scenes import CLASS_NAMES, MAX_OBJECTS, MIN_VISIBLE, Scene, render_scene
from detector.data.shapes import ensure_shapes, scene_seed
from detector.errors import InputError


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(scene_seed(7, "train", index)) for index in range(300)]


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_shapes(tmp_path_factory.mktemp("data") / "shapes", train=16, val=8)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("label", range(len(CLASS_NAMES)), ids=CLASS_NAMES)
def test_an_outline_fills_its_box_and_the_mask_fills_the_outline(label: int) -> None:
    rng = np.random.default_rng(label)
    for _ in range(40):
        size = tuple(rng.uniform(16, 120, 2))
        item = scenes_module._fit(rng, scenes_module._OUTLINES[CLASS_NAMES[label]](rng), size, label)
        low, high = item.outline.min(axis=0), item.outline.max(axis=0)
        np.testing.assert_allclose(high - low, size)
        rows, columns = np.nonzero(item.coverage)
        np.testing.assert_allclose(low, [columns.min(), rows.min()], atol=1)
        np.testing.assert_allclose(high, [columns.max() + 1, rows.max() + 1], atol=1)


def test_boxes_and_areas_are_those_of_what_is_drawn(scenes: list[Scene]) -> None:
    differences = []
    for scene in scenes:
        for index in np.flatnonzero(scene.visible == 1):
            rows, columns = np.nonzero(scene.owner == index)
            drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            differences.append(drawn - scene.boxes[index])
            assert scene.areas[index] == pytest.approx(len(rows), rel=0.06, abs=15)
    errors = np.array(differences)
    assert len(errors) > 500
    # A pixel is an object's from half coverage on, which takes a little off a sharp tip.
    assert np.abs(errors).max() < 2
    assert (np.abs(errors) < 1).mean() > 0.99
    # No systematic shift: it would cost small objects their high IoU.
    x1, y1, x2, y2 = errors.mean(axis=0)
    assert x1 == pytest.approx(-x2, abs=0.06)
    assert y1 == pytest.approx(-y2, abs=0.06)
    assert np.abs(errors.mean(axis=0)).max() < 0.3


def test_boxes_lie_in_the_image(scenes: list[Scene]) -> None:
    for scene in scenes:
        height, width = scene.image.shape[:2]
        assert (scene.boxes >= 0).all()
        assert (scene.boxes <= [width, height, width, height]).all()
        assert (scene.boxes[:, 2:] - scene.boxes[:, :2] >= 9).all()
    assert any((scene.boxes == 0).any() for scene in scenes), "no object is cut by the border"


def test_no_object_is_mostly_hidden(scenes: list[Scene]) -> None:
    shares = []
    for scene in scenes:
        for index, (area, visible) in enumerate(zip(scene.areas, scene.visible, strict=True)):
            assert visible >= MIN_VISIBLE
            assert (scene.owner == index).sum() == pytest.approx(area * visible, rel=0.06, abs=15)
            shares.append(visible)
    assert 0.05 < np.mean(np.array(shares) < 0.95) < 0.4, "some occlusion, not too much"


def test_every_object_stands_out_from_what_surrounds_it(scenes: list[Scene]) -> None:
    weak, total = 0, 0
    for scene in scenes:
        for index in np.flatnonzero(scene.visible == 1):
            mask = (scene.owner == index).astype(np.float32)
            near = np.zeros_like(mask)
            for dy, dx in itertools.product((-3, 0, 3), repeat=2):
                near = np.maximum(near, np.roll(mask, (dy, dx), axis=(0, 1)))
            around = (near > 0) & (mask == 0)
            difference = scene.image[mask > 0].mean(axis=0) - scene.image[around].mean(axis=0)
            weak += float(np.linalg.norm(difference)) < 30
            total += 1
    assert total > 500
    assert weak / total < 0.01


def test_all_classes_and_sizes_are_there(scenes: list[Scene]) -> None:
    labels = np.concatenate([scene.labels for scene in scenes])
    counts = np.bincount(labels, minlength=len(CLASS_NAMES))
    assert len(counts) == len(CLASS_NAMES) >= 6
    assert counts.min() > 0.75 * counts.mean()
    ranges = np.digitize(np.concatenate([scene.areas for scene in scenes]), [32**2, 96**2])
    assert (np.bincount(ranges, minlength=3) / len(ranges) > 0.15).all()
    per_picture = np.array([len(scene.labels) for scene in scenes])
    assert per_picture.max() <= MAX_OBJECTS
    assert 0.02 < np.mean(per_picture == 0) < 0.09
    assert {scene.image.shape for scene in scenes} == {(256, 256, 3), (192, 256, 3), (256, 192, 3)}


def nearest_neighbour_accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy on the second half of a vote of the 15 nearest objects in the first half."""
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    half = len(labels) // 2
    distances = np.square(features[half:, None] - features[None, :half]).sum(axis=2)
    votes = labels[:half][np.argsort(distances, axis=1)[:, :15]]
    guesses = [np.bincount(vote, minlength=len(CLASS_NAMES)).argmax() for vote in votes]
    return float(np.mean(np.array(guesses) == labels[half:]))


def histogram_accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy on the second half of naive Bayes over six-bin histograms of the first half."""
    half, classes = len(labels) // 2, len(CLASS_NAMES)
    scores = np.zeros((len(labels) - half, classes))
    for column in features.T:
        bins = np.digitize(column, np.quantile(column, np.linspace(0, 1, 7)[1:-1]))
        table = np.ones((classes, 6))
        np.add.at(table, (labels[:half], bins[:half]), 1)
        scores += np.log(table / table.sum(axis=1, keepdims=True))[:, bins[half:]].T
    return float(np.mean(scores.argmax(axis=1) == labels[half:]))


def test_only_the_outline_tells_the_class(scenes: list[Scene]) -> None:
    rows, fill = [], []
    for scene in scenes:
        height, width = scene.image.shape[:2]
        for index, (x1, y1, x2, y2) in enumerate(scene.boxes):
            colour = scene.image[scene.owner == index].mean(axis=0)
            rows.append([*colour, (x1 + x2) / width, (y1 + y2) / height, x2 - x1, y2 - y1, (x2 - x1) / (y2 - y1)])
            fill.append([scene.areas[index] / ((x2 - x1) * (y2 - y1))])
    features, labels = np.array(rows), np.concatenate([scene.labels for scene in scenes])
    chance = 1 / len(CLASS_NAMES)
    bound = chance + 4 * np.sqrt(chance * (1 - chance) / (len(labels) / 2))  # four standard errors: about 0.20
    for accuracy in (nearest_neighbour_accuracy, histogram_accuracy):
        assert accuracy(features, labels) < bound
        assert accuracy(np.array(fill), labels) > 0.35, "the baseline has no power"


def test_no_two_scenes_are_alike() -> None:
    pictures = [render_scene(scene_seed(0, split, i)).image for split in ("train", "val") for i in range(60)]
    thumbnails = [np.asarray(Image.fromarray(picture).resize((16, 16)), np.float32) for picture in pictures]
    for one, other in itertools.combinations(thumbnails, 2):
        assert np.abs(one - other).mean() > 8


def test_a_scene_follows_from_its_seed() -> None:
    one, again = (render_scene(scene_seed(3, "val", 5)) for _ in range(2))
    np.testing.assert_array_equal(one.image, again.image)
    np.testing.assert_array_equal(one.boxes, again.boxes)
    assert not np.array_equal(one.owner, render_scene(scene_seed(3, "train", 5)).owner)
    assert max(render_scene(0, size=96).image.shape) == 96


def test_the_files_are_valid_coco(small_set: Path) -> None:
    for split, count in (("train", 16), ("val", 8)):
        coco = json.loads((small_set / "annotations" / f"{split}.json").read_text())
        assert [category["name"] for category in coco["categories"]] == list(CLASS_NAMES)
        assert [category["id"] for category in coco["categories"]] == list(range(1, len(CLASS_NAMES) + 1))
        assert [image["file_name"] for image in coco["images"]] == [f"{split}_{i:06d}.jpg" for i in range(count)]
        for image in coco["images"]:
            with Image.open(small_set / "images" / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
                assert picture.format == "JPEG"
        images = {image["id"]: image for image in coco["images"]}
        assert len(images) == count
        assert len({entry["id"] for entry in coco["annotations"]}) == len(coco["annotations"]) > count
        for entry in coco["annotations"]:
            x, y, width, height = entry["bbox"]
            image = images[entry["image_id"]]
            assert x >= 0
            assert y >= 0
            assert x + width <= image["width"] + 0.01
            assert y + height <= image["height"] + 0.01
            assert 0 < entry["area"] <= width * height * 1.05
            assert entry["iscrowd"] == 0
    assert len(list((small_set / "images").iterdir())) == 24


def test_pycocotools_reads_it(small_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = pytest.importorskip("pycocotools.coco").COCO(str(small_set / "annotations" / "val.json"))
    capsys.readouterr()
    assert len(coco.getImgIds()) == 8
    assert len(coco.getCatIds()) == len(CLASS_NAMES)


def test_images_on_disk_show_the_scene(small_set: Path) -> None:
    scene = render_scene(scene_seed(0, "val", 3))
    with Image.open(small_set / "images" / "val_000003.jpg") as picture:
        stored = np.asarray(picture.convert("RGB"), np.float32)
    assert np.abs(stored - scene.image).mean() < 12  # swapped channels would be far off
    assert np.abs(stored[..., ::-1] - scene.image).mean() > 12


def test_same_seed_same_bytes(small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)  # a progress bar is welcome, not needed
    again = contents(ensure_shapes(tmp_path / "again", train=16, val=8))
    assert again == contents(small_set)
    other = contents(ensure_shapes(tmp_path / "other", train=16, val=8, seed=1))
    assert other.keys() == again.keys()
    assert all(other[name] != again[name] for name in again)


def test_a_larger_set_begins_with_the_smaller_one(small_set: Path, tmp_path: Path) -> None:
    larger = contents(ensure_shapes(tmp_path / "larger", train=18, val=8))
    smaller = contents(small_set)
    assert all(larger[name] == data for name, data in smaller.items() if name.endswith(".jpg"))


def test_made_once_and_again_when_a_parameter_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "deep" / "shapes"
    assert ensure_shapes(root, train=3, val=2) == root
    monkeypatch.setattr(shapes, "generate", pytest.fail)
    assert ensure_shapes(root, train=3, val=2) == root
    monkeypatch.undo()
    ensure_shapes(root, train=4, val=2)
    assert len(list((root / "images").iterdir())) == 6
    before = (root / shapes.STAMP).read_bytes()
    monkeypatch.setattr(shapes, "VERSION", shapes.VERSION + 1)
    ensure_shapes(root, train=4, val=2)
    assert (root / shapes.STAMP).read_bytes() != before
    assert [path.name for path in root.parent.iterdir()] == ["shapes"], "something was left behind"


def test_an_interrupted_run_leaves_the_old_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = ensure_shapes(tmp_path / "shapes", train=3, val=2)
    before = contents(root)

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "jpeg", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ensure_shapes(root, train=5, val=2)
    assert contents(root) == before
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


@pytest.mark.parametrize("stale", [False, True])
def test_ranks_that_start_at_once(tmp_path: Path, stale: bool) -> None:
    root = tmp_path / "shapes"
    if stale:
        ensure_shapes(root, train=1, val=1)
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda _: ensure_shapes(root, train=4, val=2, size=64), range(6)))
    assert made == [root] * 6
    assert contents(root) == contents(ensure_shapes(tmp_path / "alone", train=4, val=2, size=64))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "shapes"]


def test_a_folder_that_another_rank_moves_away_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, listdir = tmp_path / "shapes", os.listdir
    root.mkdir()

    def moved(path: Path) -> list[str]:
        if Path(path) == root and root.exists():
            root.rmdir()
        return listdir(path)

    monkeypatch.setattr(os, "listdir", moved)
    ensure_shapes(root, train=1, val=1, size=64)
    assert (root / shapes.STAMP).is_file()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"mine exists and is not .* data\.root"):
        ensure_shapes(tmp_path / "mine", train=2, val=1)
    assert contents(tmp_path / "mine") == {"photo.jpg": b"precious"}
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(InputError, match="file exists and is not"):
        ensure_shapes(tmp_path / "file", train=2, val=1)
    with pytest.raises(InputError, match=r"cannot write .*file.* data\.root"):
        ensure_shapes(tmp_path / "file" / "below", train=2, val=1)


def test_an_unwritable_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"cannot write .*shapes: Permission denied.*data\.root"):
        ensure_shapes(tmp_path / "shapes", train=2, val=1)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"train": 0}, {"val": 0}, {"size": 16}])
def test_impossible_parameters_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        ensure_shapes(tmp_path / "shapes", **wrong)
    assert not any(tmp_path.iterdir())
