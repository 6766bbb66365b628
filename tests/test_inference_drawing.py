"""Images: what must be on them, what must not change, and that drawing stays light to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detector.errors import InputError
from detector.inference import drawing
from detector.inference.detections import Detections
from detector.training.plots import CROWD_COLOUR

GREY = 90
NAMES = ("cat", "traffic light", "Büffel")


def detections(
    boxes: list[list[float]], scores: list[float], labels: list[int], size: tuple[int, int] = (200, 300)
) -> Detections:
    arrays = np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(labels, np.int64)
    return Detections(*arrays, class_names=NAMES, image_size=size)


def blank(size: tuple[int, int] = (200, 300)) -> np.ndarray:
    return np.full((*size, 3), GREY, np.uint8)


def drawn(found: Detections, threshold: float = 0.5) -> np.ndarray:
    return np.asarray(found.draw(blank(found.image_size), threshold))


def ink(picture: np.ndarray) -> int:
    """The number of pixels that text has darkened: neither the empty image nor the first class's own colour."""
    return int(((picture != GREY).any(axis=2) & (picture != drawing.class_colour(0)).any(axis=2)).sum())


def test_box_lines_lie_on_the_box() -> None:
    picture = drawn(detections([[50, 80, 120, 160]], [0.9], [0]))
    colour = drawing.class_colour(0)
    for y, x in ((80, 60), (160, 60), (120, 50), (120, 120)):
        assert tuple(picture[y, x]) == colour, (y, x)
    assert (picture[85:155, 55:115] == GREY).all()  # the object itself stays visible: the label is not on it
    assert (picture[165:] == GREY).all()


def test_label_is_above_the_box_and_readable() -> None:
    picture = drawn(detections([[50, 80, 120, 160]], [0.9], [0]))
    label = picture[64:80, 50:100]
    assert (label == drawing.class_colour(0)).all(axis=2).mean() > 0.3
    assert ink(label) > 50
    assert ink(picture) == ink(label)


@pytest.mark.parametrize("size", [(200, 300), (900, 1200), (60, 60)])
@pytest.mark.parametrize("corner", ["top left", "top right", "bottom left", "bottom right"])
def test_labels_of_small_boxes_at_the_border_are_whole(size: tuple[int, int], corner: str) -> None:
    height, width = size
    x = 0 if "left" in corner else width - 8
    y = 0 if "top" in corner else height - 8
    picture = drawn(detections([[x, y, x + 8, y + 8]], [0.9], [0], size))
    middle = drawn(detections([[width // 3, height // 2, width // 3 + 8, height // 2 + 8]], [0.9], [0], size))
    assert ink(picture) == ink(middle) > 50


def test_a_box_as_large_as_the_image_keeps_its_four_sides() -> None:
    picture = drawn(detections([[0, 0, 300, 200]], [0.9], [0]))
    colour = np.array(drawing.class_colour(0))
    assert (picture[-1] == colour).all()
    assert (picture[:, -1] == colour).all()


def test_labels_avoid_each_other() -> None:
    boxes = [[50.0, 80.0, 120.0, 160.0], [52.0, 81.0, 122.0, 158.0]]
    both = drawn(detections(boxes, [0.9, 0.8], [0, 1]))
    alone = [drawn(detections([box], [0.9], [label])) for label, box in enumerate(boxes)]
    for label in (0, 1):
        background = drawing.class_colour(label)
        count = [(picture == background).all(axis=2).sum() for picture in (both, alone[label])]
        # Crossing lines hide some pixels of each other, a hidden label would be half of all.
        assert count[0] > 0.75 * count[1]


def test_all_is_drawn_or_what_a_threshold_leaves_and_the_input_is_untouched() -> None:
    found = detections([[50, 80, 120, 160]], [0.01], [0])
    image = blank()
    empty = found.draw(image, threshold=0.02)
    assert tuple(np.asarray(found.draw(image))[80, 60]) == drawing.class_colour(0)
    assert (image == GREY).all()
    image[:] = 0
    assert (np.asarray(empty) == GREY).all()


def test_nothing_found_gives_the_image() -> None:
    assert (drawn(detections([], [], [])) == GREY).all()


def test_degenerate_boxes_and_other_alphabets_do_not_fail() -> None:
    picture = drawn(
        detections([[10, 10, 10, 10], [299.9, 199.9, 300, 200], [5, 50, 5, 90]], [0.9, 0.8, 0.7], [2, 1, 2])
    )
    assert picture.shape == (200, 300, 3)
    assert (picture != GREY).any()


def test_reads_its_own_file_and_keeps_its_size(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(blank()).save(path)
    found = Detections(
        np.array([[50, 80, 120, 160]], np.float32),
        np.ones(1, np.float32),
        np.zeros(1, np.int64),
        NAMES,
        (200, 300),
        str(path),
    )
    assert (np.asarray(found.draw()) == np.asarray(found.draw(blank()))).all()


def test_errors_name_the_remedy() -> None:
    found = detections([[50, 80, 120, 160]], [0.9], [0])
    with pytest.raises(InputError, match=r"draw\(image\)"):
        found.draw()
    with pytest.raises(InputError, match=r"100x50.*300x200"):
        found.draw(blank((50, 100)))


def test_colours_are_distinct_and_texts_have_contrast() -> None:
    colours = [drawing.class_colour(label) for label in range(80)]
    assert len(set(colours)) == 80

    def luminance(colour: tuple[int, int, int]) -> float:
        linear = [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in (*colours, CROWD_COLOUR):
        dark, light = sorted((luminance(colour), luminance(drawing.text_colour(colour))))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour  # WCAG 2, level AA


def test_import_is_light() -> None:
    code = (
        "import sys, detector.inference.drawing;"
        "print({'torch', 'torchvision', 'matplotlib', 'cv2', 'lightning', 'hydra'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
