"""The twelve COCO figures and the AP of each class, scored by pycocotools against the data set's own annotations.

Lin et al. 2014 (Microsoft COCO) and https://cocodataset.org/#detection-eval: crowd regions are ignored, not counted,
at most 100 detections an image and class, boxes in pixels of the original picture.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from detector.errors import InputError
from detector.files import write_json

# In the order of pycocotools' `stats`. AP: mean over IoU 0.50:0.95; s, m, l: area below 32^2, between, above 96^2;
# ARn: recall with at most n detections an image and class.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

_RESULT_KEYS = ("image_id", "category_id", "bbox", "score")


def evaluate(
    results: Sequence[Mapping[str, Any]] | str | Path,
    ground_truth: Mapping[str, Any] | str | Path,
    *,
    image_ids: Iterable[Any] | None = None,
) -> dict[str, Any]:
    """Score detections as COCO does; prints nothing and changes neither argument.

    Args:
        results: COCO's results format, {"image_id", "category_id", "bbox", "score"} each, or a JSON file of it;
            boxes xywh in pixels of the original picture. May be empty.
        ground_truth: a COCO annotation file or its contents; `info`, `area`, `iscrowd` and annotation ids may be
            absent.
        image_ids: score these images only, for example the ones that a limit left; results on others do not count.
            None scores all images of the ground truth.

    Returns:
        Each of METRICS in [0, 1], and "per_class": {class name: AP}. None where no object of that size or class
        exists: COCO's -1. Objects that nothing was detected for give 0.

    Raises:
        InputError: a file is missing or not JSON, a key is absent, a box is not four finite numbers, or an image or
            category id is not in the ground truth.
    """
    truth = _GroundTruth(_read(ground_truth, "ground truth"), image_ids)
    detections = truth.number_results(_read(results, "results"))
    scores = _score(truth, detections)
    figures: dict[str, Any] = dict(zip(METRICS, map(_figure, scores.stats), strict=True))
    precision = scores.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class): all areas, 100 detections
    figures["per_class"] = {
        name: _figure(precision[:, :, place].mean()) for place, name in enumerate(truth.class_names)
    }
    return figures


class _GroundTruth:
    """Annotations with every id counted anew: images and categories from 0 in sorted order, annotations from 1.

    pycocotools takes a match with annotation id 0 for no match and counts a repeated id twice; with our own ids
    neither can happen, and ids may be strings. The sorted order is pycocotools' own, so ties fall as in its figures.
    """

    def __init__(self, data: Any, image_ids: Iterable[Any] | None) -> None:
        for key in ("images", "annotations", "categories"):
            if not isinstance(data, Mapping) or not isinstance(data.get(key), list):
                raise InputError(f"ground truth: no list `{key}`; give a COCO annotation file that has objects.")
        for key, needed in (("images", ["id"]), ("categories", ["id", "name"])):
            for place, item in enumerate(data[key]):
                if not isinstance(item, Mapping) or any(name not in item for name in needed):
                    raise InputError(f"ground truth: {key}[{place}] lacks {' or '.join(needed)}: {item!r}; add it.")
        categories = sorted(data["categories"], key=lambda category: _sortable(category["id"]))
        self.class_names = [str(category["name"]) for category in categories]
        if len(set(self.class_names)) < len(self.class_names):
            raise InputError(f"ground truth: class names are not unique: {_few(self.class_names)}; rename some.")
        self.categories = {category["id"]: place for place, category in enumerate(categories)}
        ids = sorted((image["id"] for image in data["images"]), key=_sortable)
        self.images = {image_id: place for place, image_id in enumerate(ids)}
        self.scored = self._numbers(image_ids)
        self.objects = [self._number_object(place, item) for place, item in enumerate(data["annotations"])]

    def _numbers(self, image_ids: Iterable[Any] | None) -> list[int]:
        if image_ids is None:
            return list(self.images.values())
        wanted = list(image_ids)
        _check_known(wanted, self.images, "image_ids", "image")
        return [self.images[image_id] for image_id in wanted]

    def _number_object(self, place: int, item: Mapping[str, Any]) -> dict[str, Any]:
        try:
            box = [float(value) for value in item["bbox"]]
            _, _, width, height = box
            return {
                "id": place + 1,
                "image_id": self.images[item["image_id"]],
                "category_id": self.categories[item["category_id"]],
                "bbox": box,
                "area": float(item["area"]) if "area" in item else width * height,
                "iscrowd": int(item.get("iscrowd", 0)),
            }
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"ground truth: annotation {item.get('id', place)!r} lacks a key, a box of four numbers, or a known "
                f"image or category id ({type(error).__name__}: {error}); correct the annotation file."
            ) from error

    def number_results(self, results: Any) -> list[dict[str, Any]]:
        """Checked copies of the results, with our ids and with the fields that pycocotools adds."""
        image_ids, category_ids, boxes, scores = _columns(results)
        _check_known(image_ids, self.images, "results", "image")
        _check_known(category_ids, self.categories, "results", "category")
        rows = zip(image_ids, category_ids, boxes.tolist(), scores.tolist(), strict=True)
        return [
            {
                "id": place + 1,
                "image_id": self.images[image_id],
                "category_id": self.categories[category_id],
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "score": score,
            }
            for place, (image_id, category_id, box, score) in enumerate(rows)
        ]


def _score(truth: _GroundTruth, detections: list[dict[str, Any]]) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = [{"id": number} for number in truth.images.values()]
    categories = [{"id": number} for number in truth.categories.values()]

    def index(annotations: list[dict[str, Any]]) -> Any:
        # Not COCO.loadRes: it fails on an empty list and on a ground truth without `info`.
        api = COCO()
        api.dataset = {"images": images, "categories": categories, "annotations": annotations}
        api.createIndex()
        return api

    with redirect_stdout(io.StringIO()):
        scores = COCOeval(index(truth.objects), index(detections), "bbox")
        scores.params.imgIds = truth.scored
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return scores


def _read(source: Any, what: str) -> Any:
    if not isinstance(source, str | Path):
        return source
    path = Path(source)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{what}: cannot read {path} ({error.strerror}); check the path.") from error
    except ValueError as error:
        raise InputError(f"{what}: {path} is not JSON ({error}); write it again.") from error


def _columns(results: Any) -> tuple[list[Any], list[Any], np.ndarray, np.ndarray]:
    """Image ids, category ids, boxes (D, 4) and scores (D,) of results that are well formed."""
    if not isinstance(results, Sequence) or not all(isinstance(result, Mapping) for result in results):
        raise InputError(f"results: expected a list with one {{{', '.join(_RESULT_KEYS)}}} for each detection.")
    for place, result in enumerate(results):
        missing = [key for key in _RESULT_KEYS if key not in result]
        if missing:
            raise InputError(f"results[{place}] lacks {', '.join(missing)}; it has {', '.join(result) or 'no keys'}.")
    image_ids, category_ids, boxes, scores = ([result[key] for result in results] for key in _RESULT_KEYS)
    return image_ids, category_ids, _numbers(boxes, "bbox", (4,)), _numbers(scores, "score", ())


def _numbers(values: list[Any], key: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 (D, *shape), or an error that names the first value that does not fit."""
    array = _valid(values, (len(values), *shape))
    if array is not None:
        return array
    place = next((place for place, value in enumerate(values) if _valid([value], (1, *shape)) is None), 0)
    wanted = "four finite numbers x, y, width, height with no negative size" if shape else "one finite number"
    raise InputError(f"results[{place}]: {key} is {values[place]!r}; expected {wanted}.")


def _valid(values: list[Any], shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        array = np.array(values) if values else np.zeros(shape)
    except ValueError:  # ragged
        return None
    if array.shape != shape or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        return None
    return None if array.ndim == 2 and (array[:, 2:] < 0).any() else array.astype(np.float64)


def _check_known(ids: list[Any], known: Mapping[Any, int], where: str, what: str) -> None:
    unknown = sorted({value for value in ids if value not in known}, key=_sortable)
    if unknown:
        raise InputError(
            f"{where}: {len(unknown)} unknown {what} id(s): {_few(unknown)}; the ground truth has {_few(list(known))}. "
            "Do both belong to the same data set?"
        )


def _few(values: Sequence[Any]) -> str:
    return ", ".join(map(repr, values[:5])) + (f", ... ({len(values)} in all)" if len(values) > 5 else "")


def _sortable(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value


def _figure(value: float) -> float | None:
    """COCO says -1 where there is nothing to find. A mean over one class is -1 or in [0, 1], never a mixture."""
    return None if value < 0 else float(value)


def save_metrics(metrics: Mapping[str, Any], path: str | Path) -> None:
    """Write what `evaluate` returned as JSON; figures that do not exist become null."""
    write_json(path, dict(metrics))


def format_table(metrics: Mapping[str, Any], title: str) -> str:
    """The twelve figures and the AP of each class as text for a terminal or a Markdown page, ASCII lines only.

    Args:
        metrics: what `evaluate` returned.
        title: the first line.
    """
    per_class = list(metrics["per_class"].items())
    tables = [_table([(name, metrics[name]) for name in METRICS], ("figure", "value"), columns=2)]
    if per_class:
        tables.append(_table(per_class, ("class", "AP"), columns=1 if len(per_class) <= 10 else 3))
    return "\n".join((title, "", *tables)).rstrip("\n")


def _table(rows: list[tuple[str, float | None]], heads: tuple[str, str], columns: int) -> str:
    """Name and value pairs, read from top to bottom in each of `columns` columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.MARKDOWN)
    for _ in range(columns):
        table.add_column(heads[0], overflow="fold")
        table.add_column(heads[1], justify="right", no_wrap=True)
    height = -(-len(rows) // columns)
    for line in range(height):
        # Text, because a class name such as "[b]" would be read as markup.
        cells = [Text(cell) for name, value in rows[line::height] for cell in (name, _format(value))]
        table.add_row(*cells)
    text = io.StringIO()
    Console(file=text, width=100, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines()) + "\n"


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
