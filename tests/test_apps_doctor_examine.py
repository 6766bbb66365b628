"""The data doctor: a clean data set has nothing but information, and each planted fault is found, it alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from detector.apps.doctor.examine import Diagnosis, examine, format_diagnosis
from detector.data.annotations import load_annotations, read_annotations
from detector.data.image_files import match_files
from detector.data.preprocess import Preprocessing
from detector.data.shapes import ensure_shapes
from detector.errors import InputError
from detector.models.anchor_fit import best_anchor_iou, coverage, propose
from detector.models.anchors import AnchorGrid
from detector.models.rpn import RPNOptions

WIDTH, HEIGHT = 96, 64
ANCHORS = RPNOptions(scales=(24, 32))
Content = dict[str, Any]


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """24 training and 12 validation images of noise, each with one box of each of two classes."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    for split, count in (("train", 24), ("val", 12)):
        images, annotations = [], []
        for image in range(1, count + 1):
            name = f"{split}_{image}.png"
            Image.fromarray(rng.integers(0, 256, (8, 12, 3), np.uint8)).resize((WIDTH, HEIGHT)).save(
                tmp_path / "images" / name
            )
            images.append({"id": image, "file_name": name, "width": WIDTH, "height": HEIGHT})
            for label, x in ((1, 4), (2, 50)):
                width, height = rng.uniform(22, 34, 2).round(2).tolist()
                y = round(rng.uniform(1, 28), 2)
                annotations.append({"id": len(annotations) + 1, "image_id": image, "category_id": label,
                                    "bbox": [x, y, width, height], "area": width * height, "iscrowd": 0})  # fmt: skip
        categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return tmp_path


def diagnose(root: Path, size: tuple[int, int] = (64, 96), anchors: RPNOptions = ANCHORS) -> Diagnosis:
    splits = {
        split: match_files(read_annotations(root / "annotations" / f"{split}.json", root / "images"))
        for split in ("train", "val")
    }
    preprocessing = Preprocessing(short_side=size[0], long_side=size[1])
    return examine(splits, preprocessing=preprocessing, anchors=(anchors, 16), workers=2)


def faults(diagnosis: Diagnosis) -> dict[str, tuple[str, int]]:
    """Severity and count of every finding that is more than information."""
    return {f.check: (f.severity, f.count) for f in diagnosis.findings if f.severity != "info"}


def edit(root: Path, change: Callable[[Content], Any], split: str = "train") -> None:
    path = root / "annotations" / f"{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_clean_data_set_has_nothing_but_information(clean: Path) -> None:
    diagnosis = diagnose(clean)
    assert faults(diagnosis) == {}
    assert {f.check for f in diagnosis.findings} == {"class_balance", "empty_images", "anchor_coverage"}
    balance = next(f for f in diagnosis.findings if f.check == "class_balance")
    assert balance.figures == {"train": {"cat": 24, "dog": 24}, "val": {"cat": 12, "dog": 12}}
    assert diagnosis.splits["train"]["pictures"] == 24
    assert diagnosis.splits["val"]["boxes"] == 24


def test_the_embedded_data_set_is_clean(tmp_path: Path) -> None:
    root = ensure_shapes(tmp_path / "shapes", train=60, val=30)
    anchors = RPNOptions(scales=(16, 32, 64, 128, 224))
    assert faults(diagnose(root, (256, 256), anchors)) == {}


def image(content: Content, place: int, **values: Any) -> None:
    content["images"][place].update(values)


def box(content: Content, place: int, **values: Any) -> None:
    if "bbox" in values:
        del content["annotations"][place]["area"]  # of the box that it had
    content["annotations"][place].update(values)


# The change, and all that may be found: check, severity, count.
IN_THE_FILE: dict[str, tuple[Callable[[Content], Any], str, str, int]] = {
    "no section": (lambda c: c.pop("categories"), "file", "error", 1),
    "no image": (lambda c: c.update(images=[], annotations=[]), "file", "error", 1),
    "no bbox": (lambda c: c["annotations"][3].pop("bbox"), "entries", "error", 1),
    "bbox of text": (lambda c: box(c, 3, bbox=[1, 2, "x", 4]), "entries", "error", 1),
    "bbox with NaN": (lambda c: box(c, 3, bbox=[1, 2, float("nan"), 4]), "entries", "error", 1),
    "entry that is a list": (lambda c: c["annotations"].append([1, 2]), "entries", "error", 1),
    "id that is a list": (lambda c: box(c, 3, image_id=[1]), "entries", "error", 1),
    "negative width": (lambda c: image(c, 0, width=-3), "entries", "error", 1),
    "two faults": (lambda c: (image(c, 0, width=-3), box(c, 3, bbox=[])), "entries", "error", 2),
    "annotation id twice": (lambda c: box(c, 3, id=1), "annotation_ids", "warning", 1),
    "category id twice": (
        lambda c: c["categories"].append({"id": 2, "name": "dog"}), "category_ids", "error", 1
    ),
    "unknown image": (lambda c: box(c, 3, image_id=77), "unknown_images", "error", 1),
    "unknown category": (lambda c: box(c, 3, category_id=9), "unknown_categories", "error", 1),
    "no area": (lambda c: box(c, 3, bbox=[4, 4, 0, 9]), "degenerate_boxes", "warning", 1),
    "negative size": (lambda c: box(c, 3, bbox=[30, 30, -9, 9]), "degenerate_boxes", "warning", 1),
    "quite outside": (lambda c: box(c, 3, bbox=[200, 4, 20, 20]), "degenerate_boxes", "warning", 1),
    "partly outside": (lambda c: box(c, 3, bbox=[80, 4, 30, 30]), "boxes_outside", "warning", 1),
    "tiny": (lambda c: box(c, 3, bbox=[50, 4, 30, 1.5]), "tiny_boxes", "warning", 1),
    "twice": (
        lambda c: c["annotations"].append(c["annotations"][3] | {"id": 900}), "duplicate_boxes", "warning", 1
    ),
    "size": (lambda c: image(c, 2, width=HEIGHT * 2, height=WIDTH * 2), "size_mismatch", "error", 1),
    "missing": (lambda c: image(c, 2, file_name="nowhere.png"), "missing_files", "error", 1),
    "mostly empty": (
        lambda c: c["annotations"].__delitem__(slice(20, None)), "empty_images", "warning", 14
    ),
}  # fmt: skip


def test_all_entries_at_fault_are_named_and_five_of_them_in_the_terminal(clean: Path) -> None:
    edit(clean, lambda content: [one.update(category_id=9) for one in content["annotations"][:30]])
    diagnosis = diagnose(clean)
    (finding,) = [one for one in diagnosis.to_dict()["findings"] if one["check"] == "unknown_categories"]
    assert len({*finding["examples"]}) == finding["count"] == 30
    text = format_diagnosis(diagnosis)
    assert text.count("is not in `categories`") == 5
    assert "... and 25 more: doctor.json" in text


@pytest.mark.parametrize("name", IN_THE_FILE)
def test_a_fault_in_the_annotation_file(clean: Path, name: str) -> None:
    change, check, severity, count = IN_THE_FILE[name]
    edit(clean, change)
    diagnosis = diagnose(clean)
    found = faults(diagnosis)
    # A class that is declared twice is also a name twice, and other classes than the other split's.
    implied = {"category_names", "categories_differ"} if check == "category_ids" else set()
    assert {key: value for key, value in found.items() if key not in implied} == {check: (severity, count)}
    finding = next(f for f in diagnosis.findings if f.check == check)
    assert finding.remedy
    assert "train" in " ".join(finding.examples)


@pytest.mark.parametrize("name", [name for name in IN_THE_FILE if name not in ("size", "missing")])
def test_training_refuses_what_is_an_error_here_and_nothing_else(clean: Path, name: str) -> None:
    change, _, severity, _ = IN_THE_FILE[name]
    edit(clean, change)
    with pytest.raises(InputError) if severity == "error" else nullcontext():
        load_annotations(clean / "annotations" / "train.json", clean / "images")


def test_a_repeated_image_id(clean: Path) -> None:
    edit(clean, lambda c: image(c, 5, id=1))
    found = faults(diagnose(clean))
    # The objects of the image that lost its number belong to nobody.
    assert found == {"image_ids": ("error", 1), "unknown_images": ("error", 2)}


def test_a_file_listed_twice(clean: Path) -> None:
    edit(clean, lambda c: c["images"].append(c["images"][0] | {"id": 500}))
    assert faults(diagnose(clean)) == {"file_names": ("warning", 1)}


def test_other_classes_in_the_other_split(clean: Path) -> None:
    edit(clean, lambda c: c["categories"].reverse())
    assert faults(diagnose(clean)) == {}  # order in the file does not matter, ids do
    edit(clean, lambda c: c["categories"][0].update(name="bird"), "val")
    assert faults(diagnose(clean)) == {"categories_differ": ("error", 2)}


def test_a_class_without_boxes(clean: Path) -> None:
    for split in ("train", "val"):
        edit(clean, lambda c: c["categories"].append({"id": 3, "name": "bird"}), split)
    assert faults(diagnose(clean)) == {"unused_categories": ("warning", 2)}


def test_a_rare_class(clean: Path) -> None:
    def change(content: Content) -> None:
        content["categories"].append({"id": 3, "name": "bird"})
        box(content, 0, category_id=3)

    for split in ("train", "val"):
        edit(clean, change, split)
    assert faults(diagnose(clean)) == {"rare_classes": ("warning", 1)}


def test_a_class_that_one_split_has_too_much_of(clean: Path) -> None:
    def change(content: Content) -> None:
        for annotation in content["annotations"][:-2]:
            annotation["category_id"] = 1
        for annotation in content["annotations"][1:12]:
            annotation["category_id"] = 2

    edit(clean, change)
    edit(clean, lambda c: [a.update(category_id=2) for a in c["annotations"][2:]], "val")
    found = faults(diagnose(clean))
    # dog: 12 of 48 boxes against 23 of 24: p = 0.486, z = (0.958 - 0.25) / sqrt(0.486 * 0.514 * (1/48 + 1/24)) = 5.7
    assert set(found) == {"split_skew"}


def test_a_damaged_file_and_one_that_is_no_image(clean: Path) -> None:
    path = clean / "images" / "train_3.png"
    path.write_bytes(path.read_bytes()[:200])
    (clean / "images" / "val_2.png").write_text("not a picture")
    assert faults(diagnose(clean)) == {"unreadable_files": ("error", 2)}


def test_an_annotation_file_that_is_damaged_or_missing(clean: Path) -> None:
    (clean / "annotations" / "train.json").write_text('{"images": [')
    (clean / "annotations" / "val.json").unlink()
    assert faults(diagnose(clean)) == {"file": ("error", 2)}


@pytest.mark.parametrize(("orientation", "declared", "odd"), [
    (6, (WIDTH, HEIGHT), True),   # the boxes are in the frame before the rotation
    (6, (HEIGHT, WIDTH), False),  # after it, as all of us see the image
    (3, (WIDTH, HEIGHT), True),   # upside down: the size does not tell
    (1, (WIDTH, HEIGHT), False),
])  # fmt: skip
def test_an_exif_rotation(clean: Path, orientation: int, declared: tuple[int, int], odd: bool) -> None:
    path = clean / "images" / "train_1.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(path).copy().save(path, exif=exif)

    def change(content: Content) -> None:
        image(content, 0, width=declared[0], height=declared[1])
        box(content, 0, bbox=[4, 4, 26, 26])
        box(content, 1, bbox=[32, 32, 26, 26])

    edit(clean, change)
    assert faults(diagnose(clean)) == ({"exif_unknown": ("error", 1)} if odd else {})


def copy_image(root: Path, source: str, target: str, how: Callable[[Image.Image], Image.Image]) -> None:
    how(Image.open(root / "images" / source).copy()).save(root / "images" / target)


def brighter(picture: Image.Image) -> Image.Image:
    return picture.point(lambda value: min(255, value + 3))


def smaller_and_back(picture: Image.Image) -> Image.Image:
    return picture.resize((WIDTH // 2, HEIGHT // 2)).resize((WIDTH, HEIGHT))


@pytest.mark.parametrize(
    ("target", "how", "check", "severity"),
    [
        ("val_2.png", Image.Image.copy, "leak", "error"),
        ("val_2.png", brighter, "near_leak", "warning"),
        ("val_2.png", smaller_and_back, "near_leak", "warning"),
        ("train_7.png", Image.Image.copy, "repeats", "warning"),
        ("train_7.png", brighter, "near_repeats", "warning"),
    ],
)
def test_the_same_image_again(clean: Path, target: str, how: Any, check: str, severity: str) -> None:
    copy_image(clean, "train_1.png", target, how)
    diagnosis = diagnose(clean)
    assert faults(diagnosis) == {check: (severity, 1)}
    example = next(f for f in diagnosis.findings if f.check == check).examples[0]
    assert "train/train_1.png" in example
    assert target in example


def test_black_images_are_alike_and_a_mirrored_one_is_not(clean: Path) -> None:
    copy_image(clean, "train_1.png", "val_2.png", lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert faults(diagnose(clean)) == {}
    for name in ("train_3.png", "val_4.png"):
        copy_image(clean, "train_1.png", name, lambda p: p.point(lambda _: 0))
    assert faults(diagnose(clean)) == {"leak": ("error", 1)}


def test_anchors_that_do_not_fit(clean: Path) -> None:
    diagnosis = diagnose(clean, anchors=RPNOptions(scales=(128, 256)))
    assert set(faults(diagnosis)) == {"anchor_coverage"}
    finding = next(f for f in diagnosis.findings if f.check == "anchor_coverage")
    assert finding.figures["before"]["share_below_0.5"] == 1.0
    assert finding.figures["after"]["share_below_0.5"] == 0.0
    assert finding.figures["override"] in finding.remedy
    # Twice the input, twice the scales that fit.
    larger = diagnose(clean, size=(128, 192), anchors=RPNOptions(scales=(128, 256)))
    doubled = next(f for f in larger.findings if f.check == "anchor_coverage").figures["proposed_scales"]
    assert np.mean(doubled) == pytest.approx(np.mean(finding.figures["proposed_scales"]) * 2, rel=0.2)


def test_best_anchor_iou_against_the_grid_of_the_network() -> None:
    """Every anchor of AnchorGrid against every box, by torchvision; boxes near and over borders included."""
    rng = np.random.default_rng(0)
    scales, ratios, stride, (height, width) = [16, 32, 90], [0.5, 1.0, 2.3], 16, (96, 160)
    corner, size = rng.uniform(0, (width - 5, height - 5), (300, 2)), rng.uniform(2, 120, (300, 2))
    boxes = np.concatenate((corner, np.minimum(corner + size, (width, height))), axis=1)
    grid = AnchorGrid(scales=scales, ratios=ratios, stride=stride)(height // stride, width // stride)
    expected = box_iou(torch.from_numpy(boxes), grid.double()).amax(dim=1).numpy()
    canvas = np.tile([[height, width]], (300, 1))
    np.testing.assert_allclose(best_anchor_iou(boxes, canvas, scales, ratios, stride), expected, atol=1e-5)


def test_proposed_anchors_are_those_of_the_objects() -> None:
    """Objects of two sizes and two shapes, made to measure: the proposal finds these, and the coverage shows it."""
    rng = np.random.default_rng(0)
    side = rng.choice([24.0, 96.0], 400)
    ratio = rng.choice([0.5, 2.0], 400)
    size = np.stack((side * ratio**-0.5, side * ratio**0.5), axis=1)
    centre = rng.integers(5, 15, (400, 2)) * 16.0
    boxes, canvas = np.concatenate((centre - size / 2, centre + size / 2), axis=1), np.full((400, 2), 320)
    scales, ratios = propose(boxes, canvas, [32, 256], [0.8, 1.2], 16)
    assert scales == pytest.approx([24, 96], rel=0.05)
    assert ratios == pytest.approx([0.5, 2.0], rel=0.05)
    figures = coverage(best_anchor_iou(boxes, canvas, [24, 96], [0.5, 2.0], 16), 0.7)
    assert figures["mean_iou"] == pytest.approx(1.0)
    assert figures["histogram"] == [0] * 9 + [400]
    assert propose(boxes, canvas, [24, 96], [0.5, 2.0], 16) == ([24, 96], [0.5, 2.0])


def test_all_faults_are_listed_where_loading_stops_at_the_first(clean: Path) -> None:
    def change(content: Content) -> None:
        image(content, 2, file_name="nowhere.png")
        box(content, 3, category_id=9)
        box(content, 4, bbox=[1, 2, 3])
        box(content, 6, bbox=[80, 4, 30, 30])

    edit(clean, change)
    with pytest.raises(InputError):
        load_annotations(clean / "annotations" / "train.json", clean / "images")
    diagnosis = diagnose(clean)
    assert set(faults(diagnosis)) == {"missing_files", "unknown_categories", "entries", "boxes_outside"}
    severities = [f.severity for f in diagnosis.findings]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)
    text = format_diagnosis(diagnosis)
    assert all(f.check in text and f.message in text and f.remedy in text for f in diagnosis.findings)
    assert "3 errors, 1 warnings" in text
    plain = json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
    assert plain["counts"] == {"error": 3, "warning": 1, "info": 3}


def test_images_of_12_bits_in_16_are_nearly_black(clean: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 4096, (HEIGHT, WIDTH), np.uint16)
    for name, values in (("train_1", pixels), ("train_2", pixels[::-1] * 16), ("train_3", pixels * 0)):
        Image.fromarray(values).save(clean / "images" / f"{name}.png")
    diagnosis = diagnose(clean)
    assert faults(diagnosis) == {"dark_images": ("warning", 1)}
    finding = next(f for f in diagnosis.findings if f.check == "dark_images")
    assert "train_1.png: its brightest value is 16 of 255" in finding.examples[0]


def test_what_makes_a_training_pointless_is_a_finding_too(clean: Path) -> None:
    edit(clean, lambda c: c["annotations"].clear())
    assert faults(diagnose(clean))["nothing_to_learn"] == ("error", 1)
