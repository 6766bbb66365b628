"""Pixels and boxes move together; nothing that is drawn makes a canvas larger, or loses what must not be lost."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from detector.data.preprocess import PADDING, Preprocessing, resize
from detector.data.transforms import AugmentOptions, TrainTransform, Transformed, process_rank
from detector.data.windows import crop_by_iou
from detector.errors import InputError

pytestmark = pytest.mark.filterwarnings("error")

STILL: dict[str, Any] = {
    "flip": 0.0,
    "vertical_flip": 0.0,
    "scale": (1.0, 1.0),
    "photometric": 0.0,
    "crop": 0.0,
    "rotate90": 0.0,
    "iou_crop": 0.0,
    "zoom_out": 0.0,
    "stretch": (1.0, 1.0),
    "batch_scale": (1.0, 1.0),
    "mosaic": 0.0,
}
ALL: dict[str, Any] = {
    "flip": 0.5,
    "vertical_flip": 0.5,
    "scale": (0.5, 2.0),
    "photometric": 1.0,
    "crop": 0.5,
    "rotate90": 0.5,
    "iou_crop": 0.5,
    "zoom_out": 0.3,
    "stretch": (0.7, 1.5),
}


def train_transform(short_side: int, long_side: int, *, seed: int = 0, **options: Any) -> TrainTransform:
    """With these draws and no others."""
    return TrainTransform(
        Preprocessing(short_side=short_side, long_side=long_side), AugmentOptions(**STILL | options), seed=seed
    )


NONE = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool)
# One channel each, so that the pixels say where a box must be.
BOXES = np.array([[20, 30, 60, 50], [90, 10, 110, 70], [40, 80, 100, 100]], np.float32)


def scene(height: int = 120, width: int = 160) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A black image with a red, a green and a blue rectangle, and their boxes."""
    image = np.zeros((height, width, 3), np.uint8)
    for channel, (x1, y1, x2, y2) in enumerate(BOXES.astype(int)):
        image[y1:y2, x1:x2, channel] = 255
    return image, BOXES.copy(), np.array([0, 1, 2]), np.array([False, False, True])


def extent(channel: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(channel > 127)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def is_valid(result: Transformed) -> bool:
    height, width = result.image.shape[:2]
    count = len(result.boxes)
    sides = result.boxes[:, 2:] - result.boxes[:, :2]
    return (
        result.image.dtype == np.uint8
        and result.image.flags.c_contiguous
        and result.boxes.shape == (count, 4)
        and [str(part.dtype) for part in result[1:4]] == ["float32", "int64", "bool"]
        and result.labels.shape == result.crowd.shape == (count,)
        and bool((result.boxes >= 0).all() and (result.boxes <= [width, height, width, height]).all())
        and bool((sides >= 1).all())
    )


def test_training_without_draws_resizes_and_nothing_else() -> None:
    image, *objects = scene()
    transform = train_transform(60, 100)
    result = transform(image, *objects)
    np.testing.assert_array_equal(result.image, resize(image, 60, 80))
    assert result.image.shape == (60, 80, 3)
    assert result.scale.tolist() == [0.5, 0.5]
    np.testing.assert_allclose(result.boxes, BOXES / 2, atol=1e-3)
    np.testing.assert_array_equal(result.labels, objects[1])
    np.testing.assert_array_equal(result.crowd, objects[2])
    for label, box in zip(result.labels, result.boxes, strict=True):
        np.testing.assert_allclose(extent(result.image[..., label]), box, atol=1)
    assert is_valid(transform(image, *NONE))


@pytest.mark.parametrize("name", ["flip", "vertical_flip", "rotate90", "crop", "scale"])
def test_boxes_follow_the_pixels(name: str) -> None:
    transform = train_transform(120, 160, **{name: (0.5, 0.95) if name == "scale" else 1.0})
    image, *objects = scene()
    pictures = set()
    for _ in range(20):
        result = transform(image, *objects)
        assert is_valid(result)
        assert sorted(result.labels) == [0, 1, 2]
        pictures.add(result.image.tobytes())
        for label, box in zip(result.labels, result.boxes, strict=True):
            np.testing.assert_allclose(extent(result.image[..., label]), box, atol=1.5)
    if name in ("crop", "scale"):
        assert len(pictures) > 10
    else:
        assert len(pictures) == (4 if name == "rotate90" else 1)


def test_everything_at_once_stays_valid_and_within_the_canvas() -> None:
    transform = train_transform(96, 128, **ALL)
    image, *objects = scene()
    crowds = 0
    for _ in range(200):
        result = transform(image, *objects)
        assert is_valid(result)
        assert min(result.image.shape[:2]) <= 96
        assert max(result.image.shape[:2]) <= 128
        np.testing.assert_array_equal(result.crowd, result.labels == 2)
        crowds += int(result.crowd.sum())
    assert crowds > 100
    assert all(is_valid(transform(image, *NONE)) and not len(transform(image, *NONE).boxes) for _ in range(20))


def test_zooming_in_keeps_the_size_and_what_can_be_seen() -> None:
    transform = train_transform(120, 160, **{"scale": (2.0, 2.0)})
    image, *objects = scene()
    full = BOXES.astype(np.float64) * 2
    areas = (full[:, 2:] - full[:, :2]).prod(axis=1)
    kept: Counter[int] = Counter()
    for _ in range(60):
        result = transform(image, *objects)
        assert result.image.shape == (120, 160, 3)
        assert result.scale.tolist() == [2, 2]
        shown = [(result.image[..., channel] > 127).sum() / areas[channel] for channel in range(3)]
        assert all(
            (label in result.labels) == (shown[label] >= 0.3) for label in (0, 1) if abs(shown[label] - 0.3) > 0.03
        )
        assert (2 in result.labels) == (shown[2] > 0)  # a crowd region stays, however little of it is in sight
        kept.update(result.labels.tolist())
        for label, box in zip(result.labels, result.boxes, strict=True):
            np.testing.assert_allclose(extent(result.image[..., label]), box, atol=1.5)
    assert all(0 < kept[label] < 60 for label in (0, 1))


def test_zooming_out_never_exceeds_and_spreads_over_the_range() -> None:
    transform = train_transform(120, 160, **{"scale": (0.25, 4.0)})
    image, *objects = scene()
    factors = np.array([transform(image, *objects).scale[0] for _ in range(300)])
    assert factors.min() < 0.3
    assert factors.max() > 3.5
    assert 0.4 < (factors < 1).mean() < 0.6  # uniform in the logarithm


def test_crop_keeps_every_object_whole_even_thin_ones() -> None:
    transform = train_transform(100, 100, **{"crop": 1.0, "scale": (1.0, 1.0)})
    image = np.zeros((100, 100, 3), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(100):
        x, y = rng.uniform(0, 99.4, 2)
        thin = np.array([[x, y, x + 0.6, min(y + 30, 100)]], np.float32)
        result = transform(image, thin, np.array([5]), np.array([False]))
        assert is_valid(result)
        sides = (thin[0, 2:] - thin[0, :2]) * result.scale
        if (sides > 1.001).all():
            assert result.labels.tolist() == [5]
            np.testing.assert_allclose(result.boxes[0, 2:] - result.boxes[0, :2], sides, atol=0.01)


CUTTING: dict[str, Any] = {
    "iou_crop": {"iou_crop": 1.0},
    "zoom_out": {"zoom_out": 1.0},
    "stretch": {"stretch": (0.5, 2.0)},
    "all": ALL | {"photometric": 0.0, "iou_crop": 1.0, "zoom_out": 0.5},
}


@pytest.mark.parametrize("name", CUTTING)
def test_boxes_end_where_the_pixels_do(name: str) -> None:
    """Of objects that are cut off as well; and what is left out has little or nothing in sight."""
    transform = train_transform(120, 160, **CUTTING[name])
    image, *objects = scene()
    kept: Counter[int] = Counter()
    for _ in range(100):
        result = transform(image, *objects)
        assert is_valid(result)
        assert min(result.image.shape[:2]) <= 120
        assert max(result.image.shape[:2]) <= 160
        np.testing.assert_array_equal(result.crowd, result.labels == 2)
        kept.update(result.labels.tolist())
        for label, box in zip(result.labels, result.boxes, strict=True):
            if (box[2:] - box[:2] >= 3).all():  # else hardly a pixel is bright enough
                np.testing.assert_allclose(extent(result.image[..., label]), box, atol=1.5)
        if 2 not in result.labels:  # a crowd region
            assert (result.image[..., 2] > 200).sum() < 60
    assert min(kept[label] for label in range(3)) > (90 if name in ("zoom_out", "stretch") else 20)


def coordinates(height: int, width: int) -> np.ndarray:
    """An image whose pixels say where they are: x in the first channel, y in the second."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, 0 * rows], axis=2).astype(np.uint8)


def test_a_crop_by_iou_is_what_torchvision_would_accept_and_return() -> None:
    generator = np.random.default_rng(0)
    image = coordinates(120, 160)
    crowd = np.array([False, False, True])
    for _ in range(200):
        view, cut, rows = crop_by_iou(image, BOXES, crowd, generator)
        left, top = view[0, 0, :2].tolist()
        height, width = view.shape[:2]
        window = [left, top, left + width, top + height]
        assert 36 <= height <= 120
        assert 48 <= width <= 160
        assert 0.5 <= width / height <= 2
        centres = (BOXES[:, :2] + BOXES[:, 2:]) / 2
        held = ((centres > window[:2]) & (centres < window[2:])).all(axis=1)
        assert held[:2].any()
        theirs, _ = F.crop_bounding_boxes(
            torch.from_numpy(BOXES), tv_tensors.BoundingBoxFormat.XYXY, top, left, height, width
        )
        ok = held | (crowd & (theirs[:, 2:] > theirs[:, :2]).all(dim=1).numpy())
        assert rows.tolist() == np.flatnonzero(ok).tolist()
        np.testing.assert_allclose(cut, theirs[rows], atol=1e-5)


def test_crops_by_iou_are_distributed_as_torchvisions() -> None:
    generator = np.random.default_rng(0)
    image = coordinates(120, 160)
    ours = []
    for _ in range(200):
        view, _, rows = crop_by_iou(image, BOXES, np.zeros(3, bool), generator)
        ours.append((*view.shape[:2], *view[0, 0, :2], len(rows)))
    theirs = []
    torch.manual_seed(0)
    reference = v2.RandomIoUCrop(sampler_options=[0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
    boxes = tv_tensors.BoundingBoxes(BOXES, format="XYXY", canvas_size=(120, 160))  # type: ignore[call-overload]
    for _ in range(200):
        found = reference.make_params([torch.zeros(3, 120, 160), boxes])
        inside = int(found["is_within_crop_area"].sum())
        theirs.append((found["height"], found["width"], found["left"], found["top"], inside))
    for mine, their in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        error = ((np.var(mine) + np.var(their)) / 200) ** 0.5
        assert abs(np.mean(mine) - np.mean(their)) < 3.5 * error + 0.5 * (max(their) > 10)  # they round down
        assert np.std(mine) == pytest.approx(np.std(their), rel=0.25)


def test_a_crop_by_iou_without_objects_and_of_a_long_image() -> None:
    generator = np.random.default_rng(0)
    views = {crop_by_iou(coordinates(120, 160), *NONE[::2], generator)[0].shape for _ in range(20)}
    assert len(views) > 15
    image = np.zeros((10, 100, 3), np.uint8)  # no window is at most twice as long as wide
    view, boxes, rows = crop_by_iou(image, BOXES, np.zeros(3, bool), generator)
    assert view is image
    np.testing.assert_array_equal(boxes, BOXES)
    assert rows.tolist() == [0, 1, 2]


def test_zooming_out_is_uniform_and_anywhere_on_the_canvas() -> None:
    """SSD's expansion: 1 to 4 times the sides, and the canvas has the mean colour."""
    transform = train_transform(120, 160, zoom_out=1.0, zoom_out_factor=3.0)
    image = np.full((240, 320, 3), 255, np.uint8)
    whole = np.array([[0, 0, 320, 240]], np.float32), np.array([0]), np.array([False])
    results = [transform(image, *whole) for _ in range(300)]
    assert {result.image.shape for result in results} == {(120, 160, 3)}
    for result in results[:50]:
        left, top, right, bottom = result.boxes[0].astype(int)
        assert (result.image[top:bottom, left:right] == 255).all()
        result.image[top:bottom, left:right] = PADDING
        assert (result.image == PADDING).all()
    factors = np.sort([1 / (2 * result.scale[0]) for result in results])
    assert np.abs(factors - np.linspace(1, 3, 300)).max() < 0.2  # Kolmogorov-Smirnov, 0.1% at 0.11 of the range
    boxes = np.array([result.boxes[0] for result in results])
    room = 120 - (boxes[:, 3] - boxes[:, 1])
    share = np.sort((boxes[:, 1] / room)[room > 20])
    assert np.abs(share - np.linspace(0, 1, len(share))).max() < 0.13


def test_the_size_factor_of_a_batch() -> None:
    """On top of what is drawn for an image, and above 1 its canvas is larger than evaluation's."""
    transform = train_transform(120, 160, batch_scale=(0.5, 1.5), **CUTTING["all"] | {"rotate90": 0.0})
    assert transform.batch_factors() == [0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6]  # 64, 96 ... pixels; 80 and 240 rounded
    assert train_transform(120, 160, batch_scale=(0.9, 0.9)).batch_factors() == [0.9]
    image, *objects = scene()
    for factor in (0.4, 1.6):
        largest = 0
        for _ in range(50):
            result = transform(image, *objects, factor)
            assert is_valid(result)
            largest = max(largest, *result.image.shape[:2])
            for label, box in zip(result.labels, result.boxes, strict=True):
                if (box[2:] - box[:2] >= 3).all():
                    np.testing.assert_allclose(extent(result.image[..., label]), box, atol=1.5)
        assert largest == 160 * factor


def test_a_mosaic_has_four_images_and_their_boxes_follow() -> None:
    """Each has one rectangle of its own colour; the last is a crowd region, and the third image is upright."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)
    views = []
    for i, colour in enumerate(colours):
        image = np.zeros((160, 120, 3) if i == 2 else (120, 160, 3), np.uint8)
        image[30:90, 20:100] = colour
        views.append((image, np.array([[20, 30, 100, 90]], np.float32), np.array([i]), np.array([i == 3])))
    palette = np.array([*colours, PADDING, (0, 0, 0)], np.float64)
    transform = train_transform(60, 80, mosaic=1.0, flip=0.5, vertical_flip=0.5, crop=1.0, iou_crop=1.0, zoom_out=1.0)
    kept: Counter[int] = Counter()
    corners = set()
    for _ in range(100):
        result = transform(*views[0], 1.5, views[1:])
        assert is_valid(result)
        assert result.image.shape == (90, 120, 3)
        np.testing.assert_array_equal(result.crowd, result.labels == 3)
        nearest = np.linalg.norm(result.image[:, :, None] - palette, axis=3).argmin(axis=2)
        for label, box in zip(result.labels, result.boxes, strict=True):
            if (box[2:] - box[:2] >= 3).all():
                np.testing.assert_allclose(extent(255 * (nearest == label)), box, atol=1.5)
        kept.update(result.labels.tolist())
        corners.add(result.image[0, 0].tobytes())
        assert 3 in result.labels or (nearest == 3).sum() < 60
    assert min(kept[label] for label in range(4)) > 40
    assert len(corners) > 1
    assert is_valid(transform(image, *NONE, 1.0, [(image, *NONE)] * 3))


def test_partners_of_a_mosaic_are_any_images() -> None:
    transform = train_transform(60, 80, mosaic=0.25)
    drawn = [transform.partners(5) for _ in range(400)]
    assert {len(partners) for partners in drawn} == {0, 3}
    assert 60 < sum(map(bool, drawn)) < 140
    assert min(Counter(i for partners in drawn for i in partners).values()) > 30


def save_pipeline(path: Path, *steps: Any) -> str:
    A.save(A.Compose(list(steps), seed=3), path, data_format="yaml")
    return str(path)


def test_the_users_own_pipeline_replaces_the_colours(tmp_path: Path) -> None:
    """Albumentations writes the file; boxes follow, whatever it does, and the draws are the transform's own."""
    path = save_pipeline(
        tmp_path / "mine.yaml",
        A.OneOf([A.Affine(scale=(0.6, 0.9), translate_percent=0.2, p=1), A.RandomCrop(90, 120, p=1)], p=0.9),
        A.Sequential([A.InvertImg(p=0)], p=0.5),
    )
    transform = train_transform(120, 160, pipeline=path, photometric=1.0)
    image, *objects = scene()
    shapes = set()
    for _ in range(40):
        result = transform(image, *objects)
        assert is_valid(result)
        shapes.add(result.image.shape)
        for label, box in zip(result.labels, result.boxes, strict=True):
            if (box[2:] - box[:2] >= 3).all():
                np.testing.assert_allclose(extent(result.image[..., label]), box, atol=1.5)
    assert shapes == {(120, 160, 3)}
    own = draws(train_transform(60, 80, pipeline=path), 30)
    assert len(set(own)) > 15
    assert draws(train_transform(60, 80, pipeline=path), 30) == own
    assert draws(pickle.loads(pickle.dumps(train_transform(60, 80, pipeline=path))), 30) == own
    assert draws(train_transform(60, 80, pipeline=path, seed=1), 30) != own


CROPS = {
    "RandomCrop": A.RandomCrop(60, 80, p=1),
    "CenterCrop": A.CenterCrop(40, 50, p=1),
    "Crop": A.Crop(50, 60, 120, 110, p=1),
    "RandomResizedCrop": A.RandomResizedCrop((120, 160), scale=(0.1, 0.3), p=1),
    "RandomSizedCrop": A.RandomSizedCrop((30, 60), (120, 160), p=1),
}


@pytest.mark.parametrize("name", CROPS)
def test_objects_that_the_users_crop_leaves_out_are_gone(tmp_path: Path, name: str) -> None:
    transform = train_transform(120, 160, pipeline=save_pipeline(tmp_path / "mine.yaml", CROPS[name]))
    image, *objects = scene()
    counts = []
    for _ in range(60):
        result = transform(image, *objects)
        assert is_valid(result)
        counts.append(len(result.boxes))
        assert ((result.boxes[:, 2:] - result.boxes[:, :2]) > 0).all()
    assert min(counts) < 3


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("PadIfNeeded", {"min_height": 200}), ("SafeRotate", {}), ("RGBShift", {}), ("ShiftScaleRotate", {})],
)
def test_what_albumentations_writes_is_read(tmp_path: Path, name: str, arguments: dict[str, int]) -> None:
    """Also arguments that it writes and does not take."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of them is called old
        path = save_pipeline(tmp_path / "mine.yaml", getattr(A, name)(**arguments, p=1))
    image, *objects = scene()
    assert is_valid(train_transform(120, 160, pipeline=path)(image, *objects))


STEP = "{__class_fullname__: %s, p: 1.0%s}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steps: []", "no entry `transform`; give the form that albumentations.save"),
        ("a: [", "cannot be read"),
        ("transform: [1]", "transform: expected a transform"),
        (STEP % ("Blurr", ""), r"transform, Blurr: albumentations .* no such transform for files; did you mean Blur"),
        (STEP % ("os.system", ""), r"transform, system: .* name one that holds no code|transform, system: .*did you"),
        (STEP % ("Lambda", ""), "Lambda: .* holds no code"),
        (STEP % ("Blur", ", blurr: 3"), "transform, Blur: .*blurr.*; correct its arguments"),
        (STEP % ("Blur", ", blur_limit: [-3, a]"), "transform, Blur: .*blur_limit.*; correct its arguments"),
        (STEP % ("Compose", f", transforms: [{STEP % ('Blur', '')}, {STEP % ('Hue', '')}]"), r"transforms\[1\], Hue: "),
        ("&a {__class_fullname__: Compose, p: 1.0, transforms: [*a]}", "an entry contains itself"),
    ],
)
def test_a_wrong_pipeline_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content if content[0] in "sat" else f"transform: {content}\n")
    with pytest.raises(InputError, match=rf"^augment\.pipeline={path}: .*{message}"):
        train_transform(60, 80, pipeline=str(path))


def test_a_pipeline_that_fails_on_an_image_is_named(tmp_path: Path) -> None:
    image, *objects = scene()
    for step, message in (
        (A.RandomCrop(500, 500, p=1), "160 x 120 pixels: .*500"),
        (A.Normalize(p=1), "makes float32"),
    ):
        path = save_pipeline(tmp_path / "mine.yaml", step)
        with pytest.raises(InputError, match=rf"^augment\.pipeline={path}: it fails on an image of .*{message}"):
            train_transform(60, 80, pipeline=path)(image, *objects)
    with pytest.raises(InputError, match=r"nowhere\.yaml: this file cannot be read \(No such file"):
        train_transform(60, 80, pipeline="nowhere.yaml")


def test_stretching_keeps_the_area_and_is_uniform_in_the_logarithm() -> None:
    transform = train_transform(120, 160, stretch=(0.5, 2.0))
    image = np.zeros((240, 320, 3), np.uint8)
    scales = np.array([transform(image, *NONE).scale for _ in range(300)])
    np.testing.assert_allclose(scales.prod(axis=1), 0.25, rtol=0.02)
    ratios = np.sort(np.log(scales[:, 0] / scales[:, 1]))
    assert np.abs(ratios - np.linspace(-np.log(2), np.log(2), 300)).max() < 0.11 * 2 * np.log(2)


def test_boxes_below_a_pixel_and_without_area_are_left_out() -> None:
    transform = train_transform(60, 80)
    image = np.zeros((120, 160, 3), np.uint8)
    boxes = np.array([[10, 10, 11.5, 40], [20, 20, 23, 23], [30, 30, 30, 30], [150, 100, 400, 300]], np.float32)
    result = transform(image, boxes, np.array([7, 8, 9, 2**40]), np.zeros(4, bool))
    assert result.labels.tolist() == [8, 2**40]  # labels do not pass through float32
    np.testing.assert_allclose(result.boxes, np.array([[10, 10, 11.5, 11.5], [75, 50, 80, 60]]), atol=1e-3)


def test_arguments_are_not_written_to() -> None:
    transform = train_transform(96, 128, **ALL)
    arguments = scene()
    before = [part.copy() for part in arguments]
    for part in arguments:
        part.setflags(write=False)
    for _ in range(40):
        transform(*arguments)
    for part, old in zip(arguments, before, strict=True):
        np.testing.assert_array_equal(part, old)


def draws(transform: TrainTransform, count: int = 12) -> list[bytes]:
    image, *objects = scene()
    image = image // 2 + 40
    return [transform(image, *objects).image.tobytes() for _ in range(count)]


def test_seeds_decide_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh(**options: Any) -> TrainTransform:
        return train_transform(60, 80, **{**ALL, **options})

    first = draws(fresh())
    assert len(set(first)) == 12
    assert draws(fresh()) == first
    assert draws(pickle.loads(pickle.dumps(fresh()))) == first
    streams = [first, draws(fresh(seed=1))]
    for worker_seed in (1, 2**63 + 5):
        transform = fresh()
        transform.reseed(worker_seed)
        streams.append(draws(transform))
        transform.reseed(worker_seed)
        assert draws(transform) == streams[-1]
    monkeypatch.setenv("RANK", "1")
    streams.append(draws(fresh()))
    assert len({picture for stream in streams for picture in stream}) == 5 * 12


def test_flips_are_drawn_independently() -> None:
    # albumentations' own seeding gives every transform the same stream: both flips, or none.
    transform = train_transform(120, 160, **{"flip": 0.5, "vertical_flip": 0.5})
    image, *objects = scene()
    seen = Counter(tuple(transform(image, *objects).boxes[0]) for _ in range(100))
    assert len(seen) == 4
    assert min(seen.values()) > 10


def test_rank_comes_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert process_rank() == 0
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert process_rank() == 2
    monkeypatch.setenv("RANK", "5")
    assert process_rank() == 5


@pytest.mark.parametrize(
    "name", ["flip", "vertical_flip", "photometric", "crop", "rotate90", "iou_crop", "zoom_out", "mosaic"]
)
def test_a_probability_is_named(name: str) -> None:
    for value in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match=rf"^augment\.{name}=.*: expected "):
            AugmentOptions.parse({name: value}, "augment")


@pytest.mark.parametrize("name", ["scale", "stretch", "batch_scale", "mosaic_scale"])
def test_a_bad_range_is_named(name: str) -> None:
    for value in ((0.0, 1.0), (1.0, float("inf")), (1.0,), (0.04, 1.0), (1.0, 21.0)):
        with pytest.raises(InputError, match=rf"^augment\.{name}=?.*: expected |^augment\.{name}.* is missing"):
            AugmentOptions.parse({name: value}, "augment")
    with pytest.raises(InputError, match=rf"augment\.{name}=\[1\.5, 1\.0\]: expected lowest <= highest"):
        AugmentOptions.parse({name: (1.5, 1.0)})


@pytest.mark.parametrize("factor", [0.05, 20.0])
@pytest.mark.parametrize("name", ["scale", "stretch", "batch_scale", "mosaic_scale"])
def test_the_last_factors_that_are_allowed_give_an_image(name: str, factor: float) -> None:
    options = AugmentOptions.parse({name: (factor, factor), "mosaic": float(name == "mosaic_scale")})
    transform = TrainTransform(Preprocessing(short_side=48, long_side=64), options, seed=0)
    image, boxes = np.zeros((60, 80, 3), np.uint8), np.array([[8, 8, 72, 52]], np.float32)
    view = (image, boxes, np.zeros(1, np.int64), np.zeros(1, bool))
    out = transform(*view, transform.batch_factors()[0], [view] * 3 if name == "mosaic_scale" else [])
    assert out.image.size > 0
    assert np.isfinite(out.boxes).all()


def test_albumentations_does_not_ask_the_network() -> None:
    code = (
        "import socket, sys\n"
        "sys.modules['torch'] = None\n"  # not needed, and slow to import
        "def refuse(*a, **k): raise SystemExit('asked the network')\n"
        "socket.getaddrinfo = socket.create_connection = refuse\n"
        "from detector.data.transforms import AugmentOptions, TrainTransform\n"
        "from detector.data.preprocess import Preprocessing\n"
        "TrainTransform(Preprocessing(short_side=60, long_side=80), AugmentOptions(), seed=0)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "NO_ALBUMENTATIONS_UPDATE"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("turn", [0.0, 1.0])
def test_no_view_needs_a_larger_canvas_than_its_image(turn: float) -> None:
    """A part may be upright where the image is not: its batch would be padded to a square."""
    options = AugmentOptions(iou_crop=0.9, crop=0.5, rotate90=turn, scale=(0.5, 2.0), stretch=(0.5, 2.0), zoom_out=0.3)
    transform = TrainTransform(Preprocessing(short_side=48, long_side=64), options, seed=0)
    image, labels, crowd = coordinates(120, 160), np.zeros(3, np.int64), np.zeros(3, bool)
    shapes = {transform(image, BOXES, labels, crowd).image.shape[:2] for _ in range(100)}
    assert all((height <= 48 and width <= 64) or (turn and height <= 64 and width <= 48) for height, width in shapes)
    assert max(height for height, _ in shapes) == (64 if turn else 48)
