"""The detectors that come with the package: small, without a place of their machine, and able to see."""

from __future__ import annotations

import json
from typing import Any

import pytest

import detector
from detector import cli
from detector.inference import shipped
from detector.inference.detector import Detector, read_checkpoint

VOC = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip


@pytest.mark.parametrize("name", ["v2_0.5x_voc", "v2_1x_voc"])
def test_a_detector_of_the_package(name: str) -> None:
    data = pytest.importorskip("skimage.data")
    assert shipped.find(name).stat().st_size < 5e6
    about = json.dumps(read_checkpoint(shipped.find(name))["detector"])
    assert not any(place in about for place in ("/home", "/root", "/tmp", "/work", "/shared"))
    loaded = detector.load(name)
    assert isinstance(loaded, Detector)
    assert list(loaded.class_names) == VOC
    assert loaded.thresholds is not None
    person, cat = loaded.predict([data.astronaut(), data.chelsea()])
    assert person.names[0] == "person"
    assert cat.names[0] == "cat"
    # Where they are, by eye: she fills the left two thirds of 512 x 512, the cat's head the middle of 451 x 300.
    assert person.scores[0] > 0.9
    assert all(abs(got - seen) < 60 for got, seen in zip(person.boxes[0], (10, 0, 380, 512), strict=True))


# What recipe=voc was when v2_1x_voc was trained (docs/weights.md).
OLD = ["rpn.foreground_iou=0.7", "optimizer.lr=0.001", "optimizer.lr_scales={backbone: 0.3}"]
LARGER = ["input.short_side=320", "input.long_side=427"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v2_0.5x_voc", ["backbone=v2_0.5x", *LARGER, "augment.batch_scale=[0.9,0.9]", "schedule.epochs=21"]),
        ("v2_1x_voc", ["backbone=v2_1x", "backbone.activation=leaky_relu", "freeze.stages=2", *OLD]),
    ],
)
def test_recipe_voc_is_how_it_was_trained(name: str, words: list[str]) -> None:
    """By what the file records of its training, all but places and the starting weights."""
    recipe: Any = cli.compose("train", ["recipe=voc", *words]).options()
    recorded = read_checkpoint(shipped.find(name))["detector"]["provenance"]["config"]
    now = recipe.to_dict()
    assert recorded["ema"] == now["ema"]
    for part in ("rpn", "light_head", "neck", "input", "augment", "optimizer", "schedule", "freeze", "train"):
        # What has become an option since was not there to be recorded.
        assert recorded[part] == {key: now[part][key] for key in recorded[part]}, part


def test_what_is_taken_without_a_name() -> None:
    assert shipped.names() == ["v2_0.5x_voc", "v2_1x_voc"]
    one, other = detector.load(), detector.load("v2_1x_voc")
    assert isinstance(one, Detector)
    assert isinstance(other, Detector)
    assert one.describe() == other.describe()
