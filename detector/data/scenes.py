"""Draw one image of flat shapes on textured ground, with its ground truth.

The class is the outline and nothing else. A box is drawn first, without regard to the class, and a rotated outline is
stretched to fill it; colour, texture, place, size and aspect ratio therefore say nothing about the class. Distractors
(bars, arcs, strokes, irregular polygons) are painted the same way and have no label.

Chosen by this project: a data set that needs no download, and that no shortcut but the outline solves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# A change of anything that is drawn raises VERSION in shapes.py.
CLASS_NAMES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent")
SIZE = 256  # longer side of an image, pixels
EMPTY = 0.05  # share of images without an object
MAX_OBJECTS = 10
MAX_DISTRACTORS = 3
# Side of the square with the box's area, in pixels, and how often: small, medium and large by COCO's areas, roughly.
# The large band is wide because a star or a ring covers about half of its box.
SIDES = ((0.18, 24, 36), (0.50, 44, 96), (0.32, 120, 190))
MIN_INSIDE = 0.7  # an object is not placed where the image's border would leave less of it ...
MIN_VISIBLE = 0.8  # ... and nothing is placed where it would leave less of that in sight: no object is mostly hidden
MIN_CONTRAST = 55.0  # distance between an object and its ground, in the axes below
# Rows: luma and two chroma axes; chroma counts less because JPEG halves its resolution.
CONTRAST = np.array([[0.299, 0.587, 0.114], [-0.10, -0.20, 0.30], [0.30, -0.25, -0.05]], np.float32)
_TRIES = 12
_SUPERSAMPLING = 4
_SHIFT = 6  # fractional bits of OpenCV's polygon coordinates

Contour = np.ndarray  # (V, 2) float64 xy. Of several the first is the outer one, the others are holes


@dataclass(frozen=True)
class Scene:
    """One drawn image with its ground truth; G objects in the order of painting.

    Attributes:
        image: uint8 RGB, (h, w, 3).
        boxes: (G, 4) float64, xyxy pixels: the full extent of the shape inside the image, covered parts included.
        labels: (G,) int64, index into CLASS_NAMES.
        areas: (G,) float64, square pixels of the shape inside the image, covered parts included.
        visible: (G,) float64, the share of that area that nothing painted later covers.
        owner: (h, w) int16, which object a pixel shows; -1 is ground or a distractor.
        jpeg_quality: the quality the image is stored with.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    visible: np.ndarray
    owner: np.ndarray
    jpeg_quality: int


def _polar(radii: np.ndarray, angles: np.ndarray) -> Contour:
    return np.stack((radii * np.cos(angles), radii * np.sin(angles)), axis=1)


def _regular(corners: int) -> Contour:
    return _polar(np.ones(corners), np.arange(corners) * (2 * np.pi / corners))


def _star(rng: np.random.Generator) -> list[Contour]:
    return [_polar(np.tile([1.0, rng.uniform(0.44, 0.52)], 5), np.arange(10) * (np.pi / 5))]


def _cross(rng: np.random.Generator) -> list[Contour]:
    a = rng.uniform(0.28, 0.38)  # half width of an arm of length 1
    quarter = np.array([[1, -a], [1, a], [a, a]])
    turns = [np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return [np.concatenate([quarter @ turn for turn in turns])]


def _ring(rng: np.random.Generator) -> list[Contour]:
    return [_regular(96), _regular(96) * rng.uniform(0.48, 0.62)]


def _crescent(rng: np.random.Generator) -> list[Contour]:
    # A disc without another, smaller one. The horns reach far round, so that the extent is nearly square.
    radius, offset = rng.uniform(0.70, 0.80), rng.uniform(0.50, 0.60)
    x = (offset**2 + 1 - radius**2) / (2 * offset)
    y = np.sqrt(1 - x**2)
    outer, inner = np.arctan2(y, x), np.arctan2(y, x - offset)
    back = np.linspace(outer, 2 * np.pi - outer, 72)
    front = np.linspace(2 * np.pi - inner, inner, 48)[1:-1]
    bite = _polar(np.full(len(front), radius), front) + np.array([offset, 0])
    return [np.concatenate((_polar(np.ones(len(back)), back), bite))]


_OUTLINES: dict[str, Callable[[np.random.Generator], list[Contour]]] = {
    "circle": lambda rng: [_regular(96)],
    "square": lambda rng: [_regular(4)],
    "triangle": lambda rng: [_regular(3)],
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
}


def _bar(rng: np.random.Generator) -> list[Contour]:
    thin = rng.uniform(0.03, 0.12)
    return [np.array([[-1, -thin], [1, -thin], [1, thin], [-1, thin]])]


def _arc(rng: np.random.Generator) -> list[Contour]:
    angles = np.linspace(0, rng.uniform(0.4, 1.0) * np.pi, 32)
    inner = np.full(32, rng.uniform(0.7, 0.85))
    return [np.concatenate((_polar(np.ones(32), angles), _polar(inner, angles[::-1])))]


def _stroke(rng: np.random.Generator) -> list[Contour]:
    # A letter-like path over a 3 x 3 grid: there along its left side, back along its right one.
    cells = rng.permutation(9)[: rng.integers(3, 5)]
    path = np.stack((cells % 3, cells // 3), axis=1) - 1.0
    side = rng.uniform(0.08, 0.14) * np.array([1.0, 0.6])
    return [np.concatenate((path - side, (path + side)[::-1]))]


def _shard(rng: np.random.Generator) -> list[Contour]:
    corners = int(rng.integers(6, 9))
    angles = (np.arange(corners) + rng.uniform(-0.35, 0.35, corners)) * (2 * np.pi / corners)
    radii = rng.uniform(0.4, 1.0, corners)
    radii[0] = 0.2  # a notch, so that no shard passes for a square or a triangle
    return [_polar(radii, angles)]


def _blob(rng: np.random.Generator) -> list[Contour]:
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    reach = ((2, 0.3), (3, 0.3), (4, 0.15))
    waves = [rng.uniform(0.5, 1) * high * np.sin(k * angles + rng.uniform(0, 2 * np.pi)) for k, high in reach]
    return [_polar(1 + np.sum(waves, axis=0), angles)]


_DISTRACTORS = (_bar, _bar, _arc, _stroke, _shard, _blob)


def _noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Smooth noise in [0, 1] with features of about `cell` pixels, (height, width) float32."""
    import cv2

    grid = rng.random((int(height / cell) + 2, int(width / cell) + 2), np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)


def _field(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A random pattern in [0, 1], (height, width) float32."""
    turn = rng.uniform(0, 2 * np.pi)
    y, x = np.ogrid[:height, :width]
    x, y = x.astype(np.float32) - width / 2, y.astype(np.float32) - height / 2
    u = np.float32(np.cos(turn)) * x + np.float32(np.sin(turn)) * y
    reach = 0.5 * float(np.hypot(height, width))
    kind = rng.integers(7)
    if kind == 0:
        return 0.5 + u / (2 * reach)
    if kind == 1:
        return np.hypot(x - rng.uniform(-0.5, 0.5) * width, y - rng.uniform(-0.5, 0.5) * height) / (2 * reach)
    if kind == 2:
        return 0.5 + 0.5 * np.sin(u * np.float32(2 * np.pi / rng.uniform(6, 60)))
    if kind == 3:
        # Cells stay smaller than the smallest object, or the ground would be full of squares.
        v = np.float32(np.cos(turn)) * y - np.float32(np.sin(turn)) * x
        frequency = np.float32(np.pi / rng.uniform(4, 11))
        return np.clip(0.5 + 2 * np.sin(u * frequency) * np.sin(v * frequency), 0, 1)
    if kind == 4:
        return np.clip((_noise(rng, height, width, rng.uniform(10, 40)) - 0.5) * 6 + 0.5, 0, 1)
    cell = rng.uniform(3, 12)
    fine, coarse = _noise(rng, height, width, cell), _noise(rng, height, width, cell * 5)
    return 0.5 * fine + 0.5 * coarse


def _texture(
    rng: np.random.Generator, height: int, width: int, colour: np.ndarray, reach: tuple[float, float]
) -> np.ndarray:
    """A pattern around a colour, (3, height, width) float32 in 0-255 or a little outside.

    Args:
        colour: RGB, 0-255.
        reach: bounds of the distance between the pattern's two colours; half of it lies on each side of `colour`.
    """
    way = rng.normal(size=3).astype(np.float32)
    way *= rng.uniform(*reach) / np.linalg.norm(way)
    pattern = _field(rng, height, width)
    # Plane by plane: numpy is several times slower where the colours are the last axis.
    return (colour - 0.5 * way)[:, None, None] + way[:, None, None] * pattern


def _ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    canvas = _texture(rng, height, width, rng.uniform(25, 230, 3).astype(np.float32), (10, 110))
    if rng.random() < 0.5:
        cell, strength = rng.uniform(40, 120), rng.uniform(20, 80)
        for plane in canvas:
            plane += (_noise(rng, height, width, cell) - 0.5) * strength
    if rng.random() < 0.5:
        canvas += (_noise(rng, height, width, rng.uniform(2, 6)) - 0.5) * rng.uniform(10, 50)
    return canvas


def _contrasting_colour(rng: np.random.Generator, region: np.ndarray) -> np.ndarray:
    """A random RGB colour that stands out from nearly every pixel of a region (3, h, w)."""
    step = max(1, min(region.shape[1:]) // 8)
    pixels = CONTRAST @ region[:, ::step, ::step].reshape(3, -1)
    colours = rng.uniform(10, 245, (32, 3)).astype(np.float32)
    difference = (colours @ CONTRAST.T)[:, :, None] - pixels  # (32, 3, pixels)
    share = (np.square(difference).sum(axis=1) > MIN_CONTRAST**2).mean(axis=1)
    return colours[int(np.argmax(np.minimum(share, 0.95)))]  # the first that is good enough, or the best


@dataclass(frozen=True)
class _Item:
    """A filled outline in a frame of its own, to be put on the canvas at whole pixels."""

    coverage: np.ndarray  # (h, w) uint8, 255 = inside
    outline: Contour  # outer contour in pixels of coverage
    label: int  # -1: distractor


def _fit(rng: np.random.Generator, contours: list[Contour], size: tuple[float, float], label: int) -> _Item:
    """Rotate contours at random and scale them to a (width, height) in pixels.

    An object is stretched to fill it, so that its box does not depend on its class; a distractor keeps its proportions.
    """
    import cv2

    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    contours = [contour @ rotation for contour in contours]
    low, high = contours[0].min(axis=0), contours[0].max(axis=0)
    scale = size / (high - low)
    if label < 0:
        scale = scale.min()
    fraction = rng.random(2)
    contours = [(contour - low) * scale + fraction for contour in contours]
    columns, rows = np.ceil(contours[0].max(axis=0)).astype(int).tolist()
    fine = np.zeros((rows * _SUPERSAMPLING, columns * _SUPERSAMPLING), np.uint8)
    # OpenCV counts from pixel centres, boxes here from pixel corners.
    points = [np.round((contour * _SUPERSAMPLING - 0.5) * (1 << _SHIFT)).astype(np.int32) for contour in contours]
    cv2.fillPoly(fine, points, 255, shift=_SHIFT)
    return _Item(cv2.resize(fine, (columns, rows), interpolation=cv2.INTER_AREA), contours[0], label)


def _object(rng: np.random.Generator, largest: float) -> _Item:
    """An object in a box whose size is independent of what fills it."""
    _, low, high = SIDES[rng.choice(len(SIDES), p=[share for share, _, _ in SIDES])]
    side = min(rng.uniform(low, high), largest)
    stretch = np.exp(rng.uniform(-0.12, 0.12))
    label = int(rng.integers(len(CLASS_NAMES)))
    return _fit(rng, _OUTLINES[CLASS_NAMES[label]](rng), (side * stretch, side / stretch), label)


def _distractor(rng: np.random.Generator, largest: float) -> _Item:
    side = min(rng.uniform(28, 120), largest)  # a smaller blob could not be told from a circle
    return _fit(rng, _DISTRACTORS[rng.integers(len(_DISTRACTORS))](rng), (side, side), -1)


def _extent(outline: Contour, width: int, height: int) -> np.ndarray:
    """xyxy extent of the part of an outline inside the image; exact if it is whole, to 0.25 px if it is cut."""
    low, high = outline.min(axis=0), outline.max(axis=0)
    if (low < 0).any() or (high > (width, height)).any():
        edges = np.roll(outline, -1, axis=0) - outline
        steps = np.linspace(0, 1, int(4 * np.abs(edges).max()) + 2)[:, None, None]
        points = (outline + steps * edges).reshape(-1, 2)
        points = points[((points >= 0) & (points <= (width, height))).all(axis=1)]
        low, high = points.min(axis=0), points.max(axis=0)
        # The samples next to the border stop short of it; the shape does not.
        low = np.where(low < 0.25, 0, low)
        high = np.where(high > np.array([width, height]) - 0.25, (width, height), high)
    return np.concatenate((low, high))


class _Painter:
    """The canvas of one scene and the bookkeeping of what is still in sight."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng, self.height, self.width = rng, height, width
        self.canvas = _ground(rng, height, width)
        self.owner = np.full((height, width), -1, np.int16)
        self.objects: list[tuple[np.ndarray, int, float]] = []  # box, label, area of each
        self.totals = np.zeros(0)  # pixels of each object inside the image ...
        self.shown = np.zeros(0)  # ... and those of them that nothing covers

    def add(self, item: _Item) -> None:
        """Paint the item at the first random place where it hides nothing too much and is not cut too much.

        An item that finds no such place is left out.
        """
        solid = item.coverage > 127
        for attempt in range(_TRIES):
            # Free places first, so that covering stays the exception.
            limit = MIN_VISIBLE if attempt >= _TRIES // 2 else 0.9
            x, y = self._place(*solid.shape)
            canvas, part = _overlap(x, y, solid.shape, self.owner.shape)
            inside = solid[part]
            if item.label >= 0 and inside.sum() < MIN_INSIDE * solid.sum():
                continue
            covered = self.owner[canvas][inside]
            shown = self.shown - np.bincount(covered[covered >= 0], minlength=len(self.shown))
            if (shown >= limit * self.totals).all():
                self.shown = shown
                self._paint(item, x, y)
                return

    def _place(self, rows: int, columns: int) -> tuple[int, int]:
        """A random place (x, y) for the top left corner of an item."""
        if self.rng.random() < 0.85:
            low, high = (0, 0), (max(self.width - columns, 0) + 1, max(self.height - rows, 0) + 1)
        else:  # only the centre has to be in the image
            low, high = (-columns // 2, -rows // 2), (self.width - columns // 2, self.height - rows // 2)
        return tuple(self.rng.integers(low, high).tolist())

    def _paint(self, item: _Item, x: int, y: int) -> None:
        canvas, part = _overlap(x, y, item.coverage.shape, self.owner.shape)
        coverage = item.coverage[part]
        region = self.canvas[:, *canvas]
        height, width = coverage.shape
        paint = _texture(self.rng, height, width, _contrasting_colour(self.rng, region), (0, 50))
        alpha = coverage / np.float32(255)
        region += (paint - region) * alpha
        inside = coverage > 127
        self.owner[canvas][inside] = len(self.objects) if item.label >= 0 else -1
        if item.label >= 0:
            box = _extent(item.outline + np.array([x, y]), self.width, self.height)
            self.objects.append((box, item.label, float(alpha.sum())))
            self.totals = np.append(self.totals, inside.sum())
            self.shown = np.append(self.shown, inside.sum())

    def photograph(self) -> np.ndarray:
        """The canvas under uneven light, a little blurred and noisy, as uint8 RGB (h, w, 3)."""
        import cv2

        rng = self.rng
        light = _noise(rng, self.height, self.width, rng.uniform(80, 200))
        light = rng.uniform(0.8, 1.05) + rng.uniform(0, 0.35) * (light - 0.5)
        grain = rng.standard_normal(light.shape, np.float32) * np.float32(rng.uniform(0, 7)) + 0.5
        image = cv2.merge(list(self.canvas * light))
        if rng.random() < 0.5:
            image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.0))
        image += cv2.merge([grain] * 3)
        return np.clip(image, 0, 255).astype(np.uint8)


_Window = tuple[slice, slice]  # rows, columns


def _overlap(x: int, y: int, shape: tuple[int, ...], canvas: tuple[int, ...]) -> tuple[_Window, _Window]:
    """Where an item of a shape, put at (x, y), meets the canvas: the window of the canvas, and that of the item."""
    y1, y2 = max(y, 0), min(y + shape[0], canvas[0])
    x1, x2 = max(x, 0), min(x + shape[1], canvas[1])
    return (slice(y1, y2), slice(x1, x2)), (slice(y1 - y, y2 - y), slice(x1 - x, x2 - x))


def render_scene(seed: np.random.SeedSequence | np.random.Generator | int, *, size: int = SIZE) -> Scene:
    """Draw one image.

    Args:
        seed: where all randomness comes from; equal seeds give equal images.
        size: the longer side in pixels; the shorter one is as long or three quarters of it.
    """
    rng = np.random.default_rng(seed)
    short = size * 3 // 4
    height, width = ((size, size), (short, size), (size, short))[rng.integers(3)]
    painter = _Painter(rng, height, width)
    objects = 0 if rng.random() < EMPTY else 1 + int(rng.binomial(MAX_OBJECTS - 1, 0.6))
    largest = 0.8 * min(height, width)
    items = [_object(rng, largest) for _ in range(objects)]
    items += [_distractor(rng, largest) for _ in range(rng.integers(MAX_DISTRACTORS + 1))]
    # Mostly large before small: a large one that comes late would hide too much and be left out.
    sizes = [max(item.coverage.shape) * np.exp(rng.normal(0, 0.5)) for item in items]
    for index in np.argsort(sizes)[::-1]:
        painter.add(items[index])
    return Scene(
        image=painter.photograph(),
        boxes=np.array([box for box, _, _ in painter.objects], np.float64).reshape(-1, 4),
        labels=np.array([label for _, label, _ in painter.objects], np.int64),
        areas=np.array([area for _, _, area in painter.objects], np.float64),
        visible=painter.shown / painter.totals,
        owner=painter.owner,
        jpeg_quality=int(rng.integers(70, 96)),
    )
