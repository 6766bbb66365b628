"""Is b better than a, or was it luck? The difference in AP with its 95% interval, and the images that changed.

python tools/compare.py a=RUN_DIR b=RUN_DIR
python tools/compare.py a=OLD/best.ckpt b=results.json annotations=FILE out=DIR draws=1000

Each side is a run directory, a checkpoint, or a file in COCO's results format. Checkpoints are scored as tools/eval.py
does; a run that has been scored already (eval/detections.json) is not scored again. Writes compare.json.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import launch, plain

from omegaconf import DictConfig

from detector.apps.evaluate import evaluate, evaluation_data
from detector.data.splits import load_split
from detector.errors import InputError
from detector.evaluation.compare import compare, format_comparison
from detector.files import write_json
from detector.inference.detector import Detector
from detector.training.checks import check_values

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Side:
    """One of the two: its results, and the ground truth they belong to where that is known."""

    results: Path
    annotations: Path | None = None
    image_ids: list[Any] | None = None


def main(config: DictConfig) -> None:
    values = plain(config)
    check_values(values)
    given = {name: str(values[name]) for name in ("a", "b")}
    sides = {name: find_side(name, Path(path), values) for name, path in given.items()}
    annotations, image_ids = common_truth(sides, values["annotations"])
    result = compare(
        sides["a"].results,
        sides["b"].results,
        annotations,
        image_ids=image_ids,
        **{key: values[key] for key in ("draws", "seed", "score_threshold", "top")},
    )
    for name, side in sides.items():
        check_recorded_score(name, side.results, result["figures"]["AP"][name])
    add_file_names(result, annotations)
    result |= {"a": given["a"], "b": given["b"], "annotations": str(annotations)}
    out = Path(str(values["out"])) / "compare.json"
    write_json(out, result)
    log.info("%s\n\n%s", format_comparison(result, given["a"], given["b"]), out)


def find_side(name: str, path: Path, values: Mapping[str, Any]) -> Side:
    """The results of a run directory, a checkpoint or a results file; a checkpoint is scored here."""
    if path.suffix == ".json":
        return Side(path)
    checkpoint, results = path, None
    if path.is_dir():
        checkpoint, results = path / "best.ckpt", path / "eval" / "detections.json"
        if not checkpoint.is_file():
            if (path / "detections.json").is_file():  # what tools/eval.py wrote
                return Side(path / "detections.json")
            raise InputError(
                f"{name}={path}: no best.ckpt in this folder; give a run directory that training wrote, or the folder "
                "that tools/eval.py wrote to."
            )
        if not results.is_file() or results.stat().st_mtime < checkpoint.stat().st_mtime:
            results = None
    detector = Detector.load(checkpoint, device="cpu")
    index = load_split(evaluation_data(values, detector), "val", class_names=detector.class_names)
    if results is None:
        folder = Path(str(values["out"])) / name
        fixed = {"metrics": "coco", "report": False, "max_proposals": None}
        evaluate(dict(values) | fixed | {"ckpt": checkpoint, "out": folder})
        results = folder / "detections.json"
    return Side(results, index.annotation_file, index.image_ids)


def common_truth(sides: Mapping[str, Side], given: str | None) -> tuple[Path, list[Any] | None]:
    """The one annotation file of both sides, and the images to compare on.

    Raises:
        InputError: there is none, or there are two that differ.
    """
    files = {name: side.annotations for name, side in sides.items() if side.annotations}
    if given:
        files["annotations"] = Path(str(given))
    if not files:
        raise InputError("a and b are results files: say what they are scored against, annotations=FILE.")
    (first, path), *others = files.items()
    for other, other_path in others:
        if path.resolve() != other_path.resolve() and _content(path) != _content(other_path):
            raise InputError(
                f"{first} belongs to {path} and {other} to {other_path}, which differ: detectors can only be compared "
                "on the same images and objects. Score both on one data set: data.root=DIR, or annotations=FILE with "
                "results files made on it."
            )
    images = [side.image_ids for side in sides.values() if side.image_ids is not None]
    if any(sorted(ids, key=repr) != sorted(images[0], key=repr) for ids in images):
        raise InputError(
            f"a and b were scored on different images of {path} (data.val.limit or data.keep_empty differ); "
            "give data.root=DIR, and data.val.limit=N if only some are wanted."
        )
    return path, images[0] if images else None


def _content(path: Path) -> Any:
    """What must be the same: ids and names of images and classes, and the objects, in any order."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        keys = {
            "images": ("id", "file_name"),
            "categories": ("id", "name"),
            "annotations": ("image_id", "category_id", "bbox", "iscrowd"),
        }
        return {part: sorted(repr([x.get(key) for key in keys[part]]) for x in content[part]) for part in keys}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path.") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: is no COCO annotation file ({error!r}); give one.") from error


def check_recorded_score(name: str, results: Path, ap: float | None) -> None:
    """Say so where the metrics beside a results file are not those of this ground truth."""
    try:
        recorded = json.loads((results.parent / "metrics.json").read_text(encoding="utf-8"))["AP"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if recorded is None or ap is None or abs(recorded - ap) > 1e-6:
        log.warning(
            "%s: AP is %s here, but %s in the metrics.json beside %s: were these detections made on another data set, "
            "or another part of it? Remove them to have them made again.", name, ap, recorded, results,
        )  # fmt: skip


def add_file_names(result: Mapping[str, Any], annotations: Path) -> None:
    images = json.loads(annotations.read_text(encoding="utf-8"))["images"]
    names = {image["id"]: image.get("file_name") for image in images}
    for row in (*result["better"], *result["worse"]):
        row["file_name"] = names[row["image_id"]]


if __name__ == "__main__":
    launch(main, config_name="compare")
