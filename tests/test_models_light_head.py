"""The light head against convolutions by hand, loops over single RoIs and torchvision's Fast R-CNN loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import box_iou, clip_boxes_to_image, nms, ps_roi_align

from detector.data.collate import Batch
from detector.errors import InputError
from detector.models import postprocess
from detector.models.light_head import HeadOutput, LargeSeparableConv, LightHead, LightHeadOptions
from detector.models.matching import Matches
from detector.models.rpn import Proposals

K = 3
CODER = BoxCoder((10.0, 10.0, 5.0, 5.0))
OBJECTS = [
    [(4, 4, 40, 30, 1), (50, 10, 90, 60, 0)],
    [(2, 2, 60, 48, 2), (10, 10, 60, 45, 1, True), (70, 5, 90, 25, 0)],
]


def build(spec: dict[str, Any], **changes: Any) -> LightHead:
    torch.manual_seed(0)
    return LightHead(12, 16, K, LightHeadOptions.parse(spec["light_head"] | changes))


def random_rois(count: int = 2, places: int = 30, seed: int = 0) -> Proposals:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, places, 2, generator=generator) * torch.tensor([60.0, 40.0])
    side = torch.rand(count, places, 2, generator=generator) * torch.tensor([35.0, 23.0]) + 1
    valid = torch.ones(count, places, dtype=torch.bool)
    valid[0, -7:] = False
    boxes = torch.cat((corner, corner + side), dim=-1) * valid[..., None]
    return Proposals(boxes, valid, torch.rand(count, places, generator=generator) * valid)


def near_objects(batch: Batch, places: int = 30, seed: int = 0) -> Proposals:
    """RoIs of which many overlap an object well."""
    rois = random_rois(len(batch), places, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for i in range(len(batch)):
        for j, box in enumerate(batch.boxes[i]):
            noise = torch.randn(4, 4, generator=generator) * 2
            rois.boxes[i, 4 * j : 4 * j + 4] = (box + noise).clamp(min=0)
    return rois


def random_output(head: LightHead, rois: Proposals, seed: int = 0) -> HeadOutput:
    generator = torch.Generator().manual_seed(seed)
    shape = rois.valid.shape
    logits = torch.randn(*shape, K + 1, generator=generator) * 2
    deltas = torch.randn(*shape, 1 if head.options.class_agnostic else K, 4, generator=generator)
    return HeadOutput(logits, deltas)


def test_large_separable_convolution_is_four_convolutions() -> None:
    layer = LargeSeparableConv(6, 10, mid_channels=4, kernel_size=7).double()
    x = torch.randn(2, 6, 9, 5, dtype=torch.float64)
    (a, b), (c, d) = layer.column_row, layer.row_column
    assert [tuple(conv.weight.shape) for conv in (a, b, c, d)] == [
        (4, 6, 7, 1),
        (10, 4, 1, 7),
        (4, 6, 1, 7),
        (10, 4, 7, 1),
    ]
    first = F.conv2d(F.conv2d(x, a.weight, a.bias, padding=(3, 0)), b.weight, b.bias, padding=(0, 3))
    second = F.conv2d(F.conv2d(x, c.weight, c.bias, padding=(0, 3)), d.weight, d.bias, padding=(3, 0))
    torch.testing.assert_close(layer(x), (first + second).clamp(min=0))


def test_large_separable_convolution_sees_k_by_k() -> None:
    layer = LargeSeparableConv(2, 3, mid_channels=4, kernel_size=5).double()
    x = torch.randn(1, 2, 11, 11, dtype=torch.float64, requires_grad=True)
    (layer.column_row(x) + layer.row_column(x))[0, :, 5, 5].sum().backward()
    seen = x.grad.abs().sum(dim=(0, 1)) > 0
    expected = torch.zeros(11, 11, dtype=torch.bool)
    expected[3:8, 3:8] = True
    assert torch.equal(seen, expected)


def test_forward_is_thin_map_align_and_one_hidden_layer(small_spec: dict) -> None:
    head, rois = build(small_spec, class_agnostic=False).eval(), random_rois()
    features = torch.randn(2, 12, 4, 6)
    output = head(head.thin(features), rois.boxes)
    assert (output.class_logits.shape, output.box_deltas.shape) == ((2, 30, K + 1), (2, 30, K, 4))
    half_cell = 8  # a cell is centred on stride * i, which torchvision's operator calls stride * (i + 0.5)
    flat = torch.cat([torch.cat((torch.full((30, 1), float(i)), rois.boxes[i] + half_cell), dim=1) for i in range(2)])
    pooled = ps_roi_align(head.thin(features), flat, 7, 1 / 16, sampling_ratio=2)
    hidden = F.relu(F.linear(pooled.flatten(1), head.hidden.weight, head.hidden.bias))
    logits = F.linear(hidden, head.class_logits.weight, head.class_logits.bias)
    torch.testing.assert_close(output.class_logits.flatten(0, 1), logits, rtol=1e-4, atol=1e-5)
    deltas = F.linear(hidden, head.box_deltas.weight, head.box_deltas.bias)
    torch.testing.assert_close(output.box_deltas.flatten(0, 1).flatten(1), deltas, rtol=1e-4, atol=1e-6)


def test_rois_for_training_append_the_objects(small_spec: dict, make_batch: Callable[..., Batch]) -> None:
    head, batch = build(small_spec), make_batch(OBJECTS)
    proposals = near_objects(batch)
    rois, matches = head.rois_for_training(proposals, batch)
    assert rois.boxes.shape == (2, 33, 4)
    assert torch.equal(rois.boxes[:, :30], proposals.boxes)
    assert rois.valid[:, 30:].tolist() == [[True, True, False], [True, False, True]]  # no padding, no crowd
    for image in range(2):
        for j, row in enumerate(OBJECTS[image]):
            if len(row) == 5:
                assert rois.boxes[image, 30 + j].tolist() == list(row[:4])
                assert matches.foreground[image, 30 + j]
                assert matches.index[image, 30 + j] == j
    assert not (matches.foreground | matches.background)[~rois.valid].any()


@pytest.mark.parametrize("foreground_iou", [0.5, 0.6])
def test_rois_are_matched_as_in_a_loop(
    small_spec: dict, make_batch: Callable[..., Batch], foreground_iou: float
) -> None:
    head, batch = build(small_spec, foreground_iou=foreground_iou), make_batch(OBJECTS)
    rois, matches = head.rois_for_training(near_objects(batch), batch)
    for image in range(2):
        real = ((batch.labels[image] >= 0) & ~batch.crowd[image]).nonzero()[:, 0].tolist()
        crowds = batch.boxes[image][batch.crowd[image]]
        for place in range(33):
            box = rois.boxes[image, place : place + 1]
            iou = box_iou(box, batch.boxes[image][real])[0]
            foreground = bool(rois.valid[image, place]) and bool(iou.max() >= foreground_iou)
            assert bool(matches.foreground[image, place]) == foreground
            if foreground:
                assert int(matches.index[image, place]) == real[int(iou.argmax())]
            elif rois.valid[image, place]:
                hidden = len(crowds) and clip_area(box[0], crowds[0]) >= 0.5
                assert bool(matches.background[image, place]) == (not hidden)


def clip_area(box: Tensor, other: Tensor) -> float:
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return float(max(width, 0) * max(height, 0) / ((box[2] - box[0]) * (box[3] - box[1])))


def test_random_sampling_keeps_a_fixed_number_of_matched_rois(
    small_spec: dict, make_batch: Callable[..., Batch]
) -> None:
    head, batch = build(small_spec, sampling="random"), make_batch(OBJECTS)
    proposals = near_objects(batch)
    rois, matches = head.rois_for_training(proposals, batch)
    assert rois.boxes.shape == (2, 16, 4)
    assert (matches.foreground.sum(dim=1) <= 4).all()
    assert (matches.foreground.sum(dim=1) >= 1).all()
    assert torch.equal(rois.valid, matches.foreground | matches.background)
    every = torch.cat((proposals.boxes, batch.boxes), dim=1)
    for image in range(2):
        for place in rois.valid[image].nonzero()[:, 0].tolist():
            assert (every[image] == rois.boxes[image, place]).all(dim=1).any()
            if matches.foreground[image, place]:
                gt = batch.boxes[image, matches.index[image, place]]
                assert box_iou(rois.boxes[image, place][None], gt[None]) >= 0.5


def naive_terms(output: HeadOutput, rois: Proposals, matches: Matches, batch: Batch) -> list[tuple[float, float]]:
    """Class loss and doubled box loss of every RoI that may count, in float64."""
    terms = []
    for image in range(len(rois.boxes)):
        for place in range(rois.boxes.shape[1]):
            foreground = bool(matches.foreground[image, place])
            if not foreground and not matches.background[image, place]:
                continue
            j = int(matches.index[image, place])
            label = int(batch.labels[image, j]) if foreground else K
            logits = output.class_logits[image, place].double()
            class_loss = float(logits.exp().sum().log() - logits[label])
            box_loss = 0.0
            if foreground:
                deltas = output.box_deltas[image, place].double()
                predicted = deltas[0] if len(deltas) == 1 else deltas[label]
                gt, roi = batch.boxes[image, j][None].double(), rois.boxes[image, place][None].double()
                for value in (predicted - CODER.encode_single(gt, roi)[0]).abs().tolist():
                    box_loss += 2 * (value**2 / 2 if value < 1 else value - 0.5)
            terms.append((class_loss, box_loss))
    return terms


@pytest.mark.parametrize("agnostic", [True, False])
@pytest.mark.parametrize("count", [3, 16, 1000])
def test_ohem_averages_the_rois_of_largest_loss(
    small_spec: dict, make_batch: Callable[..., Batch], agnostic: bool, count: int
) -> None:
    head = build(small_spec, class_agnostic=agnostic, sample_count=count)
    batch = make_batch(OBJECTS)
    rois, matches = head.rois_for_training(near_objects(batch), batch)
    output = random_output(head, rois)
    losses = head.losses(output, rois, matches, batch)
    hardest = sorted(naive_terms(output, rois, matches, batch), key=lambda term: term[0] + term[1] / 2, reverse=True)[
        : count * 2
    ]
    assert float(losses["head_class"]) == pytest.approx(sum(c for c, _ in hardest) / len(hardest), rel=1e-5)
    assert float(losses["head_box"]) == pytest.approx(sum(b for _, b in hardest) / len(hardest), rel=1e-5)
    assert losses["head_box"] > 0


def test_ohem_ranks_before_the_box_loss_is_weighted(small_spec: dict, make_batch: Callable[..., Batch]) -> None:
    """Released code: the weight of the box loss decides how much a RoI counts, not whether it does."""
    batch = make_batch(OBJECTS)
    chosen = []
    for weight in (1.0, 50.0):
        head = build(small_spec, sample_count=4, box_weight=weight)
        rois, matches = head.rois_for_training(near_objects(batch), batch)
        output = random_output(head, rois)
        output.class_logits.requires_grad_()
        head.losses(output, rois, matches, batch)["head_class"].backward()
        chosen.append(output.class_logits.grad.abs().sum(dim=2) > 0)
    assert torch.equal(*chosen)


def test_ohem_picks_over_the_whole_batch(small_spec: dict, make_batch: Callable[..., Batch]) -> None:
    head, batch = build(small_spec, sample_count=5), make_batch([[], []])
    rois = random_rois()
    matches = Matches(torch.zeros(2, 30, dtype=torch.long), torch.zeros(2, 30, dtype=torch.bool), rois.valid)
    logits = torch.zeros(2, 30, K + 1)
    logits[1, :, 0] = 9.0  # the second image is wrong everywhere, the first undecided
    output = HeadOutput(logits.requires_grad_(), torch.zeros(2, 30, 1, 4))
    head.losses(output, rois, matches, batch)["head_class"].backward()
    assert (logits.grad[0] == 0).all()
    assert (logits.grad[1].abs().sum(dim=1) > 0).sum() == 10


def test_gradient_reaches_the_chosen_rois_only(small_spec: dict, make_batch: Callable[..., Batch]) -> None:
    head, batch = build(small_spec, sample_count=4), make_batch(OBJECTS)
    rois, matches = head.rois_for_training(near_objects(batch), batch)
    output = random_output(head, rois)
    output.class_logits.requires_grad_()
    output.box_deltas.requires_grad_()
    sum(head.losses(output, rois, matches, batch).values()).backward()
    assert (output.class_logits.grad.abs().sum(dim=2) > 0).sum() == 8
    moved = output.box_deltas.grad.abs().sum(dim=(2, 3)) > 0
    assert not moved[~matches.foreground].any()


@pytest.mark.parametrize("sampling", ["random", "ohem"])
def test_equals_torchvisions_fast_rcnn_loss(small_spec: dict, make_batch: Callable[..., Batch], sampling: str) -> None:
    """Class-specific boxes, weight 1, torchvision's beta of 1/9, and all RoIs chosen."""
    head = build(
        small_spec, class_agnostic=False, sampling=sampling, sample_count=1000, box_weight=1.0, smooth_l1_beta=1 / 9
    )
    batch = make_batch(OBJECTS)
    rois, matches = head.rois_for_training(near_objects(batch), batch)
    output = random_output(head, rois)
    losses = head.losses(output, rois, matches, batch)
    used = matches.foreground | matches.background
    # torchvision counts background as class 0 and ours as class K.
    labels = (batch.labels.gather(1, matches.index) + 1).masked_fill(~matches.foreground, 0)[used]
    logits = output.class_logits[used].roll(1, dims=1)
    deltas = torch.cat((torch.zeros(int(used.sum()), 1, 4), output.box_deltas[used]), dim=1).flatten(1)
    gt = torch.stack([batch.boxes[i][matches.index[i]] for i in range(2)])
    targets = CODER.encode_single(gt[used], rois.boxes[used].clamp(min=0))
    class_loss, box_loss = fastrcnn_loss(logits, deltas, [labels], [targets])
    torch.testing.assert_close(losses["head_class"], class_loss)
    torch.testing.assert_close(losses["head_box"], box_loss)


@pytest.mark.parametrize("agnostic", [True, False])
@pytest.mark.parametrize("sampling", ["random", "ohem"])
def test_no_roi_at_all_gives_zero_and_a_gradient(
    small_spec: dict, make_batch: Callable[..., Batch], agnostic: bool, sampling: str
) -> None:
    head, batch = build(small_spec, class_agnostic=agnostic, sampling=sampling), make_batch([[], []])
    nothing = Proposals(torch.zeros(2, 20, 4), torch.zeros(2, 20, dtype=torch.bool), torch.zeros(2, 20))
    rois, matches = head.rois_for_training(nothing, batch)
    losses = head.losses(head(head.thin(torch.randn(2, 12, 2, 3)), rois.boxes), rois, matches, batch)
    sum(losses.values()).backward()
    assert [value.item() for value in losses.values()] == [0.0, 0.0]
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert all((parameter.grad == 0).all() for parameter in head.parameters())


@pytest.mark.parametrize("sampling", ["random", "ohem"])
def test_a_diverged_head_is_not_silent(small_spec: dict, make_batch: Callable[..., Batch], sampling: str) -> None:
    """Mining must not drop the RoIs whose loss is not a number: training stops on the loss and names the images."""
    head, batch = build(small_spec, sampling=sampling), make_batch(OBJECTS)
    rois, matches = head.rois_for_training(near_objects(batch), batch)
    output = random_output(head, rois)
    broken = HeadOutput(output.class_logits * float("nan"), output.box_deltas)
    assert not head.losses(broken, rois, matches, batch)["head_class"].isfinite()


def test_an_infinite_delta_outside_the_foreground_changes_nothing(
    small_spec: dict, make_batch: Callable[..., Batch]
) -> None:
    head, batch = build(small_spec, sample_count=1000), make_batch(OBJECTS)
    rois, matches = head.rois_for_training(near_objects(batch), batch)
    output = random_output(head, rois)
    deltas = output.box_deltas.clone()
    deltas[~matches.foreground] = float("inf")
    expected = head.losses(output, rois, matches, batch)
    found = head.losses(HeadOutput(output.class_logits, deltas), rois, matches, batch)
    torch.testing.assert_close(found, expected)


def naive_detections(output: HeadOutput, rois: Proposals, image: int, size: tuple[int, int], head: LightHead) -> Any:
    """One class after the other: decode, clip, threshold, nms; then the best of all classes."""
    probabilities = output.class_logits[image].softmax(dim=1)
    rows = []
    for label in range(K):
        deltas = output.box_deltas[image, :, 0 if head.options.class_agnostic else label]
        boxes = clip_boxes_to_image(CODER.decode_single(deltas, rois.boxes[image]), size)
        scores = probabilities[:, label] * rois.scores[image].pow(head.options.objectness)
        good = rois.valid[image] & (scores > head.options.score_threshold)
        good &= (boxes[:, 2] - boxes[:, 0] > 1e-2) & (boxes[:, 3] - boxes[:, 1] > 1e-2)
        boxes, scores = boxes[good], scores[good]
        keep = nms(boxes, scores, head.options.nms_threshold)
        rows += [(float(scores[k]), label, boxes[k]) for k in keep.tolist()]
    return sorted(rows, key=lambda row: row[0], reverse=True)[: head.options.max_detections]


@pytest.mark.parametrize("agnostic", [True, False])
@pytest.mark.parametrize("limits", [(0.001, 30, 0.0), (0.2, 30, 0.0), (0.05, 5, 0.5), (0.0, 1000, 1.0)])
def test_detect_equals_a_loop_over_classes(small_spec: dict, agnostic: bool, limits: tuple[float, int, float]) -> None:
    names = ("score_threshold", "max_detections", "objectness")
    head = build(small_spec, class_agnostic=agnostic, **dict(zip(names, limits, strict=True)))
    rois = random_rois(places=60)
    output = random_output(head, rois)
    sizes = torch.tensor([[64, 96], [40, 60]])
    found = head.detect(output, rois, sizes).per_image()
    for image, size in enumerate(sizes.tolist()):
        boxes, scores, labels = found[image]
        expected = naive_detections(output, rois, image, tuple(size), head)
        assert 0 < len(boxes) == len(expected) <= limits[1]
        assert labels.tolist() == [label for _, label, _ in expected]
        torch.testing.assert_close(scores, torch.tensor([score for score, _, _ in expected]))
        torch.testing.assert_close(boxes, torch.stack([box for _, _, box in expected]), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("class_agnostic", [True, False])
def test_how_many_candidates_are_looked_at_first_changes_nothing(
    small_spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch, class_agnostic: bool
) -> None:
    head = build(small_spec, max_detections=12, class_agnostic=class_agnostic, nms_threshold=0.3)
    proposals, sizes = random_rois(places=60), torch.tensor([[64, 96], [64, 96]])
    output = random_output(head, proposals)
    found = {}
    for few in (1, 4, 1000):  # 1: has to look again several times; 1000: at all of them at once
        monkeypatch.setattr(postprocess, "CANDIDATES_PER_BOX", few)
        found[few] = head.detect(output, proposals, sizes).per_image()
    assert [len(scores) for _, scores, _ in found[1000]] == [12, 12]
    for image in range(2):
        for few in (1, 4):
            assert all(torch.equal(a, b) for a, b in zip(found[few][image], found[1000][image], strict=True))


def test_calibration_changes_scores_alone(small_spec: dict) -> None:
    head, rois, sizes = (
        build(small_spec, max_detections=200),
        random_rois(places=60),
        torch.tensor([[64, 96], [40, 60]]),
    )
    output = random_output(head, rois)
    output.class_logits[0, 0, 0] = 60.0  # a score of 1
    before = head.detect(output, rois, sizes)
    head.calibration = (0.6, -0.5)
    after = head.detect(output, rois, sizes)
    assert all(torch.equal(getattr(before, key), getattr(after, key)) for key in ("boxes", "labels", "counts"))
    expected = torch.sigmoid(0.6 * torch.logit(before.scores.double()) - 0.5)  # logit(0) and logit(1) are infinite
    torch.testing.assert_close(after.scores.double(), expected, rtol=1e-5, atol=1e-7)
    assert (after.scores == 0).any()
    assert after.scores.max() == 1


def test_detect_without_a_valid_roi_finds_nothing(small_spec: dict) -> None:
    head = build(small_spec, score_threshold=0.0)
    nothing = Proposals(torch.zeros(2, 20, 4), torch.zeros(2, 20, dtype=torch.bool), torch.zeros(2, 20))
    found = head.detect(random_output(head, nothing), nothing, torch.tensor([[9, 9], [9, 9]]))
    for boxes, scores, labels in found.per_image():
        assert (boxes.shape, scores.shape, labels.shape) == ((0, 4), (0,), (0,))
        assert labels.dtype == torch.int64


@pytest.mark.parametrize(("key", "value"), [("sampling", "ohme"), ("align_reduce", "median"), ("kernel_size", 6)])
def test_unknown_choices_are_refused_by_name(small_spec: dict, key: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"{key}={value}"):
        build(small_spec, **{key: value})


def test_outputs_are_float32_under_autocast(small_spec: dict) -> None:
    head, rois = build(small_spec), random_rois()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = head(head.thin(torch.randn(2, 12, 4, 6)), rois.boxes)
    assert (output.class_logits.dtype, output.box_deltas.dtype) == (torch.float32, torch.float32)
