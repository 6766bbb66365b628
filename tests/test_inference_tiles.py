"""Tiles and mirror images: what several looks show of known rectangles becomes those rectangles, each once."""

from __future__ import annotations

import numpy as np
import pytest

from detector.errors import InputError
from detector.inference.detections import Found
from detector.inference.tiles import Tiling, merge_flipped, merge_tiles, mirror_boxes

SIZE = (300, 500)  # height and width
WHOLE = np.array([[0, 0, 500, 300]])


def found(*rows: tuple[float, ...]) -> Found:
    """(x1, y1, x2, y2, score, label) ..."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    return Found(table[:, :4].astype(np.float32), table[:, 4].astype(np.float32), table[:, 5].astype(np.int64))


def rows(merged: Found) -> list[tuple[float, ...]]:
    parts = (part.tolist() for part in (merged.boxes, merged.scores, merged.labels))
    return sorted((*box, round(score, 5), label) for box, score, label in zip(*parts, strict=True))


def look(objects: list[tuple[float, ...]], region: np.ndarray) -> Found:
    """What a perfect detector shows of objects in a region: the part of each that lies in it."""
    x1, y1, x2, y2 = region
    parts = [(max(row[0], x1), max(row[1], y1), min(row[2], x2), min(row[3], y2), *row[4:]) for row in objects]
    return found(*(part for part in parts if part[0] < part[2] and part[1] < part[3]))


@pytest.mark.parametrize("tile", [(200, 150, 40), (101, 77, 0), (160, 299, 159), (499, 300, 13), (50, 40, 39)])
def test_tiles_cover_the_image_and_overlap(tile: tuple[int, int, int]) -> None:
    width, height, overlap = tile
    regions = Tiling.parse(tile).regions(*SIZE)
    seen = np.zeros(SIZE, int)
    for x1, y1, x2, y2 in regions:
        assert (x2 - x1, y2 - y1) == (min(width, 500), min(height, 300))
        assert 0 <= x1 < x2 <= 500
        assert 0 <= y1 < y2 <= 300
        seen[y1:y2, x1:x2] += 1
    assert seen.min() >= 1
    for side in (0, 1):
        starts, ends = np.unique(regions[:, side]), np.unique(regions[:, side + 2])
        assert (ends[:-1] - starts[1:] >= overlap).all()


def test_an_image_that_one_tile_holds_has_none() -> None:
    assert len(Tiling(500, 300, 0).regions(*SIZE)) == 0
    assert len(Tiling(499, 300, 0).regions(*SIZE)) == 2
    assert Tiling(10, 10, 2).regions(1, 20).tolist() == [[0, 0, 10, 1], [5, 0, 15, 1], [10, 0, 20, 1]]


@pytest.mark.parametrize(
    "tile", [(640, 640), (640, 640, 640), (0, 640, 0), (640, 640, -1), (640.5, 640, 1), "640", 640, (True, 9, 0)]
)
def test_a_tile_that_cannot_be(tile: object) -> None:
    with pytest.raises(InputError, match=r"tile=.*expected \(width, height, overlap\)"):
        Tiling.parse(tile)  # type: ignore[arg-type]


def scene(rng: np.random.Generator, low: int, high: int) -> list[tuple[float, ...]]:
    """Rectangles of three classes, sides from low to high, that overlap no other."""
    objects: list[tuple[float, ...]] = []
    for _ in range(200):
        width, height = rng.integers(low, high + 1, 2)
        x, y = rng.integers(0, 500 - width + 1), rng.integers(0, 300 - height + 1)
        apart = all(x >= o[2] or y >= o[3] or x + width <= o[0] or y + height <= o[1] for o in objects)
        if apart and len(objects) < 14:
            objects.append((x, y, x + width, y + height, round(rng.uniform(0.4, 1), 3), int(rng.integers(3))))
    return objects


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("sides", "whole_sees"),
    [((5, 40), True), ((5, 40), False), ((45, 120), True), ((45, 120), False), ((5, 280), True)],
    ids=["small", "small, only tiles", "across seams", "across seams, only tiles", "any"],
)
def test_every_object_is_found_once_and_whole(sides: tuple[int, int], whole_sees: bool, seed: int) -> None:
    """Tiles of 200 x 150 that overlap by 44: smaller objects are whole somewhere, larger ones are cut everywhere."""
    objects = scene(np.random.default_rng(seed), *sides)
    regions = np.concatenate((WHOLE, Tiling(200, 150, 44).regions(*SIZE)))
    looks = [look(objects, region) for region in regions]
    assert sum(len(one) for one in looks[1:]) > len(objects)  # there is something to merge
    if not whole_sees:
        looks[0] = found()
    merged = merge_tiles(looks, regions, SIZE)
    assert rows(merged) == sorted(map(tuple, [(*map(float, o[:4]), o[4], o[5]) for o in objects]))
    assert (np.diff(merged.scores) <= 0).all()
    assert [part.dtype for part in (merged.boxes, merged.scores, merged.labels)] == [np.float32, np.float32, np.int64]


def test_what_one_look_kept_apart_stays_apart() -> None:
    """A network with a loose threshold of its own shows two that overlap: tiles do not undo that."""
    regions = np.concatenate((WHOLE, Tiling(260, 300, 20).regions(*SIZE)))
    pair = [(50, 50, 100, 100, 0.9, 0), (55, 50, 105, 100, 0.8, 0)]
    merged = merge_tiles([look(pair, region) for region in regions], regions, SIZE)
    assert rows(merged) == [(50, 50, 100, 100, 0.9, 0), (55, 50, 105, 100, 0.8, 0)]


def test_classes_do_not_suppress_each_other_and_noise_suppresses_nothing() -> None:
    regions = np.concatenate((WHOLE, Tiling(260, 300, 20).regions(*SIZE)))  # seams at x = 260 and x = 240
    cut = (180.0, 50.0, 260.0, 100.0, 0.9, 0)
    other_class, noise, sure = ((170.0, 40.0, 300.0, 110.0, score, label) for score, label in
                                ((0.9, 1), (0.1, 0), (0.6, 0)))  # fmt: skip
    for whole, expected in ((other_class, [other_class, cut]), (noise, [noise, cut]), (sure, [sure])):
        merged = merge_tiles([found(whole), found(cut), found()], regions, SIZE)
        assert rows(merged) == sorted((*box, round(score, 5), label) for *box, score, label in expected)


def test_the_side_of_the_image_is_no_seam() -> None:
    regions = np.concatenate((WHOLE, Tiling(260, 300, 20).regions(*SIZE)))
    at_border = (0.0, 0.0, 60.0, 300.0, 0.5, 2)
    merged = merge_tiles([found(), found(at_border), found()], regions, SIZE)
    assert rows(merged) == [at_border]
    around = (11.0, 7.0, 220.0, 293.0, 0.9, 2)  # holds most of it, but is something else: IoU 0.22
    assert rows(merge_tiles([found(around), found(at_border), found()], regions, SIZE)) == [at_border, around]
    assert rows(merge_tiles([found(), found(), found()], regions, SIZE)) == []


def test_mirror_twice_is_the_same() -> None:
    boxes = np.array([[0, 2, 10, 5], [90, 0, 100, 1]], np.float32)
    assert mirror_boxes(boxes, 100).tolist() == [[90, 2, 100, 5], [0, 0, 10, 1]]
    np.testing.assert_array_equal(mirror_boxes(mirror_boxes(boxes, 100), 100), boxes)


def test_pairs_are_averaged_and_singles_lose_half() -> None:
    straight = found((0, 0, 10, 10, 0.9, 0), (50, 50, 60, 60, 0.6, 1), (0, 0, 10, 10, 0.2, 2))
    mirrored = found((2, 0, 12, 10, 0.6, 0), (0, 0, 10, 10, 0.4, 1))
    assert rows(merge_flipped(straight, mirrored)) == [
        (0, 0, 10, 10, 0.1, 2),
        (0, 0, 10, 10, 0.2, 1),
        (pytest.approx(0.8), 0, pytest.approx(10.8), 10, 0.75, 0),  # (0 * 0.9 + 2 * 0.6) / 1.5
        (50, 50, 60, 60, 0.3, 1),
    ]


def test_each_box_has_one_partner_at_most() -> None:
    straight = found((0, 0, 10, 10, 0.9, 0), (1, 0, 11, 10, 0.8, 0))
    mirrored = found((0, 0, 10, 10, 0.7, 0))
    assert rows(merge_flipped(straight, mirrored)) == [(0, 0, 10, 10, 0.8, 0), (1, 0, 11, 10, 0.4, 0)]
    assert rows(merge_flipped(found(), mirrored)) == [(0, 0, 10, 10, 0.35, 0)]
    assert rows(merge_flipped(found(), found())) == []
