"""The classifier's loss and scores against naive loops, and what it says of itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from detector.data.image_folder import ImageBatch
from detector.errors import InputError
from detector.inference.detector import Detector
from detector.models.backbones import build_backbone, parse_backbone
from detector.models.backbones.classifier import ImageClassifier
from detector.models.backbones.contract import ClassifierOptions
from detector.training.classification import ClassificationTask, draw_images, score
from detector.training.pretrain import PretrainOptions
from detector.training.schedule import parameter_groups

PRETRAINING = PretrainOptions(backbone={})
SGD = PRETRAINING.optimizer
LINEAR = PRETRAINING.schedule


@pytest.fixture
def make_task(small_spec: dict[str, Any]) -> Callable[..., ClassificationTask]:
    def make(classes: int = 3, smoothing: float = 0.1) -> ClassificationTask:
        torch.manual_seed(0)
        network = ImageClassifier(
            build_backbone(parse_backbone(small_spec["backbone"])), classes, ClassifierOptions(conv5_channels=32)
        )
        about = {"format": "x", "class_names": list("abc"), "provenance": {"config": {"lr": 1.0}}}
        task = ClassificationTask(network, about, optimizer=SGD, schedule=LINEAR, label_smoothing=smoothing)
        task.log = lambda *_, **__: None  # type: ignore[method-assign]  # there is no trainer
        return task

    return make


def make_images(count: int, classes: int = 3) -> ImageBatch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return ImageBatch(images, labels, tuple(f"{i}.jpg" for i in range(count)))


def naive_loss(logits: np.ndarray, labels: list[int], smoothing: float) -> float:
    """-sum q log p, q = 1 - s + s / K for the class and s / K for the others; the mean over the images."""
    total = 0.0
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        highest = max(row)
        log_sum = highest + math.log(sum(math.exp(value - highest) for value in row))
        for place, value in enumerate(row):
            share = smoothing / len(row) + (1 - smoothing if place == label else 0.0)
            total -= share * (value - log_sum)
    return total / len(labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_the_loss_is_the_formula(make_task: Callable[..., ClassificationTask], smoothing: float) -> None:
    task, batch = make_task(smoothing=smoothing).train(), make_images(6)
    state = {name: value.clone() for name, value in task.state_dict().items()}
    loss = task.training_step(batch, 0)
    task.load_state_dict(state)  # the same running statistics are written again
    logits = task(batch.images).detach().numpy()
    assert loss.item() == pytest.approx(naive_loss(logits, batch.labels.tolist(), smoothing), rel=1e-5)


def naive_score(logits: list[list[float]], labels: list[int]) -> list[float]:
    sums = [0.0, 0.0, 0.0, 0.0]
    for row, label in zip(logits, labels, strict=True):
        better = sum(value > row[label] for value in row)
        sums[0] += 1
        sums[1] += better < 1
        sums[2] += better < 5
        sums[3] += naive_loss(np.array([row]), [label], 0.0)
    return sums


@pytest.mark.parametrize("classes", [2, 5, 12, 1000])
def test_scores_are_those_of_a_naive_loop(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(60, classes, generator=generator)
    labels = torch.randint(0, classes, (60,), generator=generator)
    logits[:30][torch.arange(30), labels[:30]] += 4
    found, expected = score(logits, labels).tolist(), naive_score(logits.tolist(), labels.tolist())
    assert found[:3] == expected[:3]
    assert found[3] == pytest.approx(expected[3], rel=1e-9)
    assert 0 < found[1] <= found[2] <= 60
    if classes > 5:
        assert found[1] < found[2] < 60


def test_figures_are_over_all_images_whatever_the_batches(make_task: Callable[..., ClassificationTask]) -> None:
    """An empty batch, as a rank without images gets it, changes nothing."""
    task, batch = make_task().eval(), make_images(7)
    found = []
    for cuts in ([0, 7], [0, 3, 3, 6, 7]):
        task.on_validation_epoch_start()
        with torch.no_grad():
            for a, b in pairwise(cuts):
                task.validation_step(ImageBatch(batch.images[a:b], batch.labels[a:b], batch.paths[a:b]), 0)
        task.on_validation_epoch_end()
        found.append(task.metrics)
    with torch.no_grad():
        count, top1, top5, loss = naive_score(task(batch.images).tolist(), batch.labels.tolist())
    for figures in found:
        assert figures["images"] == count == 7
        assert figures["top1"] == top1 / 7
        assert figures["top5"] == top5 / 7 == 1.0  # of three classes five guesses are all
        assert figures["loss_val"] == pytest.approx(loss / 7, rel=1e-5)


def test_images_are_normalised_as_in_a_detector(
    make_task: Callable[..., ClassificationTask], small_detector: Detector
) -> None:
    seen: list[Tensor] = []
    task = make_task().eval()
    task.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = make_images(2)
    task(batch.images)
    assert torch.equal(seen[0], small_detector.network.normalise(batch.images))
    # ImageNet's mean colour in 0-255 becomes nearly zero.
    task(torch.tensor([124, 116, 104], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 64, 64))
    assert seen[1].abs().max() < 0.01


def test_a_loss_that_is_not_finite_names_the_files(make_task: Callable[..., ClassificationTask]) -> None:
    task, batch = make_task().eval(), make_images(12)
    task.forward = lambda images: torch.where(torch.arange(12)[:, None] == 4, torch.nan, torch.zeros(12, 3))  # type: ignore
    with pytest.raises(InputError, match=r"step 0 on 1 of 12 images: 4\.jpg\. .*optimizer\.lr.*last\.ckpt"):
        task.training_step(batch, 0)
    task.forward = lambda images: torch.full((12, 3), torch.inf)  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"12 of 12 images: 0\.jpg, .*7\.jpg and 4 more\."):
        task.training_step(batch, 0)


def test_vectors_are_not_decayed(make_task: Callable[..., ClassificationTask]) -> None:
    """Ma et al.: weight decay 4e-5, not on biases and normalisation."""
    network = make_task().network
    groups = parameter_groups(network, SGD, 0.5)
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    expected = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            matrix = isinstance(module, nn.Conv2d | nn.Linear) and name == "weight"
            expected[id(parameter)] = 4e-5 if matrix else 0.0
    assert decay == expected
    assert {4e-5, 0.0} == {*decay.values()}


def test_a_checkpoint_says_what_it_is(make_task: Callable[..., ClassificationTask]) -> None:
    task = make_task()
    task.metrics = {"top1": 0.5, "top5": 1.0, "loss_val": 1.0, "images": 4}
    checkpoint: dict[str, Any] = {}
    task.on_save_checkpoint(checkpoint)
    provenance = checkpoint["classifier"]["provenance"]
    assert provenance == {"config": {"lr": 1.0}, "epoch": 0, "step": 0, "metrics": task.metrics}
    assert "step" not in task.about["provenance"]
    assert {name.split(".")[0] for name in task.state_dict()} == {"network"}  # nothing of the normalisation


def test_an_image_of_a_batch_shows_each_image_with_its_name() -> None:
    image = torch.full((3, 64, 64), 90, dtype=torch.uint8)
    batch = ImageBatch(image.expand(2, 3, 64, 64), torch.tensor([0, 1]), ("a.jpg", "b.jpg"))
    drawn: Image.Image = draw_images(batch, ("ant", "bee"))
    pixels = np.asarray(drawn).astype(int)
    left, right = pixels[:, : pixels.shape[1] // 2], pixels[:, -(pixels.shape[1] // 2) :]
    for half in (left, right):
        assert (half == 90).all(axis=2).mean() > 0.6  # the image itself
        assert (half != 90).any(axis=2).mean() > 0.02  # frame and name
    assert not np.array_equal(left, right)
