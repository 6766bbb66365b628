"""Pictures: what must be on them, what must not change, and that drawing stays light to import."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detector.data.collate import Batch
from detector.errors import InputError
from detector.inference import drawing
from detector.inference.detections import Detections

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
    return np.asarray(drawing.draw_detections(found, blank(found.image_size), threshold))


def ink(picture: np.ndarray) -> int:
    """The number of pixels that text has darkened: neither the empty picture nor the first class's own colour."""
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


def test_a_box_as_large_as_the_picture_keeps_its_four_sides() -> None:
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


def test_nothing_found_gives_the_picture() -> None:
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

    for colour in (*colours, drawing._CROWD):
        dark, light = sorted((luminance(colour), luminance(drawing.text_colour(colour))))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour  # WCAG 2, level AA


@pytest.fixture
def batch() -> Batch:
    images = torch.full((3, 3, 64, 96), GREY, dtype=torch.uint8)
    boxes = torch.zeros(3, 2, 4)
    boxes[0] = torch.tensor([[8.0, 20, 40, 50], [50.0, 20, 90, 60]])
    boxes[1, 0] = torch.tensor([8.0, 20, 40, 50])
    labels = torch.tensor([[0, 0], [1, -1], [-1, -1]])
    crowd = torch.tensor([[False, True], [False, False], [False, False]])
    sizes = torch.tensor([[64, 96]] * 3)
    return Batch(images, sizes, boxes, labels, crowd, torch.ones(3, 2, dtype=torch.float64), sizes, (1, 2, 3))


def test_batch_shows_objects_in_colour_and_crowds_in_grey(batch: Batch) -> None:
    grid = np.asarray(drawing.draw_batch(batch, NAMES))
    zoom = 3  # small pictures are enlarged three times, in two columns

    def at(column: int, row: int, x: float, y: float) -> tuple[int, ...]:
        return tuple(grid[row * (64 * zoom + 4) + round(y * zoom), column * (96 * zoom + 4) + round(x * zoom)])

    columns = (grid.shape[1] + 4) // (96 * zoom + 4)
    places = [(place % columns, place // columns) for place in range(3)]
    assert at(*places[0], 8, 35) == drawing.class_colour(0)
    assert at(*places[0], 50, 40) == drawing._CROWD
    assert at(*places[1], 8, 35) == drawing.class_colour(1)
    third = grid[places[2][1] * (64 * zoom + 4) :, places[2][0] * (96 * zoom + 4) :][: 64 * zoom, : 96 * zoom]
    assert (third == GREY).all()  # padded places are not drawn


@pytest.mark.parametrize("size", [(320, 320), (800, 1216), (320, 96), (32, 32)])
@pytest.mark.parametrize("count", [1, 2, 9, 17])
def test_batch_fits_a_screen(size: tuple[int, int], count: int) -> None:
    images = torch.zeros(count, 3, *size, dtype=torch.uint8)
    nothing = torch.zeros(count, 0)
    sizes = torch.tensor([size] * count)
    scales = torch.ones(count, 2, dtype=torch.float64)
    empty = Batch(
        images,
        sizes,
        nothing[..., None].expand(-1, -1, 4),
        nothing.long(),
        nothing.bool(),
        scales,
        sizes,
        tuple(range(count)),
    )
    grid = drawing.draw_batch(empty, NAMES)
    assert grid.width <= 1680
    assert grid.height <= 1480
    assert max(grid.size) >= min(1000, 3 * max(size))


def write_csv(path: Path, rows: list[dict[str, float]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_curves_are_read_past_blanks_and_prefixes(tmp_path: Path) -> None:
    rows = [{"step": 10 * i, "train/loss": 5.0 - i, "loss_rpn_box": 1.0} for i in range(4)]
    rows += [{"step": 15, "AP": 0.1, "AP50": 0.2}, {"step": 35, "AP": 0.3, "loss": float("nan")}, {"lr-SGD": 0.01}]
    curves = drawing._read_curves(write_csv(tmp_path / "metrics.csv", rows))
    assert curves["loss"][0].tolist() == [0, 10, 20, 30]
    assert curves["loss"][1].tolist() == [5, 4, 3, 2]
    assert curves["AP"][0].tolist() == [15, 35]
    assert curves["AP50"][1].tolist() == [0.2]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_curves_are_a_picture_and_nothing_else_is_left(tmp_path: Path, suffix: str) -> None:
    rows = [{"step": i, "loss": 1 / (i + 1), "loss_head_class": 0.5 / (i + 1)} for i in range(200)]
    rows += [{"step": 100, "AP": 0.1}, {"step": 199, "AP": 0.2}]
    metrics = write_csv(tmp_path / "metrics.csv", rows)
    out = tmp_path / "plots" / f"curves{suffix}"
    drawing.plot_curves(metrics, out)
    assert list(out.parent.iterdir()) == [out]
    if suffix == ".png":
        with Image.open(out) as file:
            picture = np.asarray(file.convert("L"))
        assert picture.shape[0] > 600
        assert (picture < 40).sum() > 500
    else:
        assert "<svg" in out.read_text()


def test_curves_without_evaluations_or_with_one_step_are_drawn(tmp_path: Path) -> None:
    for name, rows in (("losses", [{"step": 0, "loss": 1.0}]), ("figures", [{"step": 0, "AP": 0.0}])):
        drawing.plot_curves(write_csv(tmp_path / f"{name}.csv", rows), tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.height > 200


def test_a_classifier_s_accuracy_has_a_panel_of_its_own(tmp_path: Path) -> None:
    rows = [{"step": i, "loss": 1.0, "loss_val": 1.1, "top1": 0.5, "top5": 0.9} for i in range(3)]
    drawing.plot_curves(write_csv(tmp_path / "m.csv", rows), tmp_path / "m.svg")
    text = (tmp_path / "m.svg").read_text()
    assert [word for word in ("accuracy", "top1", "top5", "loss_val", "COCO AP") if f"<!-- {word} -->" in text] == [
        "accuracy", "top1", "top5", "loss_val",
    ]  # fmt: skip


def test_curves_of_nothing_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        drawing.plot_curves(tmp_path / "absent.csv", tmp_path / "out.png")
    with pytest.raises(InputError, match="no losses and no AP"):
        drawing.plot_curves(write_csv(tmp_path / "m.csv", [{"step": 1, "lr": 0.1}]), tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_import_is_light() -> None:
    code = (
        "import sys, detector.inference.drawing;"
        "print({'torch', 'torchvision', 'matplotlib', 'cv2', 'lightning', 'hydra'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
