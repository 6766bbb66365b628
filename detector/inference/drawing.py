"""Boxes with labels on an image, for people to look at."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

Colour = tuple[int, int, int]
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
# Letters are a fiftieth of the image's longer side, within these pixels: smaller is unreadable, larger hides objects.
_LETTERS = (11, 40)
_PIXELS_PER_LINE_WIDTH = 400  # a line is one pixel wider for each of these pixels of the longer side


def class_colour(label: int) -> Colour:
    """RGB of a class: the same in every image, and far from its neighbours' hues."""
    # Steps of the golden ratio never come close to an earlier hue soon; three brightnesses keep 80 classes apart.
    hue = (0.02 + label * _GOLDEN_RATIO) % 1
    saturation, value = ((0.85, 0.95), (0.6, 1.0), (0.95, 0.7))[label % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def text_colour(background: Colour) -> Colour:
    """Black or white, whichever contrasts more with the background (WCAG 2 relative luminance)."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in background)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 1.05 * 0.05 else (255, 255, 255)


def draw_boxes(image: np.ndarray, boxes: np.ndarray, texts: Sequence[str], colours: Sequence[Colour]) -> Image:
    """A copy of the image with boxes, each with its label above it, or wherever the image has room.

    Args:
        image: uint8 RGB (h, w, 3).
        boxes: (D, 4) xyxy in its pixels; the last is drawn on top.
        texts: D labels.
        colours: D RGB colours.
    """
    from PIL import Image as pil
    from PIL import ImageDraw

    drawn = pil.fromarray(image)
    if not len(boxes):
        return drawn
    # Line breaks, and half a surrogate pair, on which Pillow fails.
    texts = ["".join(letter if letter.isprintable() else "?" for letter in text) for text in texts]
    longer = max(drawn.size)
    font = _font("".join(texts), round(min(max(_LETTERS[0], longer / 50), _LETTERS[1])))
    canvas = ImageDraw.Draw(drawn)
    # Pillow draws the last row and column of a box too, so a box at the border would lose two sides.
    edges = np.floor(boxes).clip(0, np.tile([drawn.width - 1, drawn.height - 1], 2)).tolist()
    for edge, colour in zip(edges, colours, strict=True):
        canvas.rectangle(edge, outline=colour, width=1 + (longer - 1) // _PIXELS_PER_LINE_WIDTH)
    inks = [font.getbbox(text) for text in texts]
    # One pixel of background on every side of the letters.
    spots = _place_labels(edges, [(right - left + 2, low - top + 2) for left, top, right, low in inks], drawn.size)
    for text, (left, top, _, _), spot, colour in zip(texts, inks, spots, colours, strict=True):
        canvas.rectangle((spot[0], spot[1], spot[2] - 1, spot[3] - 1), fill=colour)
        canvas.text((spot[0] + 1 - left, spot[1] + 1 - top), text, fill=text_colour(colour), font=font)
    return drawn


def _font(text: str, size: int) -> FreeTypeFont:
    """A TrueType font for the text: Pillow's own, which knows ASCII only, or matplotlib's."""
    from importlib.util import find_spec

    from PIL import ImageFont

    if not text.isascii() and find_spec("matplotlib") is not None:
        import matplotlib

        return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType, which its wheels have"
    return font


def _place_labels(
    edges: Sequence[Sequence[float]], sizes: Sequence[tuple[float, float]], image_size: tuple[int, int]
) -> list[tuple[float, float, float, float]]:
    """Where each label touches its box, inside the image and, if possible, clear of the labels placed before it.

    Args:
        edges: xyxy of the boxes, most important last.
        sizes: width and height of the labels.
        image_size: width and height.

    Returns:
        xyxy of the labels.
    """
    placed: list[tuple[float, float, float, float]] = []

    def hidden(spot: tuple[float, float, float, float]) -> float:
        """The area of a spot that labels already cover."""
        sides = (
            (min(spot[2], x2) - max(spot[0], x1), min(spot[3], y2) - max(spot[1], y1)) for x1, y1, x2, y2 in placed
        )
        return sum(max(0, width) * max(0, height) for width, height in sides)

    for (x1, y1, x2, y2), (width, height) in zip(reversed(edges), reversed(sizes), strict=True):
        # Above, below, inside at the top, at the bottom; from the left edge of the box and from the right one.
        lefts = [min(max(0, x), max(0, image_size[0] - width)) for x in (x1, x2 + 1 - width)]
        tops = [y for y in (y1 - height, y2 + 1, y1, y2 - height) if 0 <= y <= image_size[1] - height] or [0]
        placed.append(min(((x, y, x + width, y + height) for y in tops for x in lefts), key=hidden))
    return placed[::-1]
