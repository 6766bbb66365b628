"""best.ckpt and last.ckpt: which state is kept, and how it is written."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from detector.errors import InputError
from detector.files import replacing
from detector.options import typed


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
            run_dir,
            filename=self.kept.stem,
            monitor=monitor,
            mode="max" if monitor else "min",
            save_last=False,
            save_on_train_epoch_end=None if monitor else True,
            enable_version_counter=False,
        )

    @property
    def state_key(self) -> str:
        """Where a checkpoint holds the state: the place of earlier versions."""
        return super().state_key.replace("KeptCheckpoint", "ModelCheckpoint", 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        score = state_dict["best_model_score"]
        if score is not None and not 0 <= score <= 1:
            raise ValueError(f"its best score is {score}")
        if score is not None and self.kept.is_file():
            path = f"{self.dirpath}/{self.kept.name}"
            self.best_model_path = self.kth_best_model_path = path
            self.best_model_score = self.kth_value = score
            self.best_k_models = {path: score}


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints, each beside its destination and then onto it.

    Lightning's goes by the folder for temporary files; where that is another file system, the move is a copy, and one
    that is killed leaves half a checkpoint.

    Raises InputError where the disk is full or the folder read-only.

    Args:
        weights: of a checkpoint; what best.pth, beside best.ckpt, holds. None: there is no best.pth.
    """

    def __init__(self, weights: Callable[[Mapping[str, Any]], dict[str, Tensor]] | None = None) -> None:
        self.weights = weights

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        self._write(checkpoint, path)
        if self.weights and path.name == "best.ckpt":
            self._write(self.weights(checkpoint), path.with_name("best.pth"))

    def _write(self, content: Mapping[str, Any], path: Path) -> None:
        buffer = io.BytesIO()  # torch says less about a disk that is full
        torch.save(content, buffer)
        try:
            with replacing(path) as partial:
                partial.write_bytes(buffer.getbuffer())
        except OSError as error:
            last = path.with_name("last.ckpt")
            go_on = f", then go on: {typed('ckpt', str(last))} resume=true" if last.exists() else ""
            raise InputError(
                f"Cannot write '{path}': {error.strerror or error}. Checkpoints from before are whole. Make room for it"
                f"{go_on}."
            ) from error
