"""Loaders for training and for exact evaluation on any number of processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence, Sized
from functools import partial
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from detector.data.collate import collate, collate_eval
from detector.data.dataset import DetectionDataset, seed_worker
from detector.data.image_folder import ImageFolder, collate_images
from detector.data.index import AnnotationIndex
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


def by_canvas(index: AnnotationIndex, preprocessing: Preprocessing) -> list[int]:
    """The images in an order in which those of one canvas lie side by side."""
    canvases = [
        canvas_size([preprocessing.target_size(*size)]) if min(size) > 0 else (0, 0)
        for size in np.asarray(index.sizes).tolist()
    ]
    return sorted(range(len(index)), key=lambda i: canvases[i])


class SplitData(lightning.LightningDataModule):
    """Training and validation split of one data set.

    Args:
        train, val: the samples; train is None for evaluation alone.
        val_order: in which images are scored.
        options: of the run; its batch sizes, `workers`, and `seed` are read.
        collate, collate_val: make batches of samples.
        sampler: of the training images.

    Attributes:
        at_start: to be done once all processes are there.
        first_epoch: that the run begins with; of a resumed one not 0.
    """

    def __init__(
        self,
        train: Dataset[Any] | None,
        val: Dataset[Any],
        val_order: Sequence[int],
        options: Any,
        *,
        collate: Callable[..., Any],
        collate_val: Callable[..., Any],
        sampler: Callable[..., DistributedSampler[Any]],
    ) -> None:
        super().__init__()
        self.train_split, self.val_split, self.val_order = train, val, val_order
        self.options, self.collate, self.collate_val, self.sampler = options, collate, collate_val, sampler
        self.train_images = len(train) if isinstance(train, Sized) else 0
        self.train_batch_size = min(options.train.batch_size, self.train_images) if train is not None else 0
        self.at_start: Callable[[], None] | None = None
        self.first_epoch = 0

    def prepare_data(self) -> None:
        """What `at_start` does: here all processes are there, and have read what is to be overwritten."""
        if self.at_start is not None:
            self.at_start()

    def train_dataloader(self) -> DataLoader[Any]:
        """
        Raises:
            InputError: the training split does not fill one step.
        """
        assert self.train_split is not None
        world, rank = self._world()
        if self.train_images < self.train_batch_size * world:
            raise InputError(
                f"The training split has {self.train_images} images, fewer than one batch on each of {world} devices "
                f"({self.train_batch_size} x {world}); lower train.batch_size."
            )
        # Padding by repetition is harmless in training. Another order each epoch (Lightning calls set_epoch), and the
        # one that epoch would have had where a run is resumed: so also for one process. For the first epoch Lightning
        # calls it too late: loader processes have begun.
        sampler = self.sampler(self.train_split, world, rank, shuffle=True, seed=self.options.seed)
        sampler.set_epoch(self.first_epoch)
        arguments: Any = {"batch_size": self.train_batch_size, "sampler": sampler, "drop_last": True}
        return self._loader(self.train_split, collate_fn=self.collate, **arguments)

    def val_dataloader(self) -> DataLoader[Any]:
        world, rank = self._world()
        batches = share(self.val_order, self.options.val.batch_size, rank, world)
        return self._loader(self.val_split, batch_sampler=batches, collate_fn=self.collate_val)

    def _loader(self, samples: Dataset[Any], **arguments: Any) -> DataLoader[Any]:
        workers = self.options.workers
        multiprocessing.set_forkserver_preload(["__main__", "detector.training.end_with_rank"])
        return DataLoader(
            samples,
            num_workers=workers,
            worker_init_fn=seed_worker,
            # The process group has threads of its own. A fork at the wrong moment copies a lock that one of them holds,
            # and the worker waits for it for ever: seen in tests on a busy machine. One process forks, and so shares
            # its cache with its workers.
            multiprocessing_context="forkserver" if workers and self._world()[0] > 1 else None,
            persistent_workers=workers > 0,
            # Each new iterator takes a seed. From torch's own generator a resumed run would take other numbers of them.
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
            **arguments,
        )

    def _world(self) -> tuple[int, int]:
        """Number of processes, and which this one is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)


class DetectionData(SplitData):
    """The splits of a detection data set.

    Args:
        val, train: indices; train is None for evaluation alone.
        preprocessing: of the detector.
        options: see SplitData.
        transform: random changes of training images.
        cache: keep decoded training images in memory.
    """

    def __init__(
        self,
        val: AnnotationIndex,
        preprocessing: Preprocessing,
        options: Any,
        *,
        train: AnnotationIndex | None = None,
        transform: TrainTransform | None = None,
        cache: bool = False,
    ) -> None:
        sampler: Callable[..., DistributedSampler[Any]] = DistributedSampler
        if train is not None:
            alike = min(options.train.batch_size, len(train)) if options.train.by_shape else 1
            factors = transform.batch_factors() if transform is not None else [1.0]
            sampler = partial(ScaleSampler, batch_size=alike, step=options.train.batch_size, factors=factors)
        super().__init__(
            DetectionDataset(train, transform, cache=cache) if train is not None else None,
            DetectionDataset(val, transform=None),
            by_canvas(val, preprocessing),
            options,
            collate=collate,
            collate_val=partial(collate_eval, preprocessing=preprocessing),
            sampler=sampler,
        )
        self.transform = transform


class ShapeSampler(DistributedSampler[Any]):
    """torch's sampler in an order in which a batch has upright images alone, or none.

    A batch of both is padded to a square, a third more pixels where images are 4:3. What is more than whole batches is
    left out of torch's order before it is sorted, so that a rare shape is left out no more often than another; what
    fills no batch of its own comes last, as one batch of both. Where all are of one shape the order is torch's.

    Args:
        samples: with an index of their annotations.
        batch_size: images of a batch.
        arguments: of torch's sampler.
    """

    def __init__(self, samples: DetectionDataset, *arguments: Any, batch_size: int, **named: Any) -> None:
        super().__init__(samples, *arguments, **named)
        sizes = np.asarray(samples.index.sizes)
        self.upright, self.batch_size = (sizes[:, 0] > sizes[:, 1]).tolist(), batch_size

    def __iter__(self) -> Iterator[Any]:
        waiting: dict[bool, list[int]] = {False: [], True: []}
        order = list(super().__iter__())
        for i in order[: len(order) // self.batch_size * self.batch_size]:
            alike = waiting[self.upright[i]]
            alike.append(i)
            if len(alike) == self.batch_size:
                yield from alike
                alike.clear()
        yield from waiting[False] + waiting[True]


class ScaleSampler(ShapeSampler):
    """ShapeSampler, which also tells each sample the size factor of its batch, and the epoch.

    The factor is drawn from seed and epoch alone: all ranks have the same at each step. A resumed run sees what an
    undisturbed one would have seen, whatever the number of loader processes.

    Args:
        step: so many samples in a row have the same.
        factors: to draw from.
        others: of ShapeSampler.
    """

    def __init__(self, *arguments: Any, step: int, factors: Sequence[float], **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.step, self.factors = step, factors

    def __iter__(self) -> Iterator[Any]:
        generator = np.random.default_rng((self.seed, self.epoch))
        factor = 1.0
        for place, i in enumerate(super().__iter__()):
            if place % self.step == 0:
                factor = float(generator.choice(self.factors))
            yield i, factor, self.epoch


class EpochSampler(DistributedSampler[Any]):
    """torch's sampler, which also tells each sample the epoch: it draws from that, not from what came before."""

    def __iter__(self) -> Iterator[Any]:
        return ((index, self.epoch) for index in super().__iter__())


class ClassificationData(SplitData):
    """The splits of an image classification data set."""

    def __init__(self, train: ImageFolder, val: ImageFolder, options: Any) -> None:
        parts: Any = {"collate": collate_images, "collate_val": collate_images, "sampler": EpochSampler}
        super().__init__(train, val, range(len(val)), options, **parts)
