"""best.ckpt and last.ckpt: which state is kept, and how it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from detector.files import replacing


class KeptCheckpoint(ModelCheckpoint):
    """best.ckpt, the checkpoint with the highest score, the first of equals; or last.ckpt, after each epoch.

    Lightning's forgets the score when its folder has moved; here it goes with the folder, and without the file there
    is none.

    Args:
        run_dir: where it is kept.
        monitor: the metric that decides; None: the last is kept, scored or not.
    """

    def __init__(self, run_dir: Path, monitor: str | None = None) -> None:
        # No metric in the file name: '=' in a name could not be given on the command line as ckpt=...
        self.kept = run_dir / ("best.ckpt" if monitor else "last.ckpt")
        super().__init__(
            run_dir, filename=self.kept.stem, monitor=monitor, mode="max" if monitor else "min", save_last=False,
            save_on_train_epoch_end=None if monitor else True, enable_version_counter=False,
        )  # fmt: skip

    @property
    def state_key(self) -> str:
        """Where a checkpoint holds the state: the place of earlier versions."""
        return super().state_key.replace("KeptCheckpoint", "ModelCheckpoint", 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        score = state_dict["best_model_score"]
        if score is not None and self.kept.is_file():
            path = f"{self.dirpath}/{self.kept.name}"
            self.best_model_path = self.kth_best_model_path = path
            self.best_model_score = self.kth_value = score
            self.best_k_models = {path: score}


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints, each beside its destination and then onto it.

    Lightning's goes by the folder for temporary files; where that is another file system, the move is a copy, and one
    that is killed leaves half a checkpoint.

    Args:
        weights: of a checkpoint; what best.pth, beside best.ckpt, holds. None: there is no best.pth.
    """

    def __init__(self, weights: Callable[[Mapping[str, Any]], dict[str, Tensor]] | None = None) -> None:
        self.weights = weights

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        with replacing(path) as partial:
            torch.save(checkpoint, partial)
        if self.weights and path.name == "best.ckpt":
            with replacing(path.with_name("best.pth")) as partial:
                torch.save(self.weights(checkpoint), partial)
