"""The images that a run writes: its first batch, its curves."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detector.data.collate import Batch
from detector.inference.drawing import class_colour
from detector.training import plots

GREY = 90
NAMES = ("cat", "traffic light", "Büffel")


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
    grid = np.asarray(plots.draw_batch(batch, NAMES))
    zoom = 3  # small images are enlarged three times, in two columns

    def at(column: int, row: int, x: float, y: float) -> tuple[int, ...]:
        return tuple(grid[row * (64 * zoom + 4) + round(y * zoom), column * (96 * zoom + 4) + round(x * zoom)])

    columns = (grid.shape[1] + 4) // (96 * zoom + 4)
    places = [(place % columns, place // columns) for place in range(3)]
    assert at(*places[0], 8, 35) == class_colour(0)
    assert at(*places[0], 50, 40) == plots.CROWD_COLOUR
    assert at(*places[1], 8, 35) == class_colour(1)
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
    grid = plots.draw_batch(empty, NAMES)
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
    curves = plots._read_curves(write_csv(tmp_path / "metrics.csv", rows))
    assert curves["loss"][0].tolist() == [0, 10, 20, 30]
    assert curves["loss"][1].tolist() == [5, 4, 3, 2]
    assert curves["AP"][0].tolist() == [15, 35]
    assert curves["AP50"][1].tolist() == [0.2]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_curves_are_an_image_and_nothing_else_is_left(tmp_path: Path, suffix: str) -> None:
    rows = [{"step": i, "loss": 1 / (i + 1), "loss_head_class": 0.5 / (i + 1)} for i in range(200)]
    rows += [{"step": 100, "AP": 0.1}, {"step": 199, "AP": 0.2}]
    metrics = write_csv(tmp_path / "metrics.csv", rows)
    out = tmp_path / "plots" / f"curves{suffix}"
    plots.plot_curves(metrics, out)
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
        plots.plot_curves(write_csv(tmp_path / f"{name}.csv", rows), tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.height > 200


def test_a_classifier_s_accuracy_has_a_panel_of_its_own(tmp_path: Path) -> None:
    rows = [{"step": i, "loss": 1.0, "loss_val": 1.1, "top1": 0.5, "top5": 0.9} for i in range(3)]
    plots.plot_curves(write_csv(tmp_path / "m.csv", rows), tmp_path / "m.svg")
    text = (tmp_path / "m.svg").read_text()
    assert [word for word in ("accuracy", "top1", "top5", "loss_val", "COCO AP") if f"<!-- {word} -->" in text] == [
        "accuracy", "top1", "top5", "loss_val",
    ]  # fmt: skip


def test_curves_of_nothing_are_not_drawn(tmp_path: Path) -> None:
    plots.plot_curves(write_csv(tmp_path / "m.csv", [{"step": 1, "lr": 0.1}]), tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()
