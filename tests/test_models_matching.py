"""Matching against a loop over boxes and against torchvision's Matcher; sampling by counting."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from detector.models.matching import Matches, gather_boxes, match, sample


def objects(boxes: torch.Tensor, labels: torch.Tensor, crowd: torch.Tensor) -> Any:
    """The part of a batch that boxes are matched with."""
    return SimpleNamespace(boxes=boxes, labels=labels, crowd=crowd)


def random_boxes(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * 60
    return torch.cat((corner, corner + torch.rand(*shape, 2, generator=generator) * 40 + 2), dim=-1)


def overlap(a: list[float], b: list[float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def area(a: list[float]) -> float:
    return (a[2] - a[0]) * (a[3] - a[1])


def iou(a: list[float], b: list[float]) -> float:
    return overlap(a, b) / (area(a) + area(b) - overlap(a, b))


def naive(boxes, gt, labels, crowd, *, high: float, low: float, best: bool) -> list[tuple[str, int | None]]:
    """State and object of each box of one image, by the words of Ren et al. 2015, section 3.1.2."""
    real = [j for j in range(len(gt)) if labels[j] >= 0 and not crowd[j]]
    table = [[iou(box, gt[j]) for j in real] for box in boxes]
    best_of = [max(row[k] for row in table) for k in range(len(real))]
    result: list[tuple[str, int | None]] = []
    for box, row in zip(boxes, table, strict=True):
        top = max(row, default=0.0)
        wins = best and any(value > 0 and value == best_of[k] for k, value in enumerate(row))
        if real and (top >= high or wins):
            result.append(("foreground", real[row.index(top)]))
        elif top < low:
            covered = any(crowd[j] and overlap(box, gt[j]) / area(box) >= 0.5 for j in range(len(gt)))
            result.append(("ignored", None) if covered else ("background", None))
        else:
            result.append(("ignored", None))
    return result


def states(matches: Matches, image: int) -> list[tuple[str, int | None]]:
    result: list[tuple[str, int | None]] = []
    for index, foreground, background in zip(
        matches.index[image].tolist(), matches.foreground[image], matches.background[image], strict=True
    ):
        assert not (foreground and background)
        state = "foreground" if foreground else "background" if background else "ignored"
        result.append((state, index if foreground else None))
    return result


@pytest.mark.parametrize(("high", "low", "best"), [(0.7, 0.3, True), (0.5, 0.5, False), (0.6, 0.4, True)])
@pytest.mark.parametrize("shared_boxes", [True, False])
def test_equals_a_loop(high: float, low: float, best: bool, shared_boxes: bool) -> None:
    gt = random_boxes(4, 6, seed=1).double()
    boxes = random_boxes(80, seed=2).double() if shared_boxes else random_boxes(4, 80, seed=2).double()
    labels = torch.tensor([[0, 1, 2, 0, 1, 1], [3, 1, -1, -1, -1, -1], [-1] * 6, [0, 2, 1, -1, -1, -1]])
    crowd = torch.zeros(4, 6, dtype=torch.bool)
    crowd[0, 2] = crowd[3, 0] = True
    found = match(boxes, objects(gt, labels, crowd), foreground_iou=high, background_iou=low, best_is_foreground=best)
    seen = set()
    for image in range(4):
        own = boxes if shared_boxes else boxes[image]
        expected = naive(
            own.tolist(),
            gt[image].tolist(),
            labels[image].tolist(),
            crowd[image].tolist(),
            high=high,
            low=low,
            best=best,
        )
        assert states(found, image) == expected
        seen |= {state for state, _ in expected}
    assert seen == {"foreground", "background", "ignored"}


@pytest.mark.parametrize("best", [True, False])
def test_equals_torchvision_matcher(best: bool) -> None:
    boxes, gt = random_boxes(200, seed=3), random_boxes(2, 5, seed=4)
    found = match(
        boxes,
        objects(gt, torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.bool)),
        foreground_iou=0.6,
        background_iou=0.3,
        best_is_foreground=best,
    )
    for image in range(2):
        expected = Matcher(0.6, 0.3, allow_low_quality_matches=best)(box_iou(gt[image], boxes))
        assert torch.equal(found.background[image], expected == Matcher.BELOW_LOW_THRESHOLD)
        assert torch.equal(found.foreground[image], expected >= 0)
        assert torch.equal(found.index[image][expected >= 0], expected[expected >= 0])


def single(boxes, gt, *, label: int = 0, crowd: bool = False, best: bool = True) -> list[tuple[str, int | None]]:
    return states(
        match(
            torch.tensor(boxes),
            objects(torch.tensor([gt]), torch.full((1, len(gt)), label), torch.full((1, len(gt)), crowd)),
            foreground_iou=0.7,
            background_iou=0.3,
            best_is_foreground=best,
        ),
        0,
    )


def test_thresholds_belong_to_the_upper_side() -> None:
    ten = [[0.0, 0.0, 10.0, 10.0]]
    exact = [[0.0, 0.0, 10.0, 5.0]]  # IoU 0.5
    found = match(
        torch.tensor(exact),
        objects(torch.tensor([ten]), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.bool)),
        foreground_iou=0.5,
        background_iou=0.5,
        best_is_foreground=False,
    )
    assert states(found, 0) == [("foreground", 0)]


def test_best_box_of_an_object_is_foreground_however_low() -> None:
    boxes = [[0.0, 0.0, 64.0, 64.0], [100.0, 100.0, 164.0, 164.0]]
    small = [[2.0, 2.0, 6.0, 6.0]]
    assert single(boxes, small) == [("foreground", 0), ("background", None)]
    assert single(boxes, small, best=False) == [("background", None)] * 2


def test_all_boxes_that_tie_for_best_are_foreground() -> None:
    boxes = [[0.0, 0.0, 10.0, 20.0], [0.0, 0.0, 20.0, 10.0], [50.0, 50.0, 60.0, 60.0]]
    assert single(boxes, [[0.0, 0.0, 10.0, 10.0]]) == [("foreground", 0), ("foreground", 0), ("background", None)]


def test_an_object_that_no_box_touches_makes_no_foreground() -> None:
    assert (
        single([[0.0, 0.0, 5.0, 5.0], [5.0, 0.0, 9.0, 5.0]], [[50.0, 50.0, 60.0, 60.0]]) == [("background", None)] * 2
    )


def test_an_object_without_size_makes_no_foreground() -> None:
    assert single([[0.0, 0.0, 5.0, 5.0]], [[2.0, 2.0, 2.0, 4.0]]) == [("background", None)]


def test_padded_places_match_nothing() -> None:
    assert single([[0.0, 0.0, 5.0, 5.0]], [[0.0, 0.0, 5.0, 5.0]], label=-1) == [("background", None)]


def test_crowds_match_nothing_and_hide_what_is_half_inside() -> None:
    boxes = [[0.0, 0.0, 10.0, 10.0], [15.0, 0.0, 25.0, 10.0], [16.0, 0.0, 26.0, 10.0], [50.0, 50.0, 60.0, 60.0]]
    crowd = [[0.0, 0.0, 20.0, 20.0]]
    states_ = [state for state, _ in single(boxes, crowd, crowd=True)]
    assert states_ == ["ignored", "ignored", "background", "background"]  # covered 1, 0.5, 0.4, 0


def test_an_object_inside_a_crowd_is_still_found() -> None:
    found = match(
        torch.tensor([[0.0, 0.0, 10.0, 10.0]]),
        objects(
            torch.tensor([[[0.0, 0.0, 50.0, 50.0], [0.0, 0.0, 10.0, 10.0]]]),
            torch.tensor([[0, 1]]),
            torch.tensor([[True, False]]),
        ),
        foreground_iou=0.7,
        background_iou=0.3,
        best_is_foreground=False,
    )
    assert states(found, 0) == [("foreground", 1)]


def test_gather_boxes() -> None:
    boxes = random_boxes(2, 3, seed=5)
    index = torch.tensor([[0, 2, 2], [1, 0, 1]])
    expected = torch.stack([boxes[n][index[n]] for n in range(2)])
    assert torch.equal(gather_boxes(boxes, index), expected)


def matches_of(foreground: torch.Tensor, background: torch.Tensor) -> Matches:
    return Matches(torch.zeros(foreground.shape, dtype=torch.long), foreground, background)


@pytest.mark.parametrize(
    ("available", "wanted"),
    [
        ((40, 150), (16, 16)),  # plenty of both
        ((5, 150), (5, 27)),  # background fills up
        ((0, 150), (0, 32)),
        ((40, 3), (16, 3)),  # foreground never exceeds its share
        ((0, 0), (0, 0)),
    ],
)
def test_sample_counts(available: tuple[int, int], wanted: tuple[int, int]) -> None:
    foreground, background = torch.zeros(2, 1, 200, dtype=torch.bool)
    foreground[0, : available[0]] = True
    background[0, 50 : 50 + available[1]] = True
    chosen = sample(matches_of(foreground, background), count=32, foreground_share=0.5)
    assert (int(chosen[0].sum()), int(chosen[1].sum())) == wanted
    assert not (chosen[0] & ~foreground).any()
    assert not (chosen[1] & ~background).any()


def test_sample_counts_are_per_image_and_may_exceed_the_boxes() -> None:
    foreground = torch.tensor([[True, True, True, False, False], [False] * 5])
    background = ~foreground
    chosen = sample(matches_of(foreground, background), count=256, foreground_share=0.5)
    assert torch.equal(chosen[0], foreground)
    assert torch.equal(chosen[1], background)


def test_sample_is_uniform_and_follows_the_seed() -> None:
    foreground = torch.zeros(500, 12, dtype=torch.bool)
    foreground[:, :4] = True
    matches = matches_of(foreground, ~foreground)
    torch.manual_seed(0)
    first = sample(matches, count=4, foreground_share=0.5)
    torch.manual_seed(0)
    again = sample(matches, count=4, foreground_share=0.5)
    other = sample(matches, count=4, foreground_share=0.5)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[1], other[1])
    # 500 draws of 2 from 4 and of 2 from 8: five standard deviations around the mean.
    assert (first[0][:, :4].sum(0) - 250).abs().max() < 5 * (500 * 0.5 * 0.5) ** 0.5
    assert (first[1][:, 4:].sum(0) - 125).abs().max() < 5 * (500 * 0.25 * 0.75) ** 0.5
