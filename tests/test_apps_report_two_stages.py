from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scored_data import write_scored_data
from scored_rows import evaluate
from torchvision.ops import box_iou

from detector.apps.report.two_stages import two_stages
from detector.data.annotations import load_annotations
from detector.data.index import AnnotationIndex
from detector.data.preprocess import pad, resize
from detector.errors import InputError
from detector.inference.detector import Detector
from detector.models.fuse import fuse

SIZES = {"all": (0, 1e10), "small": (0, 1024), "medium": (1024, 9216), "large": (9216, 1e10)}


@pytest.fixture
def index(tmp_path: Path, small_detector: Detector) -> AnnotationIndex:
    """Five images with objects near what the detector finds, one of them a crowd region, one image empty."""
    root = write_scored_data(tmp_path / "data", small_detector, empty=(3,))
    path = root / "annotations/val.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["iscrowd"] = 1
    # One that no anchor resembles, and one that is an anchor: scale 64, ratio 0.5, centred on the image.
    content["annotations"] += [
        {"id": 900, "image_id": 100, "category_id": 3, "bbox": [1, 1, 3, 2], "area": 6, "iscrowd": 0},
        {"id": 901, "image_id": 98, "category_id": 17, "bbox": [2.75, 9.5, 90.5, 45], "area": 4073, "iscrowd": 0},
    ]
    path.write_text(json.dumps(content))
    return load_annotations(path, root / "images")


def frames(
    detector: Detector, index: AnnotationIndex
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]]:
    """Per image: padded input, its size, truths in the input's frame, and their areas in the file."""
    found = []
    for i in range(len(index)):
        image = index.read(i)
        resized = resize(image, *detector.preprocessing.target_size(*image.shape[:2]))
        boxes, _, crowd = index.objects(i)
        factor = np.array([resized.shape[1] / image.shape[1], resized.shape[0] / image.shape[0]] * 2)
        areas = index.areas[index.offsets[i] : index.offsets[i + 1]][~crowd]
        truths = torch.from_numpy(boxes[~crowd] * factor)
        found.append((torch.from_numpy(pad([resized])), torch.tensor([resized.shape[:2]]), truths, areas))
    return found


@torch.no_grad()
def test_recall_and_anchors_are_those_of_a_plain_loop(small_detector: Detector, index: AnnotationIndex):
    network = small_detector.network.eval()
    reached: list[tuple[float, list[float], float]] = []  # area, best IoU by number of proposals, by anchors
    for pixels, size, truths, areas in frames(small_detector, index):
        objectness, deltas, anchors = network.rpn(network.features(pixels)[0])
        proposals = network.rpn.propose(objectness, deltas, anchors, size)
        boxes = proposals.boxes[0][proposals.valid[0]].double()
        for truth, area in zip(truths, areas, strict=True):
            ious = box_iou(boxes, truth[None])[:, 0].tolist()
            anchor = box_iou(anchors.double(), truth[None]).max().item()
            reached.append((float(area), [max(ious[:10]), max(ious[:20])], anchor))

    found = two_stages(small_detector, index)

    assert found["images"] == 5
    assert (found["limit"], found["recall"]["proposals"]) == (20, [10, 20])
    foreground = small_detector.options.spec()["rpn"]["foreground_iou"]
    for name, (low, high) in SIZES.items():
        own = [row for row in reached if low <= row[0] <= high]
        recall, anchors_of = found["recall"][name], found["anchors"][name]
        assert recall["truths"] == anchors_of["truths"] == len(own)
        if not own:
            assert (recall["recall"], anchors_of["unmatched"]) == (None, None)
            continue
        for place in range(2):
            hits = [[best[place] >= t / 100 for t in range(50, 100, 5)] for _, best, _ in own]
            assert recall["recall50"][place] == pytest.approx(np.mean([hit[0] for hit in hits]))
            assert recall["recall"][place] == pytest.approx(np.mean(hits))
        assert anchors_of["unmatched"] == pytest.approx(np.mean([iou < foreground for _, _, iou in own]))
        bins = [sum(k / 20 <= iou < (k + 1) / 20 for _, _, iou in own) for k in range(20)]
        assert anchors_of["histogram"] == bins
    assert found["recall"]["small"]["truths"] > 0
    assert found["recall"]["large"]["truths"] == 0
    assert 0 < found["recall"]["all"]["recall50"][0] < found["recall"]["all"]["recall50"][1] <= 1
    assert 0 < found["anchors"]["all"]["unmatched"] < 1
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("fused", [False, True])
def test_ap_with_each_number_is_that_of_a_detector_with_this_limit(
    small_detector: Detector, index: AnnotationIndex, fused: bool
):
    if fused:
        small_detector.network, small_detector.fused = fuse(small_detector.network), True

    found = two_stages(small_detector, index, budgets=(5, 12, 400))

    assert [row["proposals"] for row in found["budgets"]] == [5, 12, 20]
    rpn = small_detector.network.rpn
    for row in found["budgets"]:
        limits = rpn.options.test_limits.model_copy(update={"after_nms": row["proposals"]})
        rpn.options = rpn.options.model_copy(update={"test_limits": limits})
        results: list[dict[str, Any]] = []
        for i, image_id in enumerate(index.image_ids):
            detections = small_detector.predict(index.path(i), score_threshold=0)[0]
            results += detections.to_coco(image_id, index.category_ids)
        wanted = evaluate(results, index.annotation_file, metrics="pycocotools")
        assert (row["AP"], row["AP50"]) == (wanted["AP"], wanted["AP50"])
        assert row["ms"] > found["ms_shared"] > 0
    assert found["budgets"][0]["AP"] < found["budgets"][-1]["AP"] < 1


def test_a_limit_takes_the_first_images(small_detector: Detector, index: AnnotationIndex):
    found = two_stages(small_detector, index, limit=2)
    rows = slice(0, index.offsets[2])
    assert found["images"] == 2
    assert found["recall"]["all"]["truths"] == int((~index.crowd[rows]).sum())


def test_images_without_objects_have_no_figures(small_detector: Detector, index: AnnotationIndex):
    content = json.loads(index.annotation_file.read_text())
    index.annotation_file.write_text(json.dumps(content | {"annotations": []}))
    found = two_stages(small_detector, load_annotations(index.annotation_file, index.image_dir), limit=2)
    assert found["recall"]["all"] == {"truths": 0, "recall50": None, "recall": None}
    assert found["budgets"][-1]["AP"] is None


@pytest.mark.parametrize(("change", "message"), [({"limit": 0}, "limit=0"), ({"budgets": (0, 10)}, "budgets=")])
def test_numbers_that_make_no_sense_are_named(
    small_detector: Detector, index: AnnotationIndex, change: dict[str, Any], message: str
):
    with pytest.raises(InputError, match=message):
        two_stages(small_detector, index, **change)


def test_other_classes_are_named(small_detector: Detector, index: AnnotationIndex):
    small_detector.class_names = ("cat", "dog", "cow")
    with pytest.raises(InputError, match="cow"):
        two_stages(small_detector, index)
