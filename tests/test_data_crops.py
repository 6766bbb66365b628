"""The embedded crops: the right piece of the right scene under the right class name, made once."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from detector.data import crops, shapes
from detector.data.crops import CLASSES, CONTEXT, NOTHING, STAMP, Window, ensure_crops, windows
from detector.data.scenes import CLASS_NAMES, Scene, render_scene
from detector.data.shapes import ensure_shapes, scene_seed
from detector.errors import InputError


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Scene, list[Window]]]:
    drawn = [render_scene(scene_seed(1, "train", index)) for index in range(80)]
    return [(scene, list(windows(scene, np.random.SeedSequence(index)))) for index, scene in enumerate(drawn)]


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_crops(tmp_path_factory.mktemp("data") / "crops", train=6, val=3)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_window_holds_its_object_whole_and_lies_in_the_image(scenes: list[tuple[Scene, list[Window]]]) -> None:
    centred = 0
    for scene, found in scenes:
        height, width = scene.image.shape[:2]
        objects = [window for window in found if window.name != NOTHING]
        assert [window.name for window in objects] == [CLASS_NAMES[label] for label in scene.labels]
        for (_, x, y, side), (x1, y1, x2, y2) in zip(objects, scene.boxes, strict=True):
            assert 0 <= x <= width - side
            assert 0 <= y <= height - side
            assert x <= x1 + 1
            assert y <= y1 + 1
            assert x2 <= x + side + 1
            assert y2 <= y + side + 1
            longest = max(x2 - x1, y2 - y1)
            assert side == pytest.approx(min(CONTEXT * longest, height, width), abs=0.5)
            if 0 < x < width - side and 0 < y < height - side:  # nothing pushed it
                np.testing.assert_allclose([x + side / 2, y + side / 2], [(x1 + x2) / 2, (y1 + y2) / 2], atol=0.6)
                centred += 1
    assert centred > 100


def test_windows_of_nothing_show_no_object(scenes: list[tuple[Scene, list[Window]]]) -> None:
    empty = [(scene, window) for scene, found in scenes for window in found if window.name == NOTHING]
    assert len(empty) > 0.5 * len(scenes)
    for scene, (_, x, y, side) in empty:
        assert {int(owner) for owner in scene.owner[y : y + side, x : x + side].ravel()} == {-1}
        for x1, y1, x2, y2 in scene.boxes:  # no more than a covered corner of a box
            inside = max(0, min(x2, x + side) - max(x1, x)) * max(0, min(y2, y + side) - max(y1, y))
            assert inside < 0.75 * (x2 - x1) * (y2 - y1)
    assert max(window.side for _, window in empty) > 60


def test_files_are_what_the_scenes_hold(small_set: Path) -> None:
    for split, count in (("train", 6), ("val", 3)):
        drawn = Counter(
            CLASS_NAMES[label] for index in range(count) for label in render_scene(scene_seed(1, split, index)).labels
        )
        stored = {name: len(list((small_set / split / name).iterdir())) for name in CLASSES}
        assert 0 < stored.pop(NOTHING) <= count
        assert stored == {name: drawn[name] for name in CLASS_NAMES}
        assert sum(stored.values()) > 3 * count


def test_a_file_shows_its_object(small_set: Path) -> None:
    """Against Pillow's crop and resize of the scene; the JPEG costs a little."""
    differences, swapped = [], []
    for index in range(6):
        scene = render_scene(scene_seed(1, "train", index))
        for number, (box, label) in enumerate(zip(scene.boxes, scene.labels, strict=True)):
            file = small_set / "train" / CLASS_NAMES[label] / f"{index:06d}_{number}.jpg"
            with Image.open(file) as picture:
                assert picture.format == "JPEG"
                assert picture.size == (64, 64)
                stored = np.asarray(picture, np.float32)
            side = min(round(1.3 * max(box[2] - box[0], box[3] - box[1])), *scene.image.shape[:2])
            left, top = (
                int(np.clip(round((box[i] + box[i + 2] - side) / 2), 0, scene.image.shape[1 - i] - side))
                for i in (0, 1)
            )
            whole = Image.fromarray(scene.image).crop((left, top, left + side, top + side))
            expected = np.asarray(whole.resize((64, 64), Image.Resampling.BILINEAR), np.float32)
            differences.append(np.abs(stored - expected).mean())
            swapped.append(np.abs(stored[..., ::-1] - expected).mean())
    assert np.mean(differences) < 8
    assert np.mean(swapped) > 20


def test_torchvision_reads_it(small_set: Path) -> None:
    train, val = (torchvision.datasets.ImageFolder(str(small_set / s), allow_empty=True) for s in ("train", "val"))
    assert train.classes == val.classes == sorted(CLASSES)


def test_no_scene_is_shared(tmp_path: Path, small_set: Path) -> None:
    assert json.loads((small_set / STAMP).read_text())["seed"] not in (0, None)  # 0: the detection data set
    other = contents(ensure_crops(tmp_path / "crops", train=6, val=3, seed=0))
    ours = contents(small_set)
    pictures = [data for name, data in ours.items() if name.endswith(".jpg")]
    assert len({*pictures}) == len(pictures)
    assert not {*pictures} & {*other.values()}


def test_same_seed_same_bytes_even_when_made_at_once(tmp_path: Path, small_set: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: ensure_crops(tmp_path / "crops", train=6, val=3), range(3)))
    assert made == [tmp_path / "crops"] * 3
    assert contents(tmp_path / "crops") == contents(small_set)
    assert [path.name for path in tmp_path.iterdir()] == ["crops"]


def test_made_once_and_again_when_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "deep" / "crops"
    assert ensure_crops(root, train=1, val=1, size=32) == root
    before = contents(root)
    monkeypatch.setattr(crops, "generate", pytest.fail)
    ensure_crops(root, train=1, val=1, size=32)
    monkeypatch.undo()
    for module in (crops, shapes):  # what is cut out, and what is drawn
        monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
        ensure_crops(root, train=1, val=1, size=32)
        assert contents(root)[STAMP] != before[STAMP]
        before = contents(root)
    assert [path.name for path in root.parent.iterdir()] == ["crops"]


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    ensure_shapes(tmp_path / "shapes", train=1, val=1, size=64)
    before = contents(tmp_path / "shapes")
    with pytest.raises(InputError, match=r"shapes exists and is not an embedded crops data set"):
        ensure_crops(tmp_path / "shapes", train=1, val=1)
    assert contents(tmp_path / "shapes") == before


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"train": 0}, {"val": 0}, {"size": 16}])
def test_impossible_parameters_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        ensure_crops(tmp_path / "crops", **wrong)
    assert not any(tmp_path.iterdir())
