"""Is b better than a, or was it luck? The difference in AP with its 95% interval, and the images that changed.

python tools/compare.py a=RUN_DIR b=RUN_DIR
python tools/compare.py a=OLD/best.ckpt b=results.json annotations=FILE out=DIR draws=1000

Each side is a run directory, a checkpoint, or a file in COCO's results format. Checkpoints are scored as tools/eval.py
does; what eval/scored.json says is of best.ckpt on these images is not scored again. Writes compare.json.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from detector.apps.evaluate import score
from detector.apps.scoring import EvalOptions, ScoringOptions, evaluation_data, what_was_scored
from detector.data.annotations import read_annotations
from detector.data.index import AnnotationIndex
from detector.data.json_file import read_json
from detector.data.results import Results, read_results, within_unit
from detector.data.splits import load_split
from detector.errors import InputError
from detector.evaluation.clock import Clock
from detector.evaluation.compare import compare as compare_results
from detector.evaluation.compare import format_comparison
from detector.files import check_writable, write_json
from detector.options import Count, Natural, Share
from detector.training.device_options import DeviceOptions

log = logging.getLogger(__name__)


class CompareOptions(ScoringOptions):
    """Which two, on what, and how."""

    a: str
    """a run directory, a checkpoint, or a COCO results file (.json)"""
    b: str
    """likewise; the differences are b - a"""
    annotations: str | None = None
    """COCO annotation file of results files; null: that of the other side's run"""
    out: str = "compare"
    """a folder; compare.json goes there, and the detections of checkpoints to a/ and b/ in it"""
    draws: Annotated[Count, Field(le=10_000)] = 1000  # 10,000: some GB
    """draws of the bootstrap over images"""
    seed: Natural = 0
    """seed of the draws"""
    score_threshold: Share = 0.3
    """detections below are not named in what changed on an image; AP counts all"""
    top: Natural = 20
    """images to name, better and worse"""
    trainer: DeviceOptions = DeviceOptions(devices=1)  # more would each run the whole command


@dataclass(frozen=True)
class Side:
    """One of the two: its results file, and the ground truth it belongs to where that is known."""

    results: Path
    index: AnnotationIndex | None = None


def compare(options: CompareOptions) -> None:
    """Compare two detectors on the same images.

    Raises:
        InputError: a side cannot be found, or the two do not belong to the same images and objects.
    """
    names = {"a": options.a, "b": options.b}
    load = cache(load_split)  # two runs on one data set: its file is parsed once
    sides = {name: _find_side(name, Path(path), options, load) for name, path in names.items()}
    index = _common_index(sides, options.annotations)
    found: dict[str, Results] = {}
    for name, side in sides.items():
        try:
            found[name], ranks = within_unit(read_results(side.results, index))
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if ranks:
            log.warning("%s: %s.", name, ranks)
    out = Path(options.out) / "compare.json"
    check_writable(out.parent)
    how = options.model_dump(include={"draws", "seed", "score_threshold", "top"})
    result = compare_results(found["a"], found["b"], index, **how)
    for name, side in sides.items():
        _check_recorded_score(name, side.results, result["figures"]["AP"][name])
    for row in (*result["better"], *result["worse"]):
        row["file_name"] = index.file_names[index.place[row["image_id"]]] or None
    result |= names | {"annotations": str(index.annotation_file)}
    log.info("%s\n", format_comparison(result, options.a, options.b))
    write_json(out, result)
    log.info("%s", out)


def _find_side(name: str, path: Path, options: CompareOptions, load: Callable[..., AnnotationIndex]) -> Side:
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
    from detector.inference.detector import Detector  # results files are compared without torch

    detector = Detector.load(checkpoint, device="cpu")
    index = load(evaluation_data(options.data, detector), "val", class_names=detector.class_names)
    if results is None or not _belongs(results, what_was_scored(str(checkpoint), index)):
        folder = Path(options.out) / name
        shared = {key: getattr(options, key) for key in ScoringOptions.model_fields}
        scoring = EvalOptions(**shared, ckpt=str(checkpoint), out=str(folder), report=False)
        score(scoring, detector, index, Clock())
        results = folder / "detections.json"
    return Side(results, index)


def _belongs(results: Path, expected: Mapping[str, Any]) -> bool:
    """Whether tools/eval.py wrote these detections of that checkpoint on those images."""
    try:
        return results.is_file() and read_json(results.with_name("scored.json"), "scored.json") == expected
    except InputError:  # none, of an earlier version
        return False


def _common_index(sides: Mapping[str, Side], given: str | None) -> AnnotationIndex:
    """The one ground truth of both sides.

    Raises:
        InputError: there is none, or there are two that differ.
    """
    known = {name: side.index for name, side in sides.items() if side.index is not None}
    if given and all(index.annotation_file.resolve() != Path(given).resolve() for index in known.values()):
        index = read_annotations(given).check()
        images = next(iter(known.values())).image_ids if known else index.image_ids
        if index.place.keys() >= set(images):
            index = index.select([index.place[image_id] for image_id in images])
        known["annotations"] = index
    if not known:
        raise InputError("a and b are results files: say what they are scored against, annotations=FILE.")
    (first, index), *others = known.items()
    for name, other in others:
        if index.annotation_file.resolve() != other.annotation_file.resolve() and _content(index) != _content(other):
            raise InputError(
                f"{first} belongs to {index.annotation_file} and {name} to {other.annotation_file}, which differ: "
                "detectors can only be compared on the same images and objects. Score both on one data set: "
                "data.root=DIR, or annotations=FILE with results files made on it."
            )
        if set(index.image_ids) != set(other.image_ids):
            raise InputError(
                f"a and b were scored on different images of {index.annotation_file} (data.val.limit differs); "
                "give one number for both, as large as the split for all of it."
            )
    return index


def _content(index: AnnotationIndex) -> list[object]:
    """Ids and names of images and classes, and the objects, in an order that is not the file's or the detector's."""
    index = index.select(sorted(range(len(index)), key=lambda i: repr(index.image_ids[i])))
    index = index.in_order(sorted(index.class_names))
    objects = np.column_stack((index.images, index.labels, index.xywh, index.crowd))
    images = list(zip(map(repr, index.image_ids), index.file_names, strict=True))
    return [images, index.class_names, index.category_ids, sorted(map(tuple, objects.tolist()))]


def _check_recorded_score(name: str, results: Path, ap: float | None) -> None:
    """Say so where the metrics beside a results file are not those of this ground truth."""
    path = results.parent / "metrics.json"
    try:
        before = read_json(path, "metrics file")["AP"]
        if "APr" in read_json(path, "metrics file"):  # LVIS's is another figure
            return
    except (InputError, KeyError, TypeError, IndexError):  # none, or not what tools/eval.py writes
        return
    if before != ap and not (isinstance(before, float) and ap is not None and abs(before - ap) <= 1e-6):
        log.warning(
            "%s: AP is %s here, but %s in the metrics.json beside %s: were these detections made on another data set, "
            "or another part of it? Remove them to have them made again.",
            name,
            ap,
            before,
            results,
        )
