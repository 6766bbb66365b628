"""Pictures for people: detections on a photograph, a training batch, the curves of a run."""

from __future__ import annotations

import colorsys
import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detector.data.preprocess import resize
from detector.errors import InputError
from detector.files import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

    from detector.data.collate import Batch
    from detector.inference.detections import Detections

_CROWD = (150, 150, 150)
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def class_colour(label: int) -> tuple[int, int, int]:
    """RGB of a class: the same in every picture, and far from its neighbours' hues."""
    # Steps of the golden ratio never come close to an earlier hue soon; three brightnesses keep 80 classes apart.
    hue = (0.02 + label * _GOLDEN_RATIO) % 1
    saturation, value = ((0.85, 0.95), (0.6, 1.0), (0.95, 0.7))[label % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def text_colour(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever contrasts more with the background (WCAG 2 relative luminance)."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in background)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 1.05 * 0.05 else (255, 255, 255)


def draw_detections(detections: Detections, image: Any = None, threshold: float = 0.0) -> Image:
    """A copy of the picture with a box, the class name and the score of each detection.

    Args:
        detections: of one picture, boxes in its pixels.
        image: anything that `predict` takes; None reads `detections.path` again.
        threshold: detections below this score are not drawn.

    Raises:
        InputError: there is no picture to draw on, or it has another size than the one that was searched.
    """
    from PIL import Image as pil

    from detector.data.images import read_image

    source = detections.path if image is None else image
    if source is None:
        raise InputError("draw: the detections do not come from a file; give the picture: draw(image).")
    picture = read_image(source)
    if picture.shape[:2] != tuple(detections.image_size):
        raise InputError(
            f"draw: the picture is {picture.shape[1]}x{picture.shape[0]}, the detections belong to one of "
            f"{detections.image_size[1]}x{detections.image_size[0]}; give the picture that was searched."
        )
    shown = detections.above(threshold)
    order = np.argsort(shown.scores, kind="stable")  # the best is drawn last, on top
    labels = [f"{shown.names[place]}  {shown.scores[place]:.2f}" for place in order]
    colours = [class_colour(int(shown.labels[place])) for place in order]
    return pil.fromarray(_draw_boxes(picture, shown.boxes[order], labels, colours))


def draw_batch(batch: Batch, class_names: Sequence[str], limit: int = 16) -> Image:
    """A grid of training pictures, as the network sees them, with their boxes; crowd regions in grey.

    Args:
        batch: pictures and boxes in the frame of the padded input; the padding is shown.
        class_names: the names that batch.labels index.
        limit: at most this many pictures, from the first.
    """
    from PIL import Image as pil

    count = min(len(batch), limit)
    height, width = batch.images.shape[2:]
    if not count:
        raise InputError("draw_batch: the batch has no pictures; give one that has.")
    columns, zoom = _layout(count, height, width)
    cells = [_draw_sample(batch, place, class_names, zoom) for place in range(count)]
    return pil.fromarray(_grid(cells, columns))


def _draw_sample(batch: Batch, place: int, class_names: Sequence[str], zoom: float) -> np.ndarray:
    image = np.ascontiguousarray(batch.images[place].cpu().numpy().transpose(1, 2, 0))
    height, width = (max(1, round(side * zoom)) for side in image.shape[:2])
    labels = batch.labels[place].cpu().numpy()
    real = labels >= 0
    crowd = batch.crowd[place].cpu().numpy()[real]
    boxes = batch.boxes[place].cpu().numpy()[real].reshape(-1, 4) * zoom
    names = [class_names[label] + (" (crowd)" if many else "") for label, many in zip(labels[real], crowd, strict=True)]
    colours = [_CROWD if many else class_colour(int(x)) for x, many in zip(labels[real], crowd, strict=True)]
    order = np.argsort(~crowd, kind="stable")  # crowds below objects
    return _draw_boxes(
        resize(image, height, width), boxes[order], [names[i] for i in order], [colours[i] for i in order]
    )


def _layout(count: int, height: int, width: int) -> tuple[int, float]:
    """Columns and enlargement that show the pictures largest within 1600 x 1400 pixels: a screen."""

    def zoom(columns: int) -> float:
        return min(1600 / (columns * width), 1400 / (-(-count // columns) * height), 3.0)

    columns = max(range(1, count + 1), key=zoom)
    return columns, zoom(columns)


def _grid(cells: list[np.ndarray], columns: int, gap: int = 4) -> np.ndarray:
    height, width = cells[0].shape[:2]
    rows = -(-len(cells) // columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for place, cell in enumerate(cells):
        y, x = place // columns * (height + gap), place % columns * (width + gap)
        grid[y : y + height, x : x + width] = cell
    return grid


def _draw_boxes(
    image: np.ndarray, boxes: np.ndarray, labels: list[str], colours: list[tuple[int, int, int]]
) -> np.ndarray:
    """uint8 RGB (h, w, 3) with boxes (D, 4) xyxy, each with its label above it, or wherever the picture has room."""
    if not len(boxes):
        return image.copy()
    import torch
    from PIL import ImageFont
    from torchvision.utils import draw_bounding_boxes

    height, width = image.shape[:2]
    # Looked at from 200 to 1200 pixels: smaller is unreadable, larger hides the objects.
    size = round(min(max(11, 0.02 * max(height, width)), 40))
    line_width = 1 + (max(height, width) - 1) // 400
    font_bytes = _font("".join(labels))
    font = ImageFont.truetype(io.BytesIO(font_bytes), size)
    # torchvision draws the last row and column of a box too, so a box at the border would lose two sides.
    edges = np.floor(boxes).clip(0, np.tile([width - 1, height - 1], 2))
    picture = draw_bounding_boxes(
        torch.from_numpy(image.transpose(2, 0, 1).copy()), torch.from_numpy(edges), colors=colours, width=line_width
    )
    # A second pass for the labels: torchvision puts the label of a box inside it, where it hides a small object and
    # runs over the border of the picture. A box of line width 0 is invisible, only its label is drawn.
    corners = _place_labels(edges, [font.getbbox(label) for label in labels], (height, width))
    picture = draw_bounding_boxes(
        picture,
        torch.from_numpy(np.tile(corners, 2)),
        labels=labels,
        colors=colours,
        width=0,
        font=io.BytesIO(font_bytes),
        font_size=size,
        label_colors=[text_colour(colour) for colour in colours],
        fill_labels=True,
    )
    return np.ascontiguousarray(picture.numpy().transpose(1, 2, 0))


def _font(text: str) -> bytes:
    """A TrueType font for the text: Pillow's own, which knows ASCII only, or matplotlib's."""
    from importlib.util import find_spec

    from PIL import ImageFont

    if not text.isascii() and find_spec("matplotlib") is not None:
        import matplotlib

        return (Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf").read_bytes()
    return ImageFont.load_default(10).font_bytes  # type: ignore[union-attr]


def _place_labels(
    edges: np.ndarray, inks: list[tuple[float, float, float, float]], size: tuple[int, int]
) -> np.ndarray:
    """Where torchvision has to start each label so that it touches its box, in the picture, and if possible alone.

    Args:
        edges: (D, 4) xyxy of the boxes, most important last.
        inks: left, top, right, bottom of each text, relative to where the text starts.
        size: height and width of the picture.

    Returns:
        (D, 2) int64, x and y.
    """
    corners = np.zeros((len(edges), 2), np.int64)
    taken = np.zeros((0, 4))
    for place in reversed(range(len(edges))):
        left, top, right, bottom = inks[place]
        # torchvision starts the text 1 pixel after a line of width 0 and lets the background stand out by 1 pixel.
        width, height = right - left + 3, bottom - top + 3
        spots = _spots(edges[place], width, height, size)
        overlap = [_overlap(spot, taken) for spot in spots]
        spot = spots[int(np.argmin(overlap))]
        taken = np.concatenate((taken, spot[None]))
        corners[place] = np.round(spot[:2] - (left, top))
    return corners


def _spots(edge: np.ndarray, width: float, height: float, size: tuple[int, int]) -> np.ndarray:
    """Backgrounds (S, 4) xyxy that a label may have, the usual first: above, below, inside at the top, at the bottom.

    Each from the left edge of the box and from the right one; those that would leave the picture are pushed back.
    """
    x1, y1, x2, y2 = edge
    spots = np.array([(x, y) for y in (y1 - height, y2 + 1, y1, y2 - height) for x in (x1, x2 + 1 - width)])
    spots = spots[(spots[:, 1] >= 0) & (spots[:, 1] + height <= size[0])] if height <= size[0] else spots
    spots = spots.clip(0, np.maximum(0, (size[1] - width, size[0] - height)))
    return np.concatenate((spots, spots + np.array((width, height))), axis=1)


def _overlap(spot: np.ndarray, taken: np.ndarray) -> float:
    """The area of a spot that labels already cover."""
    low, high = np.maximum(spot[:2], taken[:, :2]), np.minimum(spot[2:], taken[:, 2:])
    return float((high - low).clip(0).prod(axis=1).sum())


def plot_curves(metrics_csv: str | Path, out: str | Path) -> None:
    """Losses against the step, and below them COCO's AP or a classifier's accuracy, from the metrics.csv of a run.

    Args:
        metrics_csv: one row for each log call, with blanks; columns `step`, `loss...`, `AP`, `AP50`, `AP75`,
            `top1`, `top5`, each with an optional prefix such as `train/`. Other columns are left out.
        out: the picture; its suffix says which format.

    Raises:
        InputError: the file is missing, or has none of these.
    """
    curves = _read_curves(Path(metrics_csv))
    losses = {name: curve for name, curve in curves.items() if name.startswith("loss")}
    precisions = {name: curve for name, curve in curves.items() if name in ("AP", "AP50", "AP75")}
    accuracies = {name: curve for name, curve in curves.items() if name in ("top1", "top5")}
    parts = ((losses, "loss"), (precisions, "COCO AP"), (accuracies, "accuracy"))
    panels = [panel for panel in parts if panel[0]]
    if not panels:
        raise InputError(f"{metrics_csv}: no losses and no AP; has the run logged anything yet?")
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


def _read_curves(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each column that has numbers, by its name without prefix; blanks are skipped."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the metrics.csv of a run.") from error
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for place, row in enumerate(rows):
        step = _number(row.get("step"))
        for column, text in row.items():
            value = _number(text)
            if value is not None and column is not None:
                steps, values = curves.setdefault(column.rpartition("/")[2], ([], []))
                steps.append(place if step is None else step)
                values.append(value)
    return {name: (np.array(steps), np.array(values)) for name, (steps, values) in curves.items()}


def _number(text: Any) -> float | None:
    """The finite number in a cell; None for a blank one and for text."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def plot_receptive_fields(fields: Mapping[str, tuple[np.ndarray, int, float]], path: str | Path) -> None:
    """A picture for each backbone: how much each pixel moves the feature in the middle, on a scale of decades.

    Args:
        fields: title -> (map (h, w) with 1 as its largest value, side of the theoretical field, of the effective one).
        path: of the PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = min(4, len(fields))
    rows = -(-len(fields) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, (field, theoretical, effective)) in zip(axes, fields.items(), strict=False):
        shown = axis.imshow(np.log10(np.maximum(field, 1e-4)), cmap="magma", vmin=-4, vmax=0)
        middle_y, middle_x = (side / 2 for side in field.shape)
        for side, colour in ((theoretical, "white"), (effective, "cyan")):
            corner = (middle_x - side / 2, middle_y - side / 2)
            axis.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=1.2))
        axis.set_title(f"{title}\ntheoretical {theoretical}, effective {effective:.0f} px", fontsize=9)
        axis.set(xlim=(0, field.shape[1]), ylim=(field.shape[0], 0))
    bar = figure.colorbar(shown, ax=axes.tolist(), shrink=0.6, ticks=[-4, -3, -2, -1, 0])
    bar.set_label("gradient, powers of ten of the largest", fontsize=8)
    figure.suptitle(
        "c5: what its middle feature sees. White: theoretical field (where it fits), cyan: effective.", fontsize=10
    )
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)
