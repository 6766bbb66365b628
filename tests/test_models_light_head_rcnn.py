"""The whole network in every situation that a batch can bring."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.ops import box_iou

from detector.data.collate import Batch
from detector.models.build import NetworkOptions, build_network
from detector.models.light_head_rcnn import LightHeadRCNN

NAMES = {"rpn_objectness", "rpn_box", "head_class", "head_box"}
CONFIGURATIONS = list(itertools.product(("none", "cem"), (True, False), ("ohem", "random"), ("mean", "max")))
# Every pair of choices occurs.
COVERING = [
    ("none", True, "ohem", "mean"),
    ("cem", False, "ohem", "max"),
    ("cem", True, "random", "max"),
    ("none", False, "random", "mean"),
    ("cem", False, "random", "mean"),
    ("none", True, "ohem", "max"),
]
SOME = [(4, 4, 60, 40, 0), (30, 20, 90, 60, 0)]
SITUATIONS = {
    "objects": [SOME, SOME[:1]],
    "one picture without objects": [SOME, []],
    "no objects": [[], []],
    "crowds only": [[(0, 0, 50, 50, 0, True)], [(0, 0, 96, 64, 0, True)]],
    "a crowd over everything": [[(-900, -900, 900, 900, 0, True)], [(-900, -900, 900, 900, 0, True)]],
    "objects without size": [[(5, 5, 5, 5, 0), (8, 8, 20, 8, 0)], [(0, 0, 0, 0, 0)]],  # no foreground RoI
    "a speck": [[(40.2, 30.1, 40.7, 30.4, 0)], []],
    "one picture": [SOME],
    "many objects": [[(x, y, x + 9, y + 9, 0) for x in range(0, 80, 4) for y in range(0, 50, 10)], []],
}


def build(spec: dict[str, Any], neck: str, agnostic: bool, sampling: str, reduce: str, classes: int) -> LightHeadRCNN:
    torch.manual_seed(0)
    spec["neck"] = {"name": "none"} if neck == "none" else {"name": "cem", "width": 16}
    spec["light_head"] |= {"class_agnostic": agnostic, "sampling": sampling, "align_reduce": reduce}
    return build_network(NetworkOptions.parse(spec), classes)


def check_losses(network: nn.Module, batch: Batch) -> dict[str, float]:
    losses = network(batch)
    assert set(losses) == NAMES
    assert all(value.shape == () and value.isfinite() and value >= 0 for value in losses.values())
    sum(losses.values()).backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert not without, "DistributedDataParallel would wait for these for ever"
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    return {name: value.item() for name, value in losses.items()}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("configuration", COVERING)
def test_losses_are_finite_and_reach_every_parameter(
    small_spec: dict, make_batch: Callable[..., Batch], configuration: tuple, situation: str
) -> None:
    network = build(small_spec, *configuration, 1)
    losses = check_losses(network, make_batch(SITUATIONS[situation]))
    if situation in ("objects", "one picture", "one picture without objects", "many objects"):
        assert min(losses.values()) > 0
    if situation in ("no objects", "crowds only", "objects without size"):
        assert losses["rpn_box"] == losses["head_box"] == 0
        assert losses["rpn_objectness"] > 0  # background is learned from empty images too
    if situation == "no objects":
        assert losses["head_class"] > 0
    if situation == "a crowd over everything":
        assert set(losses.values()) == {0.0}


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("classes", [1, 80])
def test_every_configuration_trains_and_detects_inside_the_image(
    small_spec: dict, make_batch: Callable[..., Batch], excite: Callable, configuration: tuple, classes: int
) -> None:
    network = build(small_spec, *configuration, classes)
    batch = make_batch([[*SOME, (10, 10, 50, 50, classes - 1)], []], size=(50, 70))
    check_losses(network, batch)
    excite(network).eval()
    results = network.detect(batch.images, batch.image_sizes).per_image()
    assert len(results) == 2
    for boxes, scores, labels in results:
        assert 0 < len(boxes) == len(scores) == len(labels) <= 30
        assert (boxes.dtype, scores.dtype, labels.dtype) == (torch.float32, torch.float32, torch.int64)
        assert not boxes.requires_grad
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([70, 50, 70, 50])).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (scores.diff() <= 0).all()
        assert ((scores > 0.001) & (scores <= 1)).all()
        assert ((labels >= 0) & (labels < classes)).all()


@pytest.mark.parametrize("neck", ["none", "cem"])
def test_a_batch_gives_what_single_images_give(
    small_spec: dict, make_batch: Callable[..., Batch], excite: Callable, neck: str
) -> None:
    network = excite(build(small_spec, neck, False, "ohem", "mean", 5)).eval()
    batch = make_batch([[], [], []], size=(64, 96))
    together = network.detect(batch.images, batch.image_sizes).per_image()
    for i, (boxes, scores, labels) in enumerate(together):
        [alone] = network.detect(batch.images[i : i + 1], batch.image_sizes[i : i + 1]).per_image()
        assert len(boxes) > 1
        assert labels.tolist() == alone[2].tolist()
        torch.testing.assert_close(boxes, alone[0], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(scores, alone[1], rtol=1e-4, atol=1e-5)


def test_a_batch_has_the_mean_of_the_single_losses(
    small_spec: dict, make_batch: Callable[..., Batch], excite: Callable
) -> None:
    """With as many anchors and RoIs sampled in every image, and all of them: the sample plays no part."""
    small_spec["rpn"] |= {"sample_count": 10_000, "foreground_share": 1.0, "background_iou": 0.7}
    small_spec["light_head"] |= {"sample_count": 10_000}
    small_spec["rpn"]["test_limits"] = {"before_nms": 100, "after_nms": 100}
    small_spec["rpn"]["nms_threshold"] = 1.0
    network = excite(build(small_spec, "cem", True, "ohem", "mean", 2)).eval()
    pictures = [SOME, [(20, 10, 70, 50, 1), (5, 5, 30, 60, 0)]]
    whole = make_batch(pictures)

    def part(i: int) -> Batch:
        tensors = (whole.images, whole.image_sizes, whole.boxes, whole.labels, whole.crowd, whole.scales)
        return Batch(*(tensor[i : i + 1] for tensor in tensors), whole.original_sizes[i : i + 1], (i,))

    with torch.no_grad():
        together, singles = network(whole), [network(part(i)) for i in range(2)]
    for name in ("rpn_objectness", "rpn_box"):
        mean = sum(single[name] for single in singles) / 2
        torch.testing.assert_close(together[name], mean, rtol=1e-4, atol=1e-6)


def test_normalisation_is_torchvisions(small_spec: dict, make_batch: Callable[..., Batch]) -> None:
    from torchvision.transforms.functional import convert_image_dtype, normalize

    network = build_network(NetworkOptions.parse(small_spec), 2)
    images = make_batch([[]]).images
    expected = normalize(convert_image_dtype(images), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    found = network.normalise(images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("neck", ["none", "cem"])
def test_bfloat16_autocast_trains_and_detects(
    small_spec: dict, make_batch: Callable[..., Batch], excite: Callable, neck: str
) -> None:
    network, batch = build(small_spec, neck, False, "ohem", "max", 3), make_batch([SOME, []])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = network(batch)
        assert {value.dtype for value in losses.values()} == {torch.float32}
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        excite(network).eval()
        for boxes, scores, _ in network.detect(batch.images, batch.image_sizes).per_image():
            assert (boxes.dtype, scores.dtype) == (torch.float32, torch.float32)
            assert (scores.diff() <= 0).all()


def test_a_diverged_network_gives_a_loss_that_is_not_finite(small_spec: dict, make_batch: Callable[..., Batch]) -> None:
    """Training checks the sum and names the images of the batch; nothing before that may crash."""
    for place in ("backbone.conv1.0", "rpn.objectness", "rpn.deltas", "head.hidden"):
        network = build_network(NetworkOptions.parse(small_spec), 2)
        with torch.no_grad():
            network.get_submodule(place).weight.fill_(float("nan"))
        assert not sum(network(make_batch([SOME, []])).values()).isfinite(), place


def test_overfits_one_batch(small_spec: dict, make_batch: Callable[..., Batch]) -> None:
    torch.manual_seed(0)
    network = build_network(NetworkOptions.parse(small_spec), 2).train()
    batch = make_batch([[(8, 8, 40, 40, 0)], [(40, 16, 88, 56, 1)], []])
    for i, box in ((0, (8, 8, 40, 40)), (1, (40, 16, 88, 56))):
        x1, y1, x2, y2 = box
        batch.images[i] //= 4
        batch.images[i, i, y1:y2, x1:x2] = 255
    batch.images[2] //= 4
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    totals = []
    for _ in range(70):
        total = sum(network(batch).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert sum(totals[-5:]) < 0.25 * sum(totals[:5])
    # Batch statistics, because 70 steps are too few for the running ones.
    network.rpn.options = network.rpn.options.model_copy(update={"train_limits": network.rpn.options.test_limits})
    found = network.detect(batch.images, batch.image_sizes).per_image()
    for i in range(2):
        boxes, scores, labels = found[i]
        assert scores[0] > 0.5
        assert labels[0] == i
        assert box_iou(boxes[:1], batch.boxes[i]).item() > 0.6
    assert not len(found[2][1]) or found[2][1][0] < 0.5
