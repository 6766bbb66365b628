"""What a run shows of itself: its first training batch, and its curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detector.data.preprocess import resize
from detector.files import replacing
from detector.inference.drawing import class_colour, draw_boxes

if TYPE_CHECKING:
    from PIL.Image import Image

    from detector.data.collate import Batch

CROWD_COLOUR = (150, 150, 150)
_SCREEN = (1600, 1400)  # width and height in pixels that a grid of images has to fit into
_LARGEST_ZOOM = 3.0
_GAP = 4  # pixels between the images of a grid


def draw_batch(batch: Batch, class_names: Sequence[str], limit: int = 16) -> Image:
    """A grid of training images, as the network sees them, with their boxes; crowd regions in grey.

    Args:
        batch: images and boxes in the frame of the padded input; the padding is shown.
        class_names: the names that batch.labels index.
        limit: at most this many images, from the first.
    """
    from PIL import Image as pil

    count = min(len(batch), limit)
    height, width = batch.images.shape[2:]

    def zoom(columns: int) -> float:
        return min(_SCREEN[0] / (columns * width), _SCREEN[1] / (-(-count // columns) * height), _LARGEST_ZOOM)

    columns = max(range(1, count + 1), key=zoom)
    cells = [_draw_sample(batch, place, class_names, zoom(columns)) for place in range(count)]
    step_x, step_y = cells[0].width + _GAP, cells[0].height + _GAP
    grid = pil.new("RGB", (columns * step_x - _GAP, -(-count // columns) * step_y - _GAP), "white")
    for place, cell in enumerate(cells):
        grid.paste(cell, (place % columns * step_x, place // columns * step_y))
    return grid


def _draw_sample(batch: Batch, place: int, class_names: Sequence[str], zoom: float) -> Image:
    image = np.ascontiguousarray(batch.images[place].cpu().numpy().transpose(1, 2, 0))
    height, width = (max(1, round(side * zoom)) for side in image.shape[:2])
    labels, crowd, boxes = (part[place].cpu().numpy() for part in (batch.labels, batch.crowd, batch.boxes))
    # Crowds first, below objects; label -1 is no box.
    order = [i for i in np.argsort(~crowd, kind="stable") if labels[i] >= 0]
    names = [class_names[labels[i]] + (" (crowd)" if crowd[i] else "") for i in order]
    colours = [CROWD_COLOUR if crowd[i] else class_colour(int(labels[i])) for i in order]
    return draw_boxes(resize(image, height, width), boxes[order] * zoom, names, colours)


def plot_curves(metrics_csv: str | Path, out: str | Path) -> None:
    """Losses against the step, and below them COCO's AP or a classifier's accuracy, from the metrics.csv of a run.

    Args:
        metrics_csv: one row for each log call, with blanks; columns `step`, `loss...`, `AP`, `AP50`, `AP75`,
            `top1`, `top5`, each with an optional prefix such as `train/`. Other columns are left out.
        out: the image; its suffix says which format. Where there is nothing to draw yet, none is written.
    """
    curves = _read_curves(metrics_csv)
    losses = {name: curve for name, curve in curves.items() if name.startswith("loss")}
    precisions = {name: curve for name, curve in curves.items() if name in ("AP", "AP50", "AP75")}
    accuracies = {name: curve for name, curve in curves.items() if name in ("top1", "top5")}
    parts = ((losses, "loss"), (precisions, "COCO AP"), (accuracies, "accuracy"))
    panels = [panel for panel in parts if panel[0]]
    if not panels:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure and canvas instead of pyplot: no global state, no display, nothing to close.
    figure = Figure(figsize=(8, 3.2 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axis, (group, title) in zip(axes, panels, strict=True):
        for name in sorted(group, key=lambda name: (len(name.split("_")), name)):
            _plot_curve(axis, *group[name], name, smooth=title == "loss")
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    with replacing(out) as partial:
        figure.savefig(partial, dpi=120)


def _plot_curve(axis: Any, steps: np.ndarray, values: np.ndarray, name: str, *, smooth: bool) -> None:
    total = {"color": "black", "linewidth": 1.8} if name in ("loss", "AP", "top1") else {"linewidth": 1.3}
    window = len(values) // 20
    if not smooth or window < 3:
        axis.plot(steps, values, label=name, marker="o" if len(values) < 30 else None, markersize=3, **total)
        return
    # Batches differ more than epochs do: the running mean is the curve, the raw values its shadow.
    (shadow,) = axis.plot(steps, values, alpha=0.2, **(total | {"linewidth": 0.8}))
    valid = np.convolve(values, np.ones(window) / window, mode="valid")
    start = (window - 1) // 2
    axis.plot(steps[start : start + len(valid)], valid, label=name, **({"color": shadow.get_color()} | total))


def _read_curves(path: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each column that has numbers, by its name without prefix; blanks are skipped."""
    rows = np.atleast_1d(np.genfromtxt(path, delimiter=",", names=True, deletechars="", encoding="utf-8"))
    curves = {}
    for column in rows.dtype.names or ():
        known = np.isfinite(rows[column]) & np.isfinite(rows["step"])
        if known.any():
            curves[column.rpartition("/")[2]] = rows["step"][known], rows[column][known]
    return curves
