"""Samples, the cache, batches; and that no two draws of any worker, epoch or rank are the same."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Subset

from detector.data import dataset as dataset_module
from detector.data.annotations import load_annotations
from detector.data.collate import collate, collate_eval
from detector.data.dataset import DetectionDataset, seed_worker
from detector.data.index import AnnotationIndex
from detector.data.preprocess import Preprocessing
from detector.data.transforms import AugmentOptions, TrainTransform, Transformed
from detector.errors import InputError

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def index(tiny_coco: Path) -> AnnotationIndex:
    return load_annotations(tiny_coco / "annotations" / "train.json", tiny_coco / "images")


def train_transform(seed: int = 0) -> TrainTransform:
    draws = AugmentOptions(vertical_flip=0.5, rotate90=0.5, scale=(0.5, 1.5), photometric=1.0, crop=0.5)
    return TrainTransform(Preprocessing(short_side=32, long_side=48), draws, seed=seed)


def unchanged(short_side: int, long_side: int) -> TrainTransform:
    """The resize alone."""
    preprocessing = Preprocessing(short_side=short_side, long_side=long_side)
    return TrainTransform(preprocessing, AugmentOptions(flip=0.0), seed=0)


def test_sample(index: AnnotationIndex) -> None:
    data = DetectionDataset(index, unchanged(24, 100))
    assert len(data) == 4
    sample = data[0]
    assert sample["image"].shape == (24, 32, 3)
    assert sample["boxes"].tolist() == [[2, 3, 12, 8], [15.25, 10.125, 20.25, 16.125]]
    assert sample["labels"].tolist() == [0, 1]
    assert sample["original_size"].tolist() == [48, 64]
    assert sample["scale"].tolist() == [0.5, 0.5]
    assert sample["image_id"] == 10
    assert data[1]["crowd"].tolist() == [True, False]
    assert data[2]["boxes"].shape == (0, 4)
    assert [sample["image_id"] for sample in data] == [10, 7, 42, 99]  # type: ignore[attr-defined]
    with pytest.raises(IndexError):
        data[-1]


def test_cache_reads_each_file_once_and_changes_nothing(tiny_coco: Path, index: AnnotationIndex) -> None:
    plain = DetectionDataset(index, train_transform())
    cached = DetectionDataset(index, train_transform(), cache=True)
    expected = [plain[i % 4] for i in range(40)]
    for name in index.file_names:
        (tiny_coco / "images" / name).unlink()
    for i, theirs in enumerate(expected):
        ours = cached[i % 4]
        for key in ("image", "boxes", "labels", "crowd", "scale"):
            np.testing.assert_array_equal(ours[key], theirs[key])
    with pytest.raises(InputError, match=r"image id 10: .*a\.png: no such file"):
        plain[0]


def large_index(folder: Path, name: str, orientation: int, width: int, height: int) -> AnnotationIndex:
    """One image as people see it, smooth but for a white box at (300, 150, 900, 600)."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 100 / height, columns * 100 / width, (rows + columns) % 100], axis=2).astype(np.uint8)
    pixels[150:600, 300:900] = 255
    if orientation == 6:  # stored so that a turn by 90 degrees to the right gives what people see
        pixels = np.rot90(pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(pixels)).save(folder / name, exif=exif, quality=95)
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [300, 150, 600, 450]}
    images = [{"id": 1, "file_name": name, "width": width, "height": height}]
    content = {"images": images, "annotations": [box], "categories": [{"id": 1, "name": "box"}]}
    (folder / "a.json").write_text(json.dumps(content))
    return load_annotations(folder / "a.json", folder)


@pytest.mark.parametrize(("name", "orientation"), [("a.png", 1), ("a.jpg", 1), ("a.jpg", 6)])
@pytest.mark.parametrize(("width", "height"), [(1200, 904), (1201, 903)])  # a JPEG of the first comes at a quarter
@pytest.mark.parametrize("cache", [False, True])
def test_a_large_image_is_shrunk_first_and_its_box_with_it(
    tmp_path: Path, name: str, orientation: int, width: int, height: int, cache: bool
) -> None:
    index = large_index(tmp_path, name, orientation, width, height)
    sample = DetectionDataset(index, unchanged(150, 400), cache=cache)[0]
    assert sample["image"].shape == (150, round(width * 150 / height), 3)
    assert sample["original_size"].tolist() == [height, width]
    x, y = sample["image"].shape[1] / width, 150 / height
    np.testing.assert_allclose(sample["scale"], [x, y], rtol=1e-12)
    np.testing.assert_allclose(sample["boxes"], [[300 * x, 150 * y, 900 * x, 600 * y]], rtol=1e-5)
    white = (sample["image"] > 178).all(axis=2)  # half way to the brightest of the ground
    rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
    seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose(seen, sample["boxes"][0], atol=0.6)
    with Image.open(tmp_path / name) as image:
        exact = ImageOps.exif_transpose(image).resize(sample["image"].shape[1::-1], Image.Resampling.BOX)
    assert np.abs(sample["image"].astype(int) - np.asarray(exact)).mean() < 2


def test_the_cache_holds_shrunk_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = large_index(tmp_path, "a.jpg", 1, 1201, 903)
    draws = AugmentOptions(scale=(0.5, 2.0), crop=1.0)
    transform = TrainTransform(Preprocessing(short_side=30, long_side=100), draws, seed=0)
    assert transform.largest_size(903, 1201) == (200, 267)  # 30 x 40, times 2, over the 0.3 of a side that a crop keeps
    assert transform.largest_size(90, 120) == (90, 120)
    draws = AugmentOptions(scale=(0.5, 0.8), iou_crop=0.1, stretch=(0.25, 1.0), zoom_out=1.0, batch_scale=(0.64, 1.28))
    more = TrainTransform(Preprocessing(short_side=30, long_side=100), draws, seed=0)
    assert more.largest_size(903, 1201) == (
        256,
        341,
    )  # times 1.28, over 0.3; twice as high where stretch halves the width
    with caplog.at_level(logging.INFO):
        data = DetectionDataset(index, transform, cache=True)
    assert [image.shape for image, _ in data._kept] == [(200, 267, 3)]
    assert "1 of 1 images, 0 MiB" in caplog.text
    for _ in range(20):
        assert max(data[0]["image"].shape) <= 100


def test_a_jpeg_comes_at_a_fraction(tmp_path: Path) -> None:
    index = large_index(tmp_path, "a.jpg", 6, 1201, 903)
    assert [index.read(0, reduce).shape[:2] for reduce in (1, 2, 8)] == [(903, 1201), (452, 601), (113, 151)]
    assert large_index(tmp_path, "a.png", 1, 64, 48).read(0, reduce=2).shape[:2] == (48, 64)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_file_of_another_size_does_not_pass_for_a_reduced_one(tmp_path: Path, name: str) -> None:
    index = large_index(tmp_path, name, 1, 1200, 904)
    with Image.open(tmp_path / name) as image:
        image.resize((300, 226)).save(tmp_path / name)
    with pytest.raises(InputError, match=r"300 x 226 pixels, but a\.json says width 1200 and height 904"):
        DetectionDataset(index, unchanged(150, 400))[0]


def test_a_transform_cannot_spoil_the_cache(index: AnnotationIndex) -> None:
    class Careless(TrainTransform):
        def __call__(self, image: np.ndarray, *others: Any) -> Transformed:
            image[:] = 0
            return super().__call__(image, *others)

    data = DetectionDataset(
        index, Careless(Preprocessing(short_side=24, long_side=100), AugmentOptions(flip=0.0), seed=0), cache=True
    )
    with pytest.raises(ValueError, match="read-only"):
        data[0]


def test_cache_stops_at_its_bound(
    index: AnnotationIndex, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dataset_module, "CACHE_BYTES", (48 * 64 + 60 * 40) * 3)
    with caplog.at_level(logging.INFO):
        data = DetectionDataset(index, unchanged(60, 200), cache=True)
    assert "2 of 4 images" in caplog.text
    assert "decoded each time" in caplog.text
    assert [data[i]["image_id"] for i in range(4)] == [10, 7, 42, 99]


class Repeat:
    """One sample many times: images that differ were drawn differently."""

    def __init__(self, data: DetectionDataset) -> None:
        self.dataset = data

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.dataset[0]


def epochs(index: AnnotationIndex, workers: int, persistent: bool, seed: int = 0, rank: int = 0) -> list[bytes]:
    """The images of three epochs of eight samples, as a training run with this global seed draws them."""
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        loader: DataLoader[Any] = DataLoader(
            Repeat(DetectionDataset(index, train_transform(seed))),  # type: ignore[arg-type]
            batch_size=2,
            shuffle=True,
            num_workers=workers,
            persistent_workers=persistent,
            worker_init_fn=seed_worker,
            collate_fn=list,
            multiprocessing_context="fork" if workers else None,
        )
        return [sample["image"].tobytes() for _ in range(3) for batch in loader for sample in batch]


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_draws_are_distinct_and_reproducible(index: AnnotationIndex, workers: int, persistent: bool) -> None:
    drawn = epochs(index, workers, persistent)
    assert len(drawn) == 24
    assert len(set(drawn)) == 24
    assert epochs(index, workers, persistent) == drawn
    others = epochs(index, workers, persistent, rank=1) + epochs(index, workers, persistent, seed=1)
    assert len({*drawn, *others}) == 72


def test_seed_worker_finds_the_data_set_in_a_subset(index: AnnotationIndex) -> None:
    data = DetectionDataset(index, train_transform())
    loader: DataLoader[Any] = DataLoader(
        Subset(data, [0, 0, 0, 0]),
        num_workers=2,
        worker_init_fn=seed_worker,
        collate_fn=collate,
        multiprocessing_context="fork",
    )
    assert len({batch.images.numpy().tobytes() for batch in loader}) == 4


@pytest.mark.parametrize("cache", [False, True])
def test_a_mosaic_has_objects_of_other_images(index: AnnotationIndex, cache: bool) -> None:
    preprocessing = Preprocessing(short_side=48, long_side=64)
    transform = TrainTransform(preprocessing, AugmentOptions(mosaic=1.0, mosaic_scale=(1.0, 1.0)), seed=0)
    data = DetectionDataset(index, transform, cache=cache)
    samples = [data[2, 0.5, epoch] for epoch in range(30)]  # itself without objects
    assert {sample["image"].shape for sample in samples} == {(24, 24, 3)}
    assert {int(label) for sample in samples for label in sample["labels"]} == {0, 1, 2}
    assert {sample["image_id"] for sample in samples} == {42}


def test_collate_pads_images_and_objects(index: AnnotationIndex) -> None:
    data = DetectionDataset(index, unchanged(40, 80))
    batch = collate([data[i] for i in range(4)])
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (4, 3, 64, 96)
    assert batch.image_sizes.tolist() == [[40, 53], [60, 40], [40, 40], [40, 80]]
    assert batch.boxes.shape == (4, 2, 4)
    assert batch.labels.tolist() == [[0, 1], [2, 0], [-1, -1], [1, -1]]
    assert batch.crowd.tolist() == [[False, False], [True, False], [False, False], [False, False]]
    assert batch.boxes[3].tolist() == [[10, 5, 40, 25], [0, 0, 0, 0]]
    assert batch.scales.dtype == torch.float64
    assert batch.original_sizes.tolist() == [[48, 64], [60, 40], [50, 50], [40, 80]]
    assert batch.image_ids == (10, 7, 42, 99)
    picture = data[1]["image"]
    np.testing.assert_array_equal(batch.images[1, :, :60, :40].permute(1, 2, 0), picture)
    assert batch.images[1, :, 60:].unique().tolist() == [104, 116, 124]


def test_a_batch_without_objects_keeps_one_place(index: AnnotationIndex) -> None:
    batch = collate([DetectionDataset(index, unchanged(40, 80))[2]])
    assert batch.boxes.shape == (1, 1, 4)
    assert batch.labels.tolist() == [[-1]]
    assert batch.crowd.tolist() == [[False]]


def test_evaluation_batches_do_not_depend_on_batch_mates(index: AnnotationIndex) -> None:
    preprocessing = Preprocessing(short_side=32, long_side=64)
    data = DetectionDataset(index, transform=None)
    samples = [data[i] for i in (0, 1, 2, 3, 0)]
    batch = collate_eval(samples, preprocessing)
    assert batch.image_ids == (10, 7, 42, 99, 10)
    assert [prepared.places.tolist() for prepared in batch.prepared] == [[0, 3, 4], [1], [2]]
    for prepared in batch.prepared:
        for image, place in zip(prepared.images, prepared.places, strict=True):
            (alone,) = collate_eval([samples[place]], preprocessing).prepared
            assert np.array_equal(image, alone.images[0])


def test_the_way_from_a_worker_leaves_memory_as_it_is(index: AnnotationIndex) -> None:
    batch = collate_eval([DetectionDataset(index, transform=None)[0]], Preprocessing(short_side=32, long_side=64))
    (before,), (after,) = batch.prepared, pickle.loads(pickle.dumps(batch)).prepared
    assert after.images.strides == before.images.strides
    assert np.array_equal(after.images, before.images)
