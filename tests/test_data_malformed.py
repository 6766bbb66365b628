"""Malformed annotation files from a seed: training refuses what the doctor calls an error, and nothing else fails."""

from __future__ import annotations

import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detector.apps.doctor.examine import examine, format_diagnosis
from detector.data.annotations import load_annotations, read_annotations
from detector.data.image_files import match_files
from detector.data.preprocess import Preprocessing
from detector.data.results import Results
from detector.errors import InputError
from detector.evaluation.metrics import compute_metrics

Content = dict[str, Any]

# What has no business in most places of an annotation file.
VALUES: list[Any] = [
    None, "", 0, -1, 1, 3, "3", "3.0", 3.0, 3.5, True, False, float("nan"), float("inf"), -float("inf"), 1e308, -1e308,
    10**25, -(10**25), 10**400, 2**31, 2**63, 1e-320, "NaN", "inf", "1e3", "1_000", " 3 ", "--5", "²", "true", "no",
    "9" * 5000, "x", "\ud800", "\0", [], [1], {}, [[]], {"a": 1}, [1, 2, 3, 4], ["1", "2", "3", "4"], [1, 2, 3],
    [0, 0, 0, 0], [-5, -5, 1e9, 1e9], [1e308] * 4, "a" * 300, "C:\\a.png", "/etc/passwd", "../x.png", ".", "..",
    "images\\a.png", "data:image/png;base64,xx",
]  # fmt: skip


def mutant(content: Content, rng: random.Random) -> Content:
    """The content with one to three entries or values changed, taken away or repeated."""
    changed = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        section, how = rng.choice(list(content)), rng.random()
        if how < 0.05:
            changed[section] = copy.deepcopy(rng.choice(VALUES))
        entries = changed[section]
        if not isinstance(entries, list) or not entries:
            continue
        place = rng.randrange(len(entries))
        entry = entries[place]
        if how < 0.1:
            entries[place] = copy.deepcopy(rng.choice(VALUES))
        elif not isinstance(entry, dict) or not entry:
            continue
        elif how < 0.2:
            entry.pop(rng.choice(list(entry)))
        elif how < 0.3:
            entries.append(copy.deepcopy(entry))
        elif how < 0.4 and isinstance(entry.get("bbox"), list) and entry["bbox"]:
            entry["bbox"][rng.randrange(len(entry["bbox"]))] = copy.deepcopy(rng.choice(VALUES))
        else:
            entry[rng.choice([*entry, "ignore", "difficult", "frequency", "segmentation"])] = copy.deepcopy(
                rng.choice(VALUES)
            )
    return changed


def is_accepted(path: Path, images: Path) -> bool:
    """Whether training takes the file; it is scored then, and the doctor must agree."""
    try:
        index = load_annotations(path, images)
        refused = ""
    except InputError as error:
        refused = str(error)
        assert len(refused) < 1500
    seen = match_files(read_annotations(path, images))
    assert any(fault.severity == "error" for fault in seen.faults) == bool(refused), refused
    diagnosis = examine({"train": seen}, preprocessing=Preprocessing(short_side=64, long_side=96))
    assert json.loads(json.dumps(diagnosis.to_dict()))
    assert format_diagnosis(diagnosis)
    if refused:
        return False
    perfect = Results(index.images, index.labels, index.xywh, np.ones(len(index.labels)))
    metrics = compute_metrics(perfect, index)
    countable = ~index.difficult & (index.xywh[:, 2:] > 0).all(axis=1) & (index.areas > 0)
    if countable.all() and len(countable):
        assert metrics["AP"] == pytest.approx(1)
    return True


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_doctor_and_training_agree_on_malformed_files(tiny_coco: Path, seed: int) -> None:
    path = tiny_coco / "annotations" / "train.json"
    content = json.loads(path.read_text())
    accepted = 0
    for number in range(250):
        changed = mutant(content, random.Random(f"{seed} {number}"))
        path.write_text(json.dumps(changed), encoding="utf-8")
        start = time.monotonic()
        try:
            accepted += is_accepted(path, tiny_coco / "images")
        except Exception as error:
            raise AssertionError(f"mutant {number}: {path.read_text()[:2000]}") from error
        assert time.monotonic() - start < 10, number
    assert accepted > 75


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("images", "width", 10**30), ("images", "height", 1e30), ("annotations", "bbox", [1e308, 1, 1e308, 1])],
)
def test_gigantic_numbers_are_refused_by_name(tiny_coco: Path, section: str, key: str, value: Any) -> None:
    path = tiny_coco / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content[section][0][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"`{key}` of .* is .*, expected"):
        load_annotations(path, tiny_coco / "images")


def test_a_small_file_that_declares_a_gigantic_image(tiny_coco: Path) -> None:
    Image.new("1", (30000, 30000)).save(tiny_coco / "images" / "a.png", compress_level=1)
    start = time.monotonic()
    index = load_annotations(tiny_coco / "annotations" / "train.json", tiny_coco / "images")
    with pytest.raises(InputError, match=r"image id 10: .*a\.png: too many pixels to be safe to decode"):
        index.read(0)
    assert time.monotonic() - start < 5
