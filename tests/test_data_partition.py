"""A split that nobody made: its shares, its groups, that it is the same everywhere."""

from __future__ import annotations

import errno
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detector.apps.prepare_data import PrepareDataOptions, prepare_data
from detector.data.partition import stratify
from detector.data.splits import DataOptions, load_split, load_splits
from detector.errors import InputError


@pytest.mark.parametrize("seed", range(5))
def test_each_class_has_its_share(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rates = np.array([0.5, 0.2, 0.05, 0.02])
    present = rng.random((600, 4)) < rates
    present[~present.any(axis=1), 0] = True
    groups = np.arange(600)
    groups[100:160] = np.repeat(np.arange(600, 620), 3)
    validates = stratify(present, groups, 0.2, seed)
    for group in range(600, 620):
        assert len(set(validates[groups == group].tolist())) == 1
    got = present[validates].sum(axis=0)
    assert np.abs(got - 0.2 * present.sum(axis=0)).max() <= 2.0
    assert abs(validates.sum() - 120) <= 3
    # A draw that looks at no class misses by more, on average over its draws.
    np.testing.assert_array_equal(validates, stratify(present, groups, 0.2, seed))
    assert (validates != stratify(present, groups, 0.2, seed + 1)).any()


def test_a_class_on_one_image_is_trained_on() -> None:
    present = np.ones((10, 2), bool)
    present[1:, 1] = False
    assert not any(stratify(present, np.arange(10), 0.2, seed)[0] for seed in range(20))


@pytest.fixture
def unsplit(tmp_path: Path) -> Path:
    """40 images of noise in COCO's layout, without a split; 5 more are nearly the first ones."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    noise = [rng.integers(0, 256, (6, 8, 3), np.uint8) for _ in range(40)]
    images = [Image.fromarray(one).resize((64, 48)) for one in noise]
    for i, image in enumerate([*images, *images[:5]]):
        image.point(lambda value, dark=i >= 40: value - 3 * dark).save(tmp_path / "images" / f"{i}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(45)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": i % 3, "bbox": [1, 2, 30, 40]} for i in range(45) if i % 9
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(3)],
    }
    (tmp_path / "annotations/all.json").write_text(json.dumps(content))
    return tmp_path


def test_a_folder_without_a_split(unsplit: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = DataOptions(root=str(unsplit), val_share=0.25)
    with caplog.at_level("INFO"):
        splits = load_splits(options)
    assert any("has no split: val=0.25 is drawn by class, seed 0" in message for message in caplog.messages)
    ids = {name: set(index.image_ids) for name, index in splits.items()}
    assert ids["train"] | ids["val"] == set(range(45))
    assert not ids["train"] & ids["val"]
    assert all((i in ids["val"]) == (i + 40 in ids["val"]) for i in range(5))
    assert abs(len(ids["val"]) - 11) <= 1
    per_class = Counter(splits["val"].labels.tolist())
    assert all(2 <= per_class[label] <= 5 for label in range(3))
    assert load_split(options, "val").image_ids == splits["val"].image_ids  # alone as together
    assert load_split(options, "train").image_ids == splits["train"].image_ids


def test_it_is_the_split_that_the_command_writes(unsplit: Path) -> None:
    drawn = {name: index.image_ids for name, index in load_splits(DataOptions(root=str(unsplit))).items()}
    before = {path: path.read_bytes() for path in unsplit.rglob("*") if path.is_file()}
    prepare_data(PrepareDataOptions(what="split", source=str(unsplit)))
    assert (unsplit / "val.txt").read_text().startswith("./images/")
    assert all(path.read_bytes() == content for path, content in before.items())
    # From now on the lists count, whatever the seed.
    written = load_splits(DataOptions(root=str(unsplit), split_seed=5))
    assert {name: index.image_ids for name, index in written.items()} == drawn
    with pytest.raises(InputError, match=r"train.txt exists already"):
        prepare_data(PrepareDataOptions(what="split", source=str(unsplit)))
    with (unsplit / "val.txt").open("a") as file:
        file.write("images/nowhere.png\n")
    with pytest.raises(InputError, match=r"val.txt:\d+: 'images/nowhere.png' is no image"):
        load_split(DataOptions(root=str(unsplit)), "val")


def test_what_cannot_be_split(unsplit: Path, tiny_coco: Path) -> None:
    with pytest.raises(InputError, match=r"too few to draw one with a share of 0.* \(data\.val_share, or val\)"):
        load_splits(DataOptions(root=str(unsplit), val_share=0.0))
    with pytest.raises(InputError, match="has a split for training and validation already"):
        prepare_data(PrepareDataOptions(what="split", source=str(tiny_coco)))
    with pytest.raises(InputError, match="no such folder"):
        prepare_data(PrepareDataOptions(what="split", source=str(unsplit / "nowhere")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSON"),
        ("", "JSON"),
        ("[]", "JSON|object"),
        ('{"images": [], "annotations": []}', "images"),
    ],
)
def test_a_file_without_images_is_named(unsplit: Path, content: str, message: str) -> None:
    (unsplit / "annotations/all.json").write_text(content)
    with pytest.raises(InputError, match=rf"all\.json.*({message})"):
        load_splits(DataOptions(root=str(unsplit)))
    with pytest.raises(InputError, match=r"all\.json"):
        prepare_data(PrepareDataOptions(what="split", source=str(unsplit)))


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_list_that_is_empty_or_names_an_image_twice(unsplit: Path, name: str) -> None:
    prepare_data(PrepareDataOptions(what="split", source=str(unsplit)))
    path = unsplit / f"{name}.txt"
    lines = path.read_text()
    path.write_text("\n \n")
    with pytest.raises(InputError, match=rf"{name}\.txt: this list of images is empty"):
        load_splits(DataOptions(root=str(unsplit)))
    path.write_text(lines + lines.splitlines()[0] + "\n")
    with pytest.raises(InputError, match=rf"{name}\.txt:\d+: .* is listed before"):
        load_splits(DataOptions(root=str(unsplit)))


def test_a_split_that_cannot_be_written_is_not_written_in_half(unsplit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_text

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        if ".val." in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        prepare_data(PrepareDataOptions(what="split", source=str(unsplit)))
    assert not list(unsplit.glob("*.txt"))
    assert not list(unsplit.glob(".*"))
