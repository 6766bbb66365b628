"""Loaders for training and for exact evaluation on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from detector.data.coco import CocoIndex
from detector.data.collate import collate, collate_eval
from detector.data.dataset import DetectionDataset, seed_worker
from detector.data.transforms import EvalTransform, TrainTransform
from detector.errors import InputError
from detector.preprocess import Preprocessing, canvas_size


class EvaluationBatches(Sampler[list[int]]):
    """This rank's share of the pictures, each exactly once over all ranks, pictures of one canvas side by side.

    Lightning's and torch's distributed samplers pad the last round with repeated pictures, which changes mAP; this does
    not. A rank without pictures gets one empty batch, because Lightning skips the end-of-epoch hook, and with it the
    gathering that the other ranks wait for, on a rank without batches.
    """

    def __init__(self, index: CocoIndex, preprocessing: Preprocessing, batch_size: int, rank: int, world: int) -> None:
        canvases = [
            canvas_size([preprocessing.target_size(*size)]) if min(size) > 0 else (0, 0)
            for size in np.asarray(index.sizes).tolist()
        ]
        order = sorted(range(len(index)), key=lambda i: canvases[i])[rank::world]
        self.batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)] or [[]]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class DetectionData(lightning.LightningDataModule):
    """Training and validation split of one data set.

    Args:
        train, val: indices; train is None for evaluation alone.
        preprocessing: of the detector.
        transform: random changes of training pictures.
        train_batch_size, val_batch_size: pictures per step and device.
        workers: loader processes per device; 0 loads in the training process.
        cache: keep decoded training pictures in memory.
        seed: of the order of the training pictures.
    """

    def __init__(
        self,
        *,
        train: CocoIndex | None,
        val: CocoIndex,
        preprocessing: Preprocessing,
        transform: TrainTransform | None,
        train_batch_size: int,
        val_batch_size: int,
        workers: int,
        cache: bool,
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
        world, rank = self._world()
        if len(dataset) < self.train_batch_size * world:
            raise InputError(
                f"The training split has {len(dataset)} pictures, fewer than one batch on each of {world} devices "
                f"({self.train_batch_size} x {world}); lower train.batch_size."
            )
        # Padding by repetition is harmless in training. Another order each epoch (Lightning calls set_epoch), and the
        # one that epoch would have had where a run is resumed: so also for one process.
        sampler: Sampler[int] = DistributedSampler(dataset, world, rank, shuffle=True, seed=self.seed)
        return self._loader(
            dataset, batch_size=self.train_batch_size, sampler=sampler, drop_last=True, collate_fn=collate
        )

    def val_dataloader(self) -> DataLoader[Any]:
        world, rank = self._world()
        batches = EvaluationBatches(self.val_index, self.preprocessing, self.val_batch_size, rank, world)
        dataset = DetectionDataset(self.val_index, EvalTransform(self.preprocessing))
        return self._loader(dataset, batch_sampler=batches, collate_fn=collate_eval)

    def _world(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader(self, dataset: DetectionDataset, **arguments: Any) -> DataLoader[Any]:
        world, _ = self._world()
        return DataLoader(
            dataset,
            num_workers=self.workers,
            # The process group has threads of its own. A fork at the wrong moment copies a lock that one of them holds,
            # and the worker waits for it for ever: seen in tests on a busy machine. One process forks, and so shares
            # its cache with its workers.
            multiprocessing_context="forkserver" if self.workers and world > 1 else None,
            worker_init_fn=seed_worker,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            **arguments,
        )
