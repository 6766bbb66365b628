"""RPN: raw outputs, proposals and losses against loops over single images with torchvision's operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, clip_boxes_to_image, nms

from detector.data.collate import Batch
from detector.models import rpn as rpn_module
from detector.models.rpn import RPN, RPNOptions

SIZES = torch.tensor([[64, 96], [50, 70]])


def build(spec: dict[str, Any], **changes: Any) -> RPN:
    torch.manual_seed(0)
    return RPN(12, 16, RPNOptions.parse(spec["rpn"] | changes))


def raw(rpn: RPN, count: int = 2, seed: int = 0, spread: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs as of a trained RPN on a 4 x 6 map: random, distinct."""
    anchors = rpn.anchors(4, 6)
    generator = torch.Generator().manual_seed(seed)
    objectness = torch.randn(count, len(anchors), generator=generator) * 3
    return objectness, torch.randn(count, len(anchors), 4, generator=generator) * spread, anchors


@pytest.mark.parametrize("separable", [True, False])
def test_outputs_are_ordered_as_the_anchors(small_spec: dict, separable: bool) -> None:
    rpn = build(small_spec, separable=separable).eval()
    features = torch.randn(2, 12, 3, 5)
    objectness, deltas, anchors = rpn(features)
    shapes = rpn.anchors.per_cell
    assert (objectness.shape, deltas.shape, anchors.shape) == ((2, 135), (2, 135, 4), (135, 4))
    hidden = rpn.hidden(features)
    logits, offsets = rpn.objectness(hidden), rpn.deltas(hidden)
    for row, column, shape in ((0, 0, 0), (1, 3, 4), (2, 4, 8), (0, 4, 2)):
        place = (row * 5 + column) * shapes + shape
        torch.testing.assert_close(objectness[:, place], logits[:, shape, row, column])
        torch.testing.assert_close(deltas[:, place], offsets[:, 4 * shape : 4 * shape + 4, row, column])
        center = (anchors[place, :2] + anchors[place, 2:]) / 2
        assert center.tolist() == [column * 16, row * 16]


def naive_proposals(objectness: Tensor, deltas: Tensor, anchors: Tensor, size: tuple[int, int], rpn: RPN) -> Any:
    """Proposals of one image: torchvision's coder, clip and nms."""
    limits = rpn.options.train_limits if rpn.training else rpn.options.test_limits
    order = objectness.argsort(descending=True)[: limits.before_nms]
    boxes = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(deltas[order], anchors[order])
    boxes, logits = clip_boxes_to_image(boxes, size), objectness[order]
    large = ((boxes[:, 2] - boxes[:, 0]) >= 1e-2) & ((boxes[:, 3] - boxes[:, 1]) >= 1e-2)
    boxes, logits = boxes[large], logits[large]
    keep = nms(boxes, logits, rpn.options.nms_threshold)[: limits.after_nms]
    return boxes[keep], logits[keep].sigmoid()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spread", [0.4, 3.0])  # 3: many boxes are clipped to nothing, and the list is not full
def test_proposals_equal_a_loop(small_spec: dict, training: bool, spread: float) -> None:
    rpn = build(small_spec).train(training)
    objectness, deltas, anchors = raw(rpn, spread=spread)
    found = rpn.propose(objectness, deltas, anchors, SIZES)
    places = 40 if training else 20
    assert (found.boxes.shape, found.valid.shape, found.scores.shape) == ((2, places, 4), (2, places), (2, places))
    for image, size in enumerate(SIZES.tolist()):
        boxes, scores = naive_proposals(objectness[image], deltas[image], anchors, tuple(size), rpn)
        count = len(boxes)
        assert found.valid[image].tolist() == [True] * count + [False] * (places - count)
        torch.testing.assert_close(found.boxes[image, :count], boxes)
        torch.testing.assert_close(found.scores[image, :count], scores)
        assert (found.boxes[image, count:] == 0).all()
        assert (found.scores[image, count:] == 0).all()


def test_number_of_proposals_is_fixed_where_the_map_has_fewer_anchors(small_spec: dict) -> None:
    limits = {"before_nms": 6000, "after_nms": 1000}
    rpn = build(small_spec, train_limits=limits, test_limits=limits)
    found = rpn.propose(*raw(rpn), SIZES)
    assert found.boxes.shape == (2, 1000, 4)
    assert 0 < found.valid.sum() < 2 * 216


def test_no_anchor_on_the_image_leaves_no_proposal(small_spec: dict) -> None:
    rpn = build(small_spec)
    objectness, deltas, anchors = raw(rpn)
    deltas[..., 0] = 1e4  # all far to the right: clipped to nothing
    found = rpn.propose(objectness, deltas, anchors, SIZES)
    assert not found.valid.any()
    assert (found.boxes == 0).all()
    assert found.boxes.shape == (2, 40, 4)


def test_proposals_carry_no_gradient(small_spec: dict) -> None:
    rpn = build(small_spec)
    objectness, deltas, anchors = raw(rpn)
    found = rpn.propose(objectness.requires_grad_(), deltas.requires_grad_(), anchors, SIZES)
    assert not found.boxes.requires_grad
    assert not found.scores.requires_grad


OBJECTS = [
    [(4, 4, 40, 30, 1), (50, 10, 90, 60, 0), (30, 30, 36, 36, 2)],
    [(2, 2, 60, 48, 0), (10, 10, 60, 45, 1, True)],
]


def naive_losses(objectness: Tensor, deltas: Tensor, anchors: Tensor, batch: Batch, masks: Any) -> tuple[float, float]:
    """Ren et al. 2015, equation 1, term by term in float64, given which anchors were drawn."""
    foreground, background = masks
    objectness, deltas, anchors = objectness.double(), deltas.double(), anchors.double()
    count, class_loss, box_loss = 0, 0.0, 0.0
    for image in range(len(objectness)):
        real = (batch.labels[image] >= 0) & ~batch.crowd[image]
        gt = batch.boxes[image][real].double()
        for a in range(len(anchors)):
            if not (foreground[image, a] or background[image, a]):
                continue
            count += 1
            probability = 1 / (1 + (-objectness[image, a]).exp())
            class_loss -= float((probability if foreground[image, a] else 1 - probability).log())
            if foreground[image, a]:
                target = gt[box_iou(anchors[a : a + 1], gt)[0].argmax()]
                wanted = BoxCoder((1.0, 1.0, 1.0, 1.0)).encode_single(target[None], anchors[a : a + 1])[0]
                for difference in (deltas[image, a] - wanted).abs().tolist():
                    beta = 1 / 9
                    box_loss += difference**2 / (2 * beta) if difference < beta else difference - beta / 2
    return class_loss / max(count, 1), box_loss / max(count, 1)


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `sample` draws from now on."""
    drawn: list[Any] = []
    original = rpn_module.sample

    def record(*arguments: Any, **options: Any) -> Any:
        drawn.append(original(*arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(rpn_module, "sample", record)
    return drawn


def test_anchors_that_leave_the_image_are_not_trained_on(
    small_spec: dict, make_batch: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Released code; the best anchor of an object is the best of those inside."""
    batch, drawn = make_batch(OBJECTS), recorded(monkeypatch)
    for inside_only in (True, False):
        rpn = build(small_spec, inside_only=inside_only, sample_count=1000)
        objectness, deltas, anchors = raw(rpn)
        rpn.losses(objectness, deltas, anchors, batch)
        foreground, background = drawn.pop()
        for image, (height, width) in enumerate(batch.image_sizes.tolist()):
            within = torch.tensor([x1 >= 0 and y1 >= 0 and x2 <= width and y2 <= height for x1, y1, x2, y2 in anchors])
            used = foreground[image] | background[image]
            assert bool((used & ~within).any()) != inside_only
            gt = batch.boxes[image][(batch.labels[image] >= 0) & ~batch.crowd[image]]
            best = box_iou(anchors[within], gt).amax(dim=0)
            best_drawn = box_iou(anchors[foreground[image]], gt).amax(dim=0)
            assert (best_drawn >= best).all()
            assert inside_only is False or torch.equal(best_drawn, best)


@pytest.mark.parametrize("objects", [OBJECTS, [OBJECTS[0], []], [[], []], [[(0, 0, 96, 64, 0, True)], []]])
def test_losses_equal_a_loop(
    small_spec: dict, make_batch: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch, objects: list
) -> None:
    rpn, batch = build(small_spec), make_batch(objects)
    objectness, deltas, anchors = raw(rpn)
    drawn = recorded(monkeypatch)
    losses = rpn.losses(objectness, deltas, anchors, batch)
    class_loss, box_loss = naive_losses(objectness, deltas, anchors, batch, drawn[0])
    assert float(losses["rpn_objectness"]) == pytest.approx(class_loss, rel=1e-5)
    assert float(losses["rpn_box"]) == pytest.approx(box_loss, rel=1e-5)
    assert (box_loss > 0) == bool(((batch.labels >= 0) & ~batch.crowd).any())
    assert class_loss > 0


def test_the_sample_has_the_configured_size(
    small_spec: dict, make_batch: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    rpn, drawn = build(small_spec), recorded(monkeypatch)
    rpn.losses(*raw(rpn), make_batch(OBJECTS))
    foreground, background = drawn[0]
    assert (foreground.sum(dim=1) <= 16).all()
    assert (foreground.sum(dim=1) >= 1).all()
    assert ((foreground | background).sum(dim=1) == 32).all()


def test_every_output_stays_in_the_graph_when_nothing_can_be_sampled(
    small_spec: dict, make_batch: Callable[..., Batch]
) -> None:
    rpn = build(small_spec)
    objectness, deltas, anchors = raw(rpn)
    objectness.requires_grad_()
    deltas.requires_grad_()
    batch = make_batch([[(-500, -500, 900, 900, 0, True)]] * 2)  # a crowd that covers every anchor
    losses = rpn.losses(objectness, deltas, anchors, batch)
    sum(losses.values()).backward()
    assert {name: value.item() for name, value in losses.items()} == {"rpn_objectness": 0.0, "rpn_box": 0.0}
    assert (objectness.grad == 0).all()
    assert (deltas.grad == 0).all()


def test_perfect_outputs_have_almost_no_loss(small_spec: dict, make_batch: Callable[..., Batch]) -> None:
    rpn = build(small_spec, sample_count=10_000)
    batch = make_batch([[(8, 8, 40, 40, 0)]])
    objectness, deltas, anchors = raw(rpn, count=1)
    iou = box_iou(anchors, batch.boxes[0])[:, 0]
    positive = (iou >= 0.7) | (iou == iou.max())
    objectness = torch.where(positive, 20.0, -20.0)[None]
    deltas = BoxCoder((1.0, 1.0, 1.0, 1.0)).encode_single(batch.boxes[0].expand(len(anchors), 4), anchors)[None]
    losses = rpn.losses(objectness, deltas, anchors, batch)
    assert float(losses["rpn_objectness"]) < 1e-6
    assert float(losses["rpn_box"]) < 1e-6
    best = rpn.propose(objectness, deltas, anchors, batch.image_sizes)
    torch.testing.assert_close(best.boxes[0, 0], batch.boxes[0, 0], rtol=1e-4, atol=1e-3)


def test_outputs_are_float32_under_autocast(small_spec: dict) -> None:
    rpn = build(small_spec)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = rpn(torch.randn(1, 12, 3, 5))
    assert [output.dtype for output in outputs] == [torch.float32] * 3


def test_padding_is_never_background(small_spec: dict, make_batch: Callable[..., Batch]) -> None:
    rpn = build(small_spec, sample_count=1000)
    batch = make_batch([[(10, 10, 30, 30, 0)], []])
    batch = replace(batch, image_sizes=torch.tensor([[30, 50], [64, 96]]))
    objectness, deltas, anchors = raw(rpn, len(batch))
    objectness.requires_grad_()
    rpn.losses(objectness, deltas, anchors, batch)["rpn_objectness"].backward()
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    padding = (centers[:, 0] >= 50) | (centers[:, 1] >= 30)
    assert objectness.grad is not None
    assert not objectness.grad[0, padding].any()
    assert objectness.grad[0, ~padding].any()
    assert objectness.grad[1, padding].any()
