"""Which part of a training image is shown, and where on the canvas: crops, and the resize to a place.

Objects are cut off at the edge of what is shown; a crowd region stays as long as anything of it is in sight, because
what it covers is not background.
"""

from __future__ import annotations

import numpy as np

from detector.data.boxes import box_area, box_iou
from detector.data.preprocess import PADDING, resize

# A crop keeps at least this share of each side (Liu et al. 2016, SSD: 0.1 in the paper, 0.3 in the released code).
MIN_SIDE = 0.3
# Share of an object that the canvas cuts: with less of it in sight, nobody could tell what it is. Chosen by this
# project.
_MIN_VISIBLE = 0.3
# Liu et al. 2016, section 2.2 and its released code: least IoU of a window with one of its objects, 0 for any; largest
# ratio of its sides; windows that are tried for each IoU (torchvision's number, the released code has 50).
_LEAST_IOUS, _MAX_RATIO, _TRIES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9), 2, 40


def crop_whole(image: np.ndarray, boxes: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cut out a random part that holds all boxes whole; the boxes are in its pixels.

    Not albumentations' BBoxSafeRandomCrop: it rounds the far edges down and fails on boxes thinner than a pixel.
    """
    height, width = image.shape[:2]
    # Without a box nothing limits where the part starts and ends.
    low, high = boxes[:, :2].min(axis=0, initial=np.inf), boxes[:, 2:].max(axis=0, initial=-np.inf)
    left, right = _crop_side(width, low[0], high[0], generator)
    top, bottom = _crop_side(height, low[1], high[1], generator)
    return np.ascontiguousarray(image[top:bottom, left:right]), boxes - np.array([left, top, left, top], np.float32)


def _crop_side(size: int, low: float, high: float, generator: np.random.Generator) -> tuple[int, int]:
    """Start and end of a random part of [0, size] that holds [low, high] and is not too short."""
    shortest = max(1, round(size * MIN_SIDE))
    start = int(generator.integers(int(np.clip(np.floor(low), 0, size - shortest)) + 1))
    end = int(generator.integers(int(np.clip(np.ceil(high), start + shortest, size)), size + 1))
    return start, end


def crop_by_iou(
    image: np.ndarray, boxes: np.ndarray, crowd: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SSD's crop: a random window that has a least IoU with an object whose centre it holds.

    All windows of one IoU are drawn at once, and the first that fits is taken; an IoU for which none fits makes place
    for another. Without objects any window fits.

    Args:
        image: uint8 RGB (h, w, 3).
        boxes: (G, 4) float32, xyxy in pixels of the image.
        crowd: (G,) bool.
        generator: of the draws.

    Returns:
        The window; the boxes with their centre in it, and crowd regions of which a part is, cut off at its edges, in
        its pixels; and which these are, (K,) int64. All of the image where no window fits, because it is too long.
    """
    height, width = image.shape[:2]
    for least in generator.permutation(_LEAST_IOUS):
        windows = _windows(height, width, generator)
        windows = windows[_fits(windows, boxes[~crowd], least)]
        if len(windows):
            break
    else:
        return image, boxes, np.arange(len(boxes))
    left, top, right, bottom = windows[0].tolist()
    cut = inside(boxes - np.array([left, top, left, top], np.float32), bottom - top, right - left)
    rows = np.flatnonzero((_holds(windows[:1], boxes)[0] | crowd) & (box_area(cut) > 0))
    return np.ascontiguousarray(image[top:bottom, left:right]), cut[rows], rows


def _windows(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Windows (T, 4) int64, xyxy, of a ratio that is allowed: T is 40 or less."""
    size = np.array([width, height])
    sides = (size * generator.uniform(MIN_SIDE, 1, (_TRIES, 2))).astype(np.int64).clip(1)
    start = generator.integers(size - sides + 1)
    allowed = sides.max(axis=1) <= _MAX_RATIO * sides.min(axis=1)
    return np.concatenate((start, start + sides), axis=1)[allowed]


def _fits(windows: np.ndarray, boxes: np.ndarray, least: float) -> np.ndarray:
    """(T,) bool, which windows (T, 4) hold the centre of a box (G, 4), and have this IoU with one of those."""
    if not len(boxes):
        return np.ones(len(windows), bool)
    ious = np.where(_holds(windows, boxes), box_iou(windows, boxes), -1)
    fits: np.ndarray = ious.max(axis=1) >= least
    return fits


def _holds(windows: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(T, G) bool, which windows hold the centre of which box."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    held: np.ndarray = ((windows[:, None, :2] < centres) & (centres < windows[:, None, 2:])).all(axis=2)
    return held


def place(
    image: np.ndarray,
    boxes: np.ndarray,
    crowd: np.ndarray,
    size: tuple[int, int],
    canvas: tuple[int, int],
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Resize an image, and lay it on a canvas at random: what sticks out is cut off, what is left over has PADDING.

    Args:
        image: uint8 RGB (h, w, 3).
        boxes: (G, 4) float32, xyxy in pixels of the image.
        crowd: (G,) bool.
        size: height and width to resize to.
        canvas: height and width of the result.
        generator: of the draws.

    Returns:
        The canvas; the boxes in it that have sides of at least one pixel and, if the canvas cuts them, 30% of their
        area in sight (of a crowd region, anything), in its pixels; and which these are, (K,) int64.
    """
    scale = np.array([size[1] / image.shape[1], size[0] / image.shape[0]])
    boxes = inside((boxes * np.tile(scale, 2)).astype(np.float32), *size)
    room = np.array(canvas) - size
    top, left = generator.integers(room.clip(max=0), room.clip(0) + 1).tolist()
    cut = inside(boxes + np.array([left, top, left, top], np.float32), *canvas)
    visible = box_area(cut) / box_area(boxes).clip(1e-6)
    sides = cut[:, 2:] - cut[:, :2]
    rows = np.flatnonzero((sides >= 1).all(axis=1) & ((visible >= _MIN_VISIBLE) | crowd))
    return _lay(resize(image, *size), top, left, canvas), cut[rows], rows


def _lay(image: np.ndarray, top: int, left: int, canvas: tuple[int, int]) -> np.ndarray:
    """The canvas with an image on it, whose corner may be outside."""
    import cv2

    image = image[max(0, -top) :, max(0, -left) :][: canvas[0], : canvas[1]]
    below, right = canvas[0] - image.shape[0] - max(0, top), canvas[1] - image.shape[1] - max(0, left)
    if top <= 0 and left <= 0 and not below and not right:
        return np.ascontiguousarray(image)
    return cv2.copyMakeBorder(image, max(0, top), below, max(0, left), right, cv2.BORDER_CONSTANT, value=PADDING)


def inside(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Boxes (G, 4), cut off at the edges of an image."""
    return boxes.clip(0, np.array([width, height, width, height], np.float32))
