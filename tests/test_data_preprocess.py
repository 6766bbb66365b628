"""The resize protocol, padding, and the way back for boxes."""

from __future__ import annotations

import ast
from pathlib import Path

import cv2
import numpy as np
import pytest

from detector.data import preprocess
from detector.data.preprocess import PADDING, Preprocessing, canvas_size, group_by_canvas, pad, prepare, resize, restore
from detector.errors import InputError


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        ((480, 640), (800, 1067)),  # the short side decides
        ((640, 480), (1067, 800)),
        ((400, 1000), (480, 1200)),  # the long side decides
        ((1000, 400), (1200, 480)),
        ((800, 1200), (800, 1200)),
        ((3000, 4000), (800, 1067)),
        ((1, 5000), (1, 1200)),  # never nothing
        ((5000, 1), (1200, 1)),
        ((7, 7), (800, 800)),
    ],
)
def test_target_size_follows_the_800_1200_protocol(original: tuple[int, int], expected: tuple[int, int]) -> None:
    assert Preprocessing(short_side=800, long_side=1200).target_size(*original) == expected


def test_target_size_never_exceeds_the_limits() -> None:
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 3000, (500, 2)).tolist():
        target = Preprocessing(short_side=224, long_side=300).target_size(height, width)
        assert min(target) >= 1
        assert min(target) <= 224
        assert max(target) <= 300
        assert min(target) == 224 or max(target) == 300


@pytest.mark.parametrize("sides", [(0, 10), (-1, 5), (20, 10)])
def test_impossible_sides_are_refused_by_name(sides: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"short_side={sides[0]}\b"):
        Preprocessing.parse({"short_side": sides[0], "long_side": sides[1]})


def test_preprocessing_survives_a_dict() -> None:
    original = Preprocessing(short_side=64, long_side=96)
    assert Preprocessing(**original.to_dict()) == original
    assert original.to_dict() == {"short_side": 64, "long_side": 96}


def test_prepare_resizes_to_the_target() -> None:
    (prepared,) = prepare([picture(48, 64)], Preprocessing(short_side=32, long_side=64))
    assert prepared.image_sizes.tolist() == [[32, 43]]


def test_shrinking_averages_whole_blocks() -> None:
    image = picture(40, 60)
    blocks = image.reshape(10, 4, 15, 4, 3).astype(np.float64).mean(axis=(1, 3))
    assert np.abs(resize(image, 10, 15) - blocks).max() <= 0.51


def test_growing_is_bilinear_about_pixel_centres() -> None:
    image = np.zeros((1, 2, 3), np.uint8)
    image[0, 1] = 200
    assert resize(image, 1, 4)[0, :, 0].tolist() == [0, 50, 150, 200]


def test_same_size_is_untouched() -> None:
    image = picture(32, 48)
    assert np.array_equal(resize(image, 32, 48), image)


def test_canvas_is_the_smallest_multiple_that_holds_all() -> None:
    assert canvas_size([(1, 1)]) == (32, 32)
    assert canvas_size([(32, 64)]) == (32, 64)
    assert canvas_size([(33, 10), (5, 65)]) == (64, 96)


def test_pad_keeps_every_pixel_and_fills_the_rest() -> None:
    images = [picture(20, 40, 1), picture(33, 10, 2)]
    padded = pad(images)
    assert padded.shape == (2, 3, 64, 64)
    assert padded.dtype == np.uint8
    assert padded.transpose(0, 2, 3, 1).flags["C_CONTIGUOUS"]  # as images lie in memory
    for plane, image in zip(padded, images, strict=True):
        height, width = image.shape[:2]
        assert np.array_equal(plane[:, :height, :width], image.transpose(2, 0, 1))
        for channel, fill in enumerate(PADDING):
            assert (plane[channel, height:] == fill).all()
            assert (plane[channel, :, width:] == fill).all()


def test_padding_is_almost_zero_after_normalisation() -> None:
    from detector.models.light_head_rcnn import MEAN, STD

    assert (np.abs((np.array(PADDING) - MEAN) / STD) < 0.02).all()


def test_restore_is_the_inverse_of_the_resize() -> None:
    rng = np.random.default_rng(0)
    for height, width in rng.integers(20, 900, (30, 2)).tolist():
        target = Preprocessing(short_side=128, long_side=200).target_size(height, width)
        scale = np.array([target[1] / width, target[0] / height])
        corner = rng.random((8, 2)) * [width, height] * 0.5
        boxes = np.concatenate((corner, corner + rng.random((8, 2)) * [width, height] * 0.5), axis=1)
        restored = restore((boxes * np.tile(scale, 2)).astype(np.float32), scale, (height, width))
        assert restored.dtype == np.float32
        np.testing.assert_allclose(restored, boxes, atol=1e-3)


def test_restore_follows_a_drawn_rectangle() -> None:
    image = np.zeros((90, 150, 3), np.uint8)
    image[30:60, 45:120] = 255
    resized = resize(image, 60, 100)
    rows, columns = np.nonzero(resized[..., 0] > 127)
    box = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], np.float32)
    scale = np.array([resized.shape[1] / 150, resized.shape[0] / 90])
    np.testing.assert_allclose(restore(box, scale, (90, 150)), [[45, 30, 120, 60]], atol=1.0)


def test_restore_clips_to_the_image_and_takes_none() -> None:
    boxes = np.array([[-5, -5, 500, 500]], np.float32)
    assert restore(boxes, np.array([2.0, 2.0]), (40, 60)).tolist() == [[0, 0, 60, 40]]
    assert restore(np.zeros((0, 4), np.float32), np.ones(2), (4, 4)).shape == (0, 4)
    assert boxes.tolist() == [[-5, -5, 500, 500]]


def test_group_by_canvas_covers_every_image_once_and_gives_nobody_foreign_padding() -> None:
    rng = np.random.default_rng(0)
    sizes = [tuple(size) for size in rng.integers(1, 130, (60, 2)).tolist()]
    groups = group_by_canvas(sizes)
    assert sorted(index for group in groups for index in group) == list(range(60))
    for group in groups:
        assert len({canvas_size([sizes[i]]) for i in group}) == 1
    assert len(groups) == len({canvas_size([size]) for size in sizes})
    assert group_by_canvas([]) == []


def test_images_are_resized_in_one_place_only() -> None:
    """A second resize somewhere would make training and prediction see different images."""
    package = Path(preprocess.__file__).parents[1]
    allowed = {
        "data/preprocess.py",
        "models/neck.py",  # upsamples a feature map
        "models/ps_roi_align.py",  # samples a feature map
        "data/scenes.py",  # draws the embedded images
        "data/image_folder.py",  # views of a classifier; no detector sees them
    }
    names = {"resize", "interpolate", "thumbnail", "grid_sample", "warpAffine", "Resize", "upsample", "zoom"}
    found = {}
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names):
                continue
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if owner != "preprocess":
                found.setdefault(path.relative_to(package).as_posix(), []).append(node.lineno)
    assert set(found) <= allowed, found
    assert "data/preprocess.py" in found


@pytest.mark.parametrize(
    ("original", "target", "how"),
    [
        ((50, 70), (26, 40), cv2.INTER_LINEAR),
        ((50, 70), (25, 40), cv2.INTER_AREA),
        ((50, 70), (80, 100), cv2.INTER_LINEAR),
        ((53, 71), (20, 27), cv2.INTER_AREA),  # no whole number divides the sides
    ],
)
def test_a_resize_in_one_step_is_opencvs(original: tuple[int, int], target: tuple[int, int], how: int) -> None:
    image = picture(*original)
    assert np.array_equal(resize(image, *target), cv2.resize(image, target[::-1], interpolation=how))


@pytest.mark.parametrize("whole", [2, 3, 5])
def test_shrinking_by_a_whole_number_averages_squares(whole: int) -> None:
    image = picture(8 * whole, 11 * whole)
    mean = image.reshape(8, whole, 11, whole, 3).astype(np.float64).mean(axis=(1, 3))
    assert np.abs(resize(image, 8, 11) - mean).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("target", [(90, 150), (70, 117), (40, 66), (36, 60), (19, 31), (12, 20), (200, 333)])
@pytest.mark.parametrize("original", [(120, 200), (119, 199), (96, 160)])
def test_a_resize_moves_nothing(original: tuple[int, int], target: tuple[int, int]) -> None:
    """A ramp stays the same ramp, measured in shares of the image, whichever steps a size takes."""
    for axis in (0, 1):
        places = [(np.arange(sides[axis]) + 0.5) / sides[axis] for sides in (original, target)]
        ramps = [np.expand_dims(250 * place, (1 - axis, 2)) for place in places]
        image = np.broadcast_to(ramps[0].round().astype(np.uint8), (*original, 3))
        found = resize(np.ascontiguousarray(image), *target).astype(np.float64)
        inside = np.abs(places[1] - 0.5) < 0.48  # where it grows, the outermost pixels repeat
        error = np.abs(found - ramps[1]).take(np.flatnonzero(inside), axis=axis)
        assert error.max() < 1.5  # two roundings; a shift by half a pixel would be 250 / (2 * 120)
        assert np.abs(error.mean()) < 0.6
