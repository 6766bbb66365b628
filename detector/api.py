"""What a user holds: a Detector (network, preprocessing, class names), loaded from one file, predicting on anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detector.build import build_network
from detector.deploy.fuse import fuse
from detector.errors import InputError
from detector.files import replacing
from detector.images import list_images, read_image
from detector.light_head_rcnn import LightHeadRCNN
from detector.preprocess import Preprocessing, group_by_canvas, pad, restore_boxes
from detector.structures import Detections

FORMAT = "light-head-detector"
VERSION = 1
# Training wraps the network; its checkpoints carry this prefix, and so do ours: one format.
PREFIX = "network."


class Detector:
    """A network with what it needs to be used: how to preprocess, and what its labels mean.

    Attributes:
        network: LightHeadRCNN.
        preprocessing: how a picture becomes network input.
        class_names: label -> name.
        spec: the plain dict that `build_network` takes.
        provenance: how it was made: config, epoch, metrics, versions. Plain values.
        fused: the network is the faster form that cannot be trained or saved.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        class_names: Sequence[str],
        preprocessing: Preprocessing,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        if not class_names:
            raise InputError("A detector needs at least one class name.")
        self.spec = dict(spec)
        self.class_names = tuple(class_names)
        self.preprocessing = preprocessing
        self.provenance = dict(provenance or {})
        self.network: LightHeadRCNN = build_network(spec, len(self.class_names))
        self.fused = False

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device | None = None, *, fused: bool = True) -> Detector:
        """Read a checkpoint; data only, no code is run.

        Args:
            path: `best.ckpt` or `last.ckpt` of a run, or what `save` wrote.
            device: "cpu", "cuda", ...; None takes the GPU if there is one.
            fused: fold batch normalisation into the convolutions: faster, equal results; not to be trained or saved.

        Raises:
            InputError: no such file, not a checkpoint of this project, or weights that do not fit its description.
        """
        checkpoint = read_checkpoint(path)
        about = checkpoint["detector"]
        weights = {
            key.removeprefix(PREFIX): value for key, value in checkpoint["state_dict"].items() if key.startswith(PREFIX)
        }
        try:
            preprocessing = Preprocessing(**about["preprocessing"])
            detector = cls(about["spec"], about["class_names"], preprocessing, about.get("provenance"))
            detector.network.load_state_dict(weights)
        except (InputError, KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"'{path}' does not fit its own description: it is damaged, or of another version ({reason})."
            ) from error
        if fused:
            detector.network, detector.fused = fuse(detector.network), True
        return detector.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def describe(self) -> dict[str, Any]:
        """Everything but the weights, in plain types: the `detector` entry of a checkpoint."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "spec": self.spec,
            "class_names": list(self.class_names),
            "preprocessing": self.preprocessing.to_dict(),
            "provenance": self.provenance,
        }

    def save(self, path: str | Path) -> None:
        """Write a checkpoint that `load` reads. Written beside, then renamed: a broken write leaves the old file.

        Raises:
            InputError: the detector is fused: its folded weights fit no description.
        """
        if self.fused:
            raise InputError("A fused detector cannot be saved: load it with Detector.load(path, fused=False).")
        state = {PREFIX + key: value.cpu() for key, value in self.network.state_dict().items()}
        with replacing(path) as partial:
            torch.save({"detector": self.describe(), "state_dict": state}, partial)

    def to(self, device: str | torch.device) -> Detector:
        """Move the network; returns self. Raises InputError where the device does not exist."""
        try:
            self.network.to(device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"Cannot use device '{device}': {error}") from error
        return self

    @property
    def device(self) -> torch.device:
        return self.network.mean.device

    def predict(
        self, source: Any, *, score_threshold: float = 0.3, batch_size: int = 8, bgr: bool = False
    ) -> list[Detections]:
        """Find objects in pictures. Always a list, one `Detections` per picture, in the order given.

        Args:
            source: a path, a folder (its pictures, sorted, with subfolders), a PIL image, a numpy array (h, w, 3) in
                RGB, a torch tensor (3, h, w), or a list of any of them.
            score_threshold: detections below are left out; 0 gives all that the network's own threshold leaves.
            batch_size: pictures that go through the network at once. It does not change results.
            bgr: numpy arrays are in OpenCV's channel order.

        Raises:
            InputError: a picture is missing or unreadable; the message names it.
        """
        return list(self.stream(source, score_threshold=score_threshold, batch_size=batch_size, bgr=bgr))

    def stream(
        self, source: Any, *, score_threshold: float = 0.3, batch_size: int = 8, bgr: bool = False
    ) -> Iterator[Detections]:
        """As `predict`, batch by batch: for more pictures than fit in memory."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size={batch_size}; expected a whole number, 1 or more.")
        if not isinstance(score_threshold, int | float) or not 0 <= score_threshold <= 1:
            raise InputError(f"score_threshold={score_threshold}; expected a number from 0 to 1.")
        for chunk in _chunks(expand_sources(source), batch_size):
            images = [read_image(item, bgr=bgr) for item in chunk]
            paths = [str(item) if isinstance(item, str | Path) else None for item in chunk]
            for found in self._predict_images(images, paths):
                yield found.above(score_threshold)

    def _predict_images(self, images: list[np.ndarray], paths: list[str | None]) -> list[Detections]:
        resized = [self.preprocessing(image) for image in images]
        found: dict[int, Detections] = {}
        for group in group_by_canvas([image.shape[:2] for image in resized]):
            sizes = torch.tensor([resized[i].shape[:2] for i in group])
            scales = [input_scale(images[i].shape[:2], resized[i].shape[:2]) for i in group]
            original = [images[i].shape[:2] for i in group]
            batch = torch.from_numpy(pad([resized[i] for i in group]))
            results = self.detect(batch, sizes, np.stack(scales), np.array(original), [paths[i] for i in group])
            found.update(zip(group, results, strict=True))
        return [found[i] for i in range(len(images))]

    def detect(
        self,
        images: Tensor,
        image_sizes: Tensor,
        scales: np.ndarray,
        original_sizes: np.ndarray,
        paths: Sequence[str | None] | None = None,
    ) -> list[Detections]:
        """The one way from padded input to results, for prediction and evaluation alike.

        Args:
            images: uint8 RGB (N, 3, H, W).
            image_sizes: (N, 2), height and width inside the padding.
            scales: (N, 2), input pixels per original pixel, (x, y).
            original_sizes: (N, 2), height and width of the original pictures.

        Returns:
            Boxes in pixels of the original pictures.
        """
        outputs = self.network.eval().detect(images.to(self.device), image_sizes.to(self.device))
        paths = paths or [None] * len(outputs)
        results = []
        for (boxes, scores, labels), scale, size, path in zip(outputs, scales, original_sizes, paths, strict=True):
            original = (int(size[0]), int(size[1]))
            restored = restore_boxes(boxes.float().cpu().numpy(), scale, original)
            results.append(
                Detections(
                    restored, scores.float().cpu().numpy(), labels.cpu().numpy(), self.class_names, original, path
                )
            )
        return results


def input_scale(original: tuple[int, ...], resized: tuple[int, ...]) -> np.ndarray:
    """Input pixels per original pixel, (x, y), from (height, width) before and after the resize."""
    return np.array([resized[1] / original[1], resized[0] / original[0]])


def load(path: str | Path, device: str | torch.device | None = None) -> Detector:
    """Read a detector from a checkpoint: see `Detector.load`."""
    return Detector.load(path, device)


def predict(
    source: Any, *, ckpt: str | Path, device: str | torch.device | None = None, **options: Any
) -> list[Detections]:
    """Load a checkpoint and find objects in pictures: see `Detector.predict`. To predict often, `load` once."""
    return load(ckpt, device).predict(source, **options)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint as plain data.

    Raises:
        InputError: missing, truncated, of another project or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"No checkpoint at '{path}'. Give the path of a best.ckpt or last.ckpt that training wrote.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # On damaged bytes the unpickler raises anything: IndexError, KeyError, TypeError ...
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"'{path}' cannot be read as a checkpoint: it is truncated, or not one of ours ({reason[:200]})."
        ) from error
    about = checkpoint.get("detector") if isinstance(checkpoint, dict) else None
    if (
        not isinstance(about, dict)
        or about.get("format") != FORMAT
        or not isinstance(about.get("version"), int)
        or not isinstance(checkpoint.get("state_dict"), dict)
    ):
        raise InputError(
            f"'{path}' is a torch file, but not a detector checkpoint. Backbone weights go to backbone.weights=PATH."
        )
    if about["version"] > VERSION:
        raise InputError(
            f"'{path}' has format version {about['version']}; this package reads up to {VERSION}: update it."
        )
    return checkpoint


def expand_sources(source: Any) -> list[Any]:
    """One item per picture: folders become their pictures, a single thing becomes a list of one."""
    if isinstance(source, str | Path):
        return list(list_images(source)) if Path(source).is_dir() else [source]
    if isinstance(source, list | tuple):
        return [item for part in source for item in expand_sources(part)]
    return [source]


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
