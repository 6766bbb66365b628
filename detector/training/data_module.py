"""Loaders for training and for exact evaluation on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from detector.data.annotations import AnnotationIndex
from detector.data.collate import collate, collate_eval
from detector.data.dataset import DetectionDataset, seed_worker
from detector.data.image_folder import ImageFolder, collate_images
from detector.data.preprocess import Preprocessing, canvas_size
from detector.data.transforms import TrainTransform
from detector.errors import InputError


def share(order: Sequence[int], batch_size: int, rank: int, world: int) -> list[list[int]]:
    """This rank's batches of the images, each image exactly once over all ranks.

    Lightning's and torch's distributed samplers pad the last round with repeated images, which changes the metrics;
    this does not. A rank without images gets one empty batch, because Lightning skips the end-of-epoch hook, and with
    it the gathering that the other ranks wait for, on a rank without batches.
    """
    own = order[rank::world]
    return [list(own[i : i + batch_size]) for i in range(0, len(own), batch_size)] or [[]]


class EvaluationBatches(Sampler[list[int]]):
    """This rank's share of the images, each exactly once over all ranks, images of one canvas side by side."""

    def __init__(
        self, index: AnnotationIndex, preprocessing: Preprocessing, batch_size: int, rank: int, world: int
    ) -> None:
        canvases = [
            canvas_size([preprocessing.target_size(*size)]) if min(size) > 0 else (0, 0)
            for size in np.asarray(index.sizes).tolist()
        ]
        self.batches = share(sorted(range(len(index)), key=lambda i: canvases[i]), batch_size, rank, world)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class DetectionData(lightning.LightningDataModule):
    """Training and validation split of one data set.

    Args:
        train, val: indices; train is None for evaluation alone.
        preprocessing: of the detector.
        transform: random changes of training images.
        train_batch_size, val_batch_size: images per step and device.
        workers: loader processes per device; 0 loads in the training process.
        cache: keep decoded training images in memory.
        seed: of the order of the training images.
    """

    def __init__(
        self,
        *,
        val: AnnotationIndex,
        preprocessing: Preprocessing,
        val_batch_size: int,
        workers: int,
        train: AnnotationIndex | None = None,
        transform: TrainTransform | None = None,
        train_batch_size: int = 1,
        cache: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.train_index, self.val_index = train, val
        self.preprocessing, self.transform = preprocessing, transform
        self.train_batch_size, self.val_batch_size = train_batch_size, val_batch_size
        self.workers, self.cache, self.seed = workers, cache, seed
        if train is not None and len(train) < train_batch_size:
            self.train_batch_size = len(train)

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.train_index is not None
        assert self.transform is not None
        dataset = DetectionDataset(self.train_index, self.transform, cache=self.cache)
        world, rank = _world(self)
        check_enough(len(dataset), self.train_batch_size, world)
        # Padding by repetition is harmless in training. Another order each epoch (Lightning calls set_epoch), and the
        # one that epoch would have had where a run is resumed: so also for one process.
        sampler: Sampler[int] = DistributedSampler(dataset, world, rank, shuffle=True, seed=self.seed)
        return self._loader(
            dataset, batch_size=self.train_batch_size, sampler=sampler, drop_last=True, collate_fn=collate
        )

    def val_dataloader(self) -> DataLoader[Any]:
        world, rank = _world(self)
        batches = EvaluationBatches(self.val_index, self.preprocessing, self.val_batch_size, rank, world)
        dataset = DetectionDataset(self.val_index, transform=None)
        collate_fn = partial(collate_eval, preprocessing=self.preprocessing)
        return self._loader(dataset, batch_sampler=batches, collate_fn=collate_fn)

    def _loader(self, dataset: DetectionDataset, **arguments: Any) -> DataLoader[Any]:
        return loader(dataset, self.workers, _world(self)[0], worker_init_fn=seed_worker, **arguments)


class ClassificationData(lightning.LightningDataModule):
    """Training and validation split of an image classification data set.

    Args:
        train, val: the images, with their transforms.
        train_batch_size, val_batch_size: images per step and device.
        workers: loader processes per device; 0 loads in the training process.
        seed: of the order of the training images.
    """

    def __init__(
        self,
        *,
        train: ImageFolder,
        val: ImageFolder,
        train_batch_size: int,
        val_batch_size: int,
        workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.train_split, self.val_split = train, val
        self.train_batch_size, self.val_batch_size = min(train_batch_size, len(train)), val_batch_size
        self.workers, self.seed = workers, seed

    def train_dataloader(self) -> DataLoader[Any]:
        world, rank = _world(self)
        check_enough(len(self.train_split), self.train_batch_size, world)
        sampler = EpochSampler(self.train_split, world, rank, shuffle=True, seed=self.seed)
        arguments: Any = {"batch_size": self.train_batch_size, "sampler": sampler, "drop_last": True}
        return loader(self.train_split, self.workers, world, collate_fn=collate_images, **arguments)

    def val_dataloader(self) -> DataLoader[Any]:
        world, rank = _world(self)
        batches = share(range(len(self.val_split)), self.val_batch_size, rank, world)
        return loader(self.val_split, self.workers, world, batch_sampler=batches, collate_fn=collate_images)


class EpochSampler(DistributedSampler[Any]):
    """torch's sampler, which also tells each sample the epoch: it draws from that, and from nothing that came before.

    A resumed run therefore sees what an undisturbed one would have seen, whatever the number of loader processes.
    """

    def __iter__(self) -> Iterator[Any]:
        return ((index, self.epoch) for index in super().__iter__())


def check_enough(images: int, batch_size: int, world: int) -> None:
    """
    Raises:
        InputError: the training split does not fill one step.
    """
    if images < batch_size * world:
        raise InputError(
            f"The training split has {images} images, fewer than one batch on each of {world} devices "
            f"({batch_size} x {world}); lower train.batch_size."
        )


def loader(dataset: Dataset[Any], workers: int, world: int, **arguments: Any) -> DataLoader[Any]:
    """A DataLoader for one of `world` processes, with the settings that all have in common."""
    return DataLoader(
        dataset,
        num_workers=workers,
        # The process group has threads of its own. A fork at the wrong moment copies a lock that one of them holds,
        # and the worker waits for it for ever: seen in tests on a busy machine. One process forks, and so shares
        # its cache with its workers.
        multiprocessing_context="forkserver" if workers and world > 1 else None,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        **arguments,
    )


def _world(module: lightning.LightningDataModule) -> tuple[int, int]:
    """Number of processes, and which this one is."""
    return (module.trainer.world_size, module.trainer.global_rank) if module.trainer else (1, 0)
