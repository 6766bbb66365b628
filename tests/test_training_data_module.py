"""Who gets which image: every one exactly once in evaluation, another order each epoch in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from classified_data import write_classified_data
from torch import Tensor
from torch.utils.data import DistributedSampler

from detector.data.annotations import load_annotations, read_annotations
from detector.data.dataset import DetectionDataset
from detector.data.image_folder import ImageFolder, PretrainAugment, PretrainInput, eval_view, train_view
from detector.data.index import AnnotationIndex
from detector.data.preprocess import Preprocessing
from detector.data.transforms import AugmentOptions, TrainTransform
from detector.errors import InputError
from detector.training.data_module import ClassificationData, DetectionData, ShapeSampler, by_canvas, share
from detector.training.run_options import RunOptions

PREPROCESSING = Preprocessing(short_side=64, long_side=96)


def index_of(sizes: list[tuple[int, int]]) -> AnnotationIndex:
    """Images of these heights and widths without objects, and without files."""
    images = [{"id": i, "height": height or None, "width": width or None} for i, (height, width) in enumerate(sizes)]
    return read_annotations({"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]})


def module(root: Path, batch_scale: tuple[float, float] = (1.0, 1.0), **changes: Any) -> DetectionData:
    index = load_annotations(root / "annotations/train.json", root / "images")
    transform = TrainTransform(PREPROCESSING, AugmentOptions(flip=0, batch_scale=batch_scale), seed=0)
    options = RunOptions.parse(
        {"train": {"batch_size": 2}, "val": {"batch_size": 3}, "workers": 0, "seed": 5} | changes
    )
    return DetectionData(index, PREPROCESSING, options, train=index, transform=transform)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_image_exactly_once_over_all_ranks(world: int, count: int, batch_size: int) -> None:
    rng = np.random.default_rng(count)
    index = index_of([(int(h), int(w)) for h, w in rng.integers(30, 200, (count, 2))])
    order = by_canvas(index, PREPROCESSING)
    shares = [share(order, batch_size, rank, world) for rank in range(world)]
    assert sorted(i for batches in shares for batch in batches for i in batch) == list(range(count))
    # No rank is without a batch: Lightning would skip the hook in which the others wait for it.
    assert all(batches == [[]] or all(1 <= len(batch) <= batch_size for batch in batches) for batches in shares)
    loads = [sum(map(len, batches)) for batches in shares]
    assert max(loads) - min(loads) <= 1


def test_torchs_sampler_repeats_images_where_ours_does_not() -> None:
    theirs = [i for rank in range(4) for i in DistributedSampler(range(6), 4, rank, shuffle=False)]
    assert sorted(theirs) == [0, 0, 1, 1, 2, 3, 4, 5]
    index = index_of([(64, 64)] * 6)
    order = by_canvas(index, PREPROCESSING)
    ours = [i for rank in range(4) for batch in share(order, 2, rank, 4) for i in batch]
    assert sorted(ours) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("world", [1, 2])
def test_training_batches_are_of_one_shape_but_for_the_last(world: int) -> None:
    sizes = [(64, 96) if i % 3 else (96, 64) for i in range(64)]
    samples = DetectionDataset(index_of(sizes), transform=None)
    for rank in range(world):
        theirs = DistributedSampler(samples, world, rank, seed=3)
        ours = ShapeSampler(samples, world, rank, seed=3, batch_size=6)
        for sampler in (theirs, ours):
            sampler.set_epoch(5)
        order = list(ours)
        whole = list(theirs)[: 64 // world // 6 * 6]
        assert order != whole
        assert sorted(order) == sorted(whole)
        shapes = [{sizes[i] for i in order[start : start + 6]} for start in range(0, len(order), 6)]
        assert not any(len(shape) > 1 for shape in shapes[:-1])
        assert {(64, 96)} in shapes
        assert {(96, 64)} in shapes


def test_images_of_one_shape_come_in_torchs_order() -> None:
    samples = DetectionDataset(index_of([(64, 96)] * 10), transform=None)
    whole = list(DistributedSampler(samples, 1, 0, seed=3))[:8]
    assert list(ShapeSampler(samples, 1, 0, seed=3, batch_size=4)) == whole


@pytest.mark.parametrize(("landscape", "upright", "batch_size"), [(290, 10, 16), (97, 2, 4), (3, 2, 8)])
def test_a_rare_shape_is_trained_on_like_another(landscape: int, upright: int, batch_size: int, tmp_path: Path) -> None:
    """Of each epoch what is more than whole batches is left out by chance, whatever its shape."""
    index = index_of([(64, 96)] * landscape + [(96, 64)] * upright)
    options = RunOptions.parse({"train": {"batch_size": batch_size}, "workers": 0})
    transform = TrainTransform(PREPROCESSING, AugmentOptions(), seed=0)
    loader = DetectionData(index, PREPROCESSING, options, train=index, transform=transform).train_dataloader()
    seen = np.zeros(len(index))
    batches, epochs = len(loader), 100
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        order = [i for i, *_ in loader.sampler]
        assert len(order) >= batches * min(batch_size, len(index))
        seen[order[: batches * min(batch_size, len(index))]] += 1
    kept = batches * min(batch_size, len(index)) / len(index)
    assert seen[landscape:].mean() == pytest.approx(epochs * kept, abs=4)
    assert seen.min() > 0


def test_images_of_one_canvas_lie_side_by_side() -> None:
    index = index_of([(64, 64), (64, 96), (64, 64), (0, 0), (64, 96), (640, 640), (96, 64)])
    batches = share(by_canvas(index, PREPROCESSING), 3, 0, 1)
    assert batches == [[3, 0, 2], [5, 1, 4], [6]]  # unknown size; 64 x 64; 64 x 96; 96 x 64


def test_a_rank_without_images_gets_an_empty_batch(tiny_coco: Path) -> None:
    data = module(tiny_coco)
    data.trainer = SimpleNamespace(world_size=6, global_rank=5)  # type: ignore[assignment]
    assert [len(batch) for batch in data.val_dataloader()] == [0]


def test_validation_batches_have_one_canvas_each(tiny_coco: Path) -> None:
    batches = list(module(tiny_coco).val_dataloader())
    assert sorted(image_id for batch in batches for image_id in batch.image_ids) == [7, 10, 42, 99]
    for prepared in [prepared for batch in batches for prepared in batch.prepared]:
        canvases = {tuple(-(-size // 32) * 32 for size in sizes) for sizes in prepared.image_sizes.tolist()}
        assert canvases == {prepared.images.shape[2:]}


def order(data: DetectionData, epoch: int) -> list[int]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [image_id for batch in loader for image_id in batch.image_ids]


def test_training_order_depends_on_epoch_and_seed_alone(tiny_coco: Path) -> None:
    """So that a resumed run shows the images that the epoch would have had."""
    first = [order(module(tiny_coco), epoch) for epoch in range(6)]
    torch.manual_seed(99)
    assert [order(module(tiny_coco), epoch) for epoch in range(6)] == first
    assert all(sorted(ids) == [7, 10, 42, 99] for ids in first)
    assert len(set(map(tuple, first))) > 2
    assert [order(module(tiny_coco, seed=6), epoch) for epoch in range(6)] != first


@pytest.mark.parametrize("workers", [1, 2])
def test_images_are_drawn_from_seed_and_epoch_alone(tiny_coco: Path, workers: int) -> None:
    """Whatever process draws them, and whatever came before: a resumed run takes the steps it would have taken."""

    def pixels(data: DetectionData, epochs: Sequence[int]) -> list[Tensor]:
        loader, seen = data.train_dataloader(), []
        for epoch in epochs:
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            seen = [batch.images for batch in loader]
        return seen

    def fresh(**changes: Any) -> DetectionData:
        data = module(tiny_coco, batch_scale=(0.5, 1.5), **changes)
        data.train_split.transform = TrainTransform(  # type: ignore[union-attr]
            PREPROCESSING, AugmentOptions(photometric=1, scale=(0.5, 1.5), iou_crop=0.5, mosaic=0.5), seed=0
        )
        return data

    whole, resumed = pixels(fresh(), range(4)), pixels(fresh(workers=workers), [3])
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))
    assert not all(one.shape == other.shape for one, other in zip(whole, pixels(fresh(), [2]), strict=True))


def test_ranks_share_an_epoch(tiny_coco: Path) -> None:
    seen = []
    for rank in range(2):
        data = module(tiny_coco)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)  # type: ignore[assignment]
        seen.append(order(data, 3))
    assert sorted(seen[0] + seen[1]) == [7, 10, 42, 99]


def test_more_images_a_step_than_there_are(tiny_coco: Path) -> None:
    data = module(tiny_coco, train={"batch_size": 64})
    assert data.train_batch_size == 4
    assert [len(batch) for batch in data.train_dataloader()] == [4]
    data.trainer = SimpleNamespace(world_size=2, global_rank=0)  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"4 images, fewer than .* lower train\.batch_size"):
        data.train_dataloader()


def sizes(data: DetectionData, epoch: int) -> list[float]:
    """The size factor of each batch, which all its images must have."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    factors = []
    for batch in loader:
        targets = [PREPROCESSING.target_size(*size) for size in batch.original_sizes.tolist()]
        ratios = batch.image_sizes.numpy() / targets
        factors.append(round(float(ratios.mean()) * 3) / 3)  # of 96 pixels, 32 are a third
        np.testing.assert_allclose(batch.image_sizes, np.array(targets) * factors[-1], atol=1)
    return factors


def test_all_images_of_a_batch_have_one_size_factor(tiny_coco: Path) -> None:
    """Drawn from seed and epoch, as the order is: the same on all ranks, any number of loaders, and after resume."""
    data = module(tiny_coco, (0.5, 2.0))
    seen = [sizes(data, epoch) for epoch in range(12)]
    assert {factor for factors in seen for factor in factors} == {2 / 3, 1, 4 / 3, 5 / 3, 2}
    assert any(first != second for first, second in seen)
    assert [sizes(module(tiny_coco, (0.5, 2.0)), epoch) for epoch in (7, 3)] == [seen[7], seen[3]]
    assert sizes(module(tiny_coco, (0.5, 2.0), workers=1), 3) == seen[3]
    assert [sizes(module(tiny_coco, (0.5, 2.0), seed=6), epoch) for epoch in range(12)] != seen
    assert sizes(module(tiny_coco), 3) == [1, 1]
    for rank in range(2):
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)  # type: ignore[assignment]
        assert sizes(data, 3) == seen[3][:1]


def classified(root: Path, rank: int = 0, world: int = 1, **changes: Any) -> ClassificationData:
    augment = PretrainAugment(scale=(0.5, 1), flip=0.5, colour=0.0)
    train = ImageFolder(root / "train", train_view(32, augment), seed=5)
    val = ImageFolder(root / "val", eval_view(PretrainInput(size=32, resize=32)))
    values = {"train": {"batch_size": 4}, "val": {"batch_size": 5}, "workers": 0, "seed": 5}
    data = ClassificationData(train, val, RunOptions.parse(values | changes))
    data.trainer = SimpleNamespace(world_size=world, global_rank=rank)  # type: ignore[assignment]
    return data


@pytest.mark.parametrize("world", [1, 2, 5])
def test_each_classified_image_is_scored_once_over_all_ranks(tmp_path: Path, world: int) -> None:
    root = write_classified_data(tmp_path, val=0)  # none, one and two images: more ranks than images
    (root / "val/ant/0.png").write_bytes((root / "val/bee/0.png").read_bytes())
    ranks = [list(classified(root, rank, world).val_dataloader()) for rank in range(world)]
    paths = [path for batches in ranks for batch in batches for path in batch.paths]
    assert sorted(paths) == sorted(map(str, (root / "val").rglob("*.png")))
    assert all(batches for batches in ranks)  # a rank without images has an empty batch


def views(data: ClassificationData, epoch: int) -> tuple[list[str], torch.Tensor]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    return [path for batch in batches for path in batch.paths], torch.cat([batch.images for batch in batches])


def test_classified_images_and_their_views_depend_on_epoch_and_seed_alone(tmp_path: Path) -> None:
    root = write_classified_data(tmp_path)
    paths, images = views(classified(root), 3)
    assert sorted(paths) == sorted(map(str, (root / "train").rglob("*.png")))
    torch.manual_seed(99)
    data = classified(root, workers=2)
    views(data, 2)  # what came before does not matter
    again, same = views(data, 3)
    assert again == paths
    assert torch.equal(same, images)
    assert views(data, 4)[0] != paths
    # Two ranks see the same views as one, each its half.
    halves = [views(classified(root, rank, 2, train={"batch_size": 2}), 3) for rank in range(2)]
    seen = {path: image for half in halves for path, image in zip(*half, strict=True)}
    assert all(torch.equal(seen[path], image) for path, image in zip(paths, images, strict=True))


def test_too_few_classified_images(tmp_path: Path) -> None:
    data = classified(write_classified_data(tmp_path, train=1), world=2, train={"batch_size": 64})
    with pytest.raises(InputError, match=r"has 3 images, fewer than one batch on each of 2 devices \(3 x 2\)"):
        data.train_dataloader()
