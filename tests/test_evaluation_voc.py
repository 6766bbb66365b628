"""Pascal VOC's average precision against the development kit's rules as plain loops, and against pencil and paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scored_rows import evaluate

from detector.errors import InputError
from detector.evaluation import format_table


def inclusive(corners: list[int]) -> list[float]:
    """COCO's box of VOC's xmin, ymin, xmax, ymax, which count pixels from 1 and name the last one inside."""
    xmin, ymin, xmax, ymax = corners
    return [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]


# The oracle works on VOC's own corners, with its + 1.


def overlap(box: list[int], other: list[int]) -> float:
    width = min(box[2], other[2]) - max(box[0], other[0]) + 1
    height = min(box[3], other[3]) - max(box[1], other[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, other)]
    return width * height / (sum(areas) - width * height)


def curve(found: list[dict], objects: list[dict]) -> tuple[int, list[float], list[float]]:
    """The number of objects, and recall and precision after each detection of one class, best score first."""
    count = sum(not o["difficult"] for o in objects)
    taken: set[int] = set()
    right = wrong = 0
    recalls, precisions = [], []
    for detection in sorted(found, key=lambda d: -d["score"]):
        best, best_overlap = None, 0.0
        for place, o in enumerate(objects):
            if o["image_id"] == detection["image_id"]:
                value = overlap(detection["corners"], o["corners"])
                if value > best_overlap:
                    best, best_overlap = place, value
        if best is not None and best_overlap >= 0.5:
            if not objects[best]["difficult"]:
                right, wrong = (right, wrong + 1) if best in taken else (right + 1, wrong)
                taken.add(best)
        else:
            wrong += 1
        recalls.append(right / count if count else 0.0)
        precisions.append(right / (right + wrong) if right + wrong else 0.0)
    return count, recalls, precisions


def eleven_points(recalls: list[float], precisions: list[float]) -> float:
    total = 0.0
    for point in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        total += max((p for r, p in zip(recalls, precisions, strict=True) if r >= point), default=0.0)
    return total / 11


def all_points(recalls: list[float], precisions: list[float]) -> float:
    recalls, precisions = [0.0, *recalls, 1.0], [0.0, *precisions, 0.0]
    for place in reversed(range(len(precisions) - 1)):
        precisions[place] = max(precisions[place], precisions[place + 1])
    steps = range(1, len(recalls))
    return sum((recalls[i] - recalls[i - 1]) * precisions[i] for i in steps if recalls[i] != recalls[i - 1])


def oracle(found: list[dict], objects: list[dict], classes: list[int]) -> dict[str, Any]:
    per_class: dict[str, float | None] = {}
    per_class_07: dict[str, float | None] = {}
    for label in classes:
        count, recalls, precisions = curve(
            [d for d in found if d["category_id"] == label], [o for o in objects if o["category_id"] == label]
        )
        per_class[f"class {label}"] = all_points(recalls, precisions) if count else None
        per_class_07[f"class {label}"] = eleven_points(recalls, precisions) if count else None
    means = [
        float(np.mean(values)) if (values := [v for v in table.values() if v is not None]) else None
        for table in (per_class, per_class_07)
    ]
    return {"mAP": means[0], "mAP07": means[1], "per_class": per_class, "per_class_07": per_class_07}


def random_case(seed: int) -> tuple[list[dict], list[dict], list[int], list[int]]:
    """Detections and objects with `corners`, and the ids of classes and images."""
    rng = np.random.default_rng(seed)
    images, classes = list(range(1, 1 + rng.integers(1, 6))), sorted(rng.choice(30, rng.integers(1, 4), replace=False))
    found, objects = [], []

    def corners() -> list[int]:
        x, y = rng.integers(1, 60, 2)
        return [int(x), int(y), int(x + rng.integers(0, 40)), int(y + rng.integers(0, 40))]

    for image in images:
        for _ in range(rng.integers(0, 7)):
            box, label = corners(), int(rng.choice(classes))
            place = {"image_id": image, "category_id": label}
            objects.append(place | {"corners": box, "difficult": bool(rng.random() < 0.25)})
            for _ in range(rng.integers(0, 4)):
                moved = [int(value + rng.integers(-3, 4)) for value in box]
                moved[2:] = [max(moved[2], moved[0]), max(moved[3], moved[1])]
                found.append(place | {"corners": moved, "score": float(rng.integers(0, 9) / 8)})
        for _ in range(rng.integers(0, 4)):
            label = int(rng.choice(classes))
            found.append({"image_id": image, "category_id": label, "corners": corners(), "score": float(rng.random())})
    rng.shuffle(found)
    return ([] if seed % 20 == 9 else found), objects, [int(label) for label in classes], images


def as_coco(
    found: list[dict], objects: list[dict], classes: list[int], images: list[int], mark: str = "difficult"
) -> tuple[list[dict], dict]:
    results = [
        {key: d[key] for key in ("image_id", "category_id", "score")} | {"bbox": inclusive(d["corners"])} for d in found
    ]
    annotations = [
        {key: o[key] for key in ("image_id", "category_id")}
        | {"id": place, "bbox": inclusive(o["corners"]), mark: int(o["difficult"])}
        for place, o in enumerate(objects)
    ]
    categories = [{"id": label, "name": f"class {label}"} for label in classes]
    return results, {"images": [{"id": i} for i in images], "annotations": annotations, "categories": categories}


def test_three_hundred_random_cases_equal_the_development_kit() -> None:
    for seed in range(300):
        case = random_case(seed)
        mark = ("difficult", "ignore", "iscrowd")[seed % 3]
        ours, expected = evaluate(*as_coco(*case, mark=mark), metrics="voc"), oracle(*case[:3])
        assert list(ours) == list(expected)
        flat = [
            table | table["per_class"] | {f"{name}, 07": value for name, value in table["per_class_07"].items()}
            for table in (ours, expected)
        ]
        for name, value in flat[1].items():
            if not isinstance(value, dict):
                same = flat[0][name] is None if value is None else flat[0][name] == pytest.approx(value, abs=1e-12)
                assert same, f"seed {seed}: {name} is {flat[0][name]}, not {value}"


def test_random_cases_cover_what_they_promise() -> None:
    cases = [random_case(seed) for seed in range(300)]
    figures = [oracle(*case[:3]) for case in cases]
    assert sum(o["difficult"] for case in cases for o in case[1]) > 300
    assert sum(value is None for f in figures for value in f["per_class"].values()) > 10
    assert sum(not case[0] for case in cases) >= 10
    assert 0.3 < np.mean([f["mAP"] for f in figures if f["mAP"] is not None]) < 0.9


def cat(x: float, **more: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": 1, "bbox": [x, 0, 10, 10]} | more


def test_by_hand() -> None:
    """Three cats and a difficult one, five detections.

    right (recall 1/3, precision 1), wrong (a second time the same cat: 1/3, 1/2), difficult (not counted), wrong
    (nothing there: 1/3, 1/3), right (2/3, 1/2). Raised precisions: 1 up to recall 1/3, 1/2 up to 2/3, then 0.
    Area: 1/3 * 1 + 1/3 * 1/2 = 1/2. Eleven points: 1 at 0, 0.1, 0.2, 0.3; 1/2 at 0.4, 0.5, 0.6; 0 above: 5.5 / 11.
    """
    truth = {
        "images": [{"id": 1}],
        "annotations": [cat(0), cat(100), cat(200), cat(300, difficult=1)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    places = (0, 1, 300, 400, 102)
    results = [cat(x, score=1 - rank / 10) for rank, x in enumerate(places)]
    figures = evaluate(results, truth, metrics="voc")
    assert figures["mAP"] == pytest.approx(0.5)
    assert figures["mAP07"] == pytest.approx(0.5)
    assert figures["per_class"] == {"cat": pytest.approx(0.5), "dog": None}
    # Without the last one: 1/3 * 1, and 4 of 11 points.
    figures = evaluate(results[:4], truth, metrics="voc")
    assert (figures["mAP"], figures["mAP07"]) == (pytest.approx(1 / 3), pytest.approx(4 / 11))


def test_half_an_overlap_is_enough_and_the_best_object_is_the_only_one() -> None:
    truth = {"images": [{"id": 1}], "annotations": [cat(0)], "categories": [{"id": 1, "name": "cat"}]}
    half = cat(0, bbox=[0, 0, 20, 10], score=0.5)
    assert evaluate([half], truth, metrics="voc")["mAP"] == 1.0
    assert evaluate([half | {"bbox": [0, 0, 20.001, 10]}], truth, metrics="voc")["mAP"] == 0.0
    # Two cats that overlap: both detections lie on the first; COCO gives the second detection the second cat.
    truth["annotations"].append(cat(3))
    results = [cat(0, score=0.9), cat(1, score=0.8)]
    assert evaluate(results, truth, metrics="voc")["mAP"] == 0.5
    assert evaluate(results, truth)["AP50"] == pytest.approx(1.0)


def test_three_of_ten_objects_reach_a_recall_of_three_tenths() -> None:
    truth = {
        "images": [{"id": 1}],
        "annotations": [cat(100 * place) for place in range(10)],
        "categories": [{"id": 1, "name": "cat"}],
    }
    results = [cat(100 * place, score=0.9) for place in range(3)]
    assert evaluate(results, truth, metrics="voc")["mAP07"] == pytest.approx(4 / 11)


def test_table_shows_both_rules() -> None:
    figures = evaluate(*as_coco(*random_case(0)), metrics="voc")
    text = format_table(figures, "voc")
    for key in ("mAP", "mAP07"):
        assert f"| {key} " in text
        assert f"{figures[key]:.3f}" in text
    for head, key in (("AP", "per_class"), ("AP07", "per_class_07")):
        table = next(part for part in text.split("\n\n") if f" {head} |" in part.splitlines()[0])
        for name, value in figures[key].items():
            row = next(line for line in table.splitlines() if f"| {name} " in line)
            assert row.split("|")[2].strip() == ("-" if value is None else f"{value:.3f}")


def test_what_cannot_be_had_is_said() -> None:
    case = as_coco(*random_case(0))
    with pytest.raises(InputError, match="metrics=map: expected one of coco, pycocotools, lvis, voc"):
        evaluate(*case, metrics="map")
