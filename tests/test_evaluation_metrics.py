"""COCO figures against the official example, and against a float64 loop written from the definition."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scored_rows import evaluate

from detector.errors import InputError
from detector.evaluation import LVIS_METRICS, METRICS, format_table, save_metrics
from detector.files import replacing, write_json

# The official result text of the COCO API's example.
GOLDEN = {
    "AP": 0.504581,
    "AP50": 0.696973,
    "AP75": 0.572982,
    "APs": 0.585626,
    "APm": 0.519400,
    "APl": 0.501398,
    "AR1": 0.386813,
    "AR10": 0.593680,
    "AR100": 0.595353,
    "ARs": 0.639811,
    "ARm": 0.566421,
    "ARl": 0.564291,
}
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
THRESHOLDS = np.linspace(0.5, 0.95, 10)


def test_golden_example_of_the_coco_api(shared: Path) -> None:
    folder = shared / "data" / "coco-golden"
    truth = folder / "instances_val2014_100_bbox.json"
    metrics = evaluate(folder / "instances_val2014_fakebbox100_results.json", truth)
    assert {name: round(metrics[name], 6) for name in METRICS} == GOLDEN
    present = [value for value in metrics["per_class"].values() if value is not None]
    assert len(metrics["per_class"]) == 80
    assert np.mean(present) == pytest.approx(metrics["AP"], abs=1e-12)


# The oracle: Lin et al. 2014 and cocodataset.org/#detection-eval, one plain loop for each sentence.


def iou(box: list[float], other: list[float], crowd: bool) -> float:
    """Intersection over union of xywh boxes; over the detection's own area when the object is a crowd."""
    width = min(box[0] + box[2], other[0] + other[2]) - max(box[0], other[0])
    height = min(box[1] + box[3], other[1] + other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    inside = width * height
    return inside / (box[2] * box[3] if crowd else box[2] * box[3] + other[2] * other[3] - inside)


def match(found: list[dict], objects: list[dict], threshold: float, area: tuple[float, float]) -> list[str]:
    """What becomes of each detection ("hit", "miss", "ignored") of one class in one image, best score first."""
    ignored = [bool(o["iscrowd"]) or not area[0] <= o["area"] <= area[1] for o in objects]
    order = sorted(range(len(objects)), key=lambda place: ignored[place])
    taken: set[int] = set()
    outcome = []
    for detection in found:
        best, best_iou = None, min(threshold, 1 - 1e-10)
        for place in order:
            crowd = bool(objects[place]["iscrowd"])
            if place in taken and not crowd:
                continue
            if best is not None and not ignored[best] and ignored[place]:
                break
            overlap = iou(detection["bbox"], objects[place]["bbox"], crowd)
            if overlap >= best_iou:
                best, best_iou = place, overlap
        if best is None:
            size = detection["bbox"][2] * detection["bbox"][3]
            outcome.append("miss" if area[0] <= size <= area[1] else "ignored")
        else:
            taken.add(best)
            outcome.append("ignored" if ignored[best] else "hit")
    return outcome


def oracle_class(
    results: list[dict], truth: dict, category: int, threshold: float, area: tuple[float, float], limit: int
) -> tuple[float, float] | None:
    """Average precision over 101 recalls, and recall; None without an object to find."""
    pooled: list[tuple[float, str]] = []
    count = 0
    for image_id in sorted(image["id"] for image in truth["images"]):
        here = {"image_id": image_id, "category_id": category}
        objects = [a for a in truth["annotations"] if here.items() <= a.items()]
        found = sorted((r for r in results if here.items() <= r.items()), key=lambda r: -r["score"])[:limit]
        count += sum(not o["iscrowd"] and area[0] <= o["area"] <= area[1] for o in objects)
        outcome = match(found, objects, threshold, area)
        pooled += [(r["score"], what) for r, what in zip(found, outcome, strict=True)]
    if count == 0:
        return None
    pooled = [pair for pair in sorted(pooled, key=lambda pair: -pair[0]) if pair[1] != "ignored"]
    hits, curve = 0, []
    for rank, (_, what) in enumerate(pooled, start=1):
        hits += what == "hit"
        curve.append((hits / count, hits / rank))
    best_after, precisions = 0.0, []
    for recall, precision in reversed(curve):
        best_after = max(best_after, precision)
        precisions.append((recall, best_after))
    precisions.reverse()
    average = [next((p for r, p in precisions if r >= wanted), 0.0) for wanted in np.linspace(0, 1, 101)]
    return float(np.mean(average)), hits / count


def oracle(results: list[dict], truth: dict) -> dict[str, Any]:
    categories = sorted(truth["categories"], key=lambda category: category["id"])

    def mean(which: int, thresholds: Any, area: str = "", limit: int = 100, only: Any = None) -> float | None:
        cells = [
            oracle_class(results, truth, category["id"], threshold, AREAS[area], limit)
            for category in categories
            if only in (None, category["id"])
            for threshold in thresholds
        ]
        values = [cell[which] for cell in cells if cell is not None]
        return float(np.mean(values)) if values else None

    figures: dict[str, Any] = {"AP": mean(0, THRESHOLDS), "AP50": mean(0, [0.5]), "AP75": mean(0, [THRESHOLDS[5]])}
    figures |= {f"AP{area}": mean(0, THRESHOLDS, area) for area in "sml"}
    figures |= {f"AR{limit}": mean(1, THRESHOLDS, limit=limit) for limit in (1, 10, 100)}
    figures |= {f"AR{area}": mean(1, THRESHOLDS, area) for area in "sml"}
    figures["per_class"] = {c["name"]: mean(0, THRESHOLDS, only=c["id"]) for c in categories}
    return figures


def random_case(seed: int) -> tuple[list[dict], dict]:
    """A small data set with sparse ids, crowds, empty images, tied scores, and now and then a flood or nothing."""
    rng = np.random.default_rng(seed)
    image_ids = rng.choice(1000, rng.integers(1, 6), replace=False).tolist()
    category_ids = rng.choice(90, rng.integers(1, 4), replace=False).tolist()
    annotations: list[dict] = []
    results: list[dict] = []

    def box() -> list[float]:
        return [*rng.uniform(0, 200, 2).round(1).tolist(), *np.exp(rng.uniform(1.5, 5.3, 2)).round(1).tolist()]

    def detect(image_id: int, category_id: int, bbox: list[float]) -> None:
        score = float(rng.integers(0, 12) / 10) if seed % 2 else float(rng.random())
        results.append({"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score})

    for image_id in image_ids:
        for _ in range(rng.integers(0, 7)):
            category_id, bbox = int(rng.choice(category_ids)), box()
            annotations.append(
                {
                    "id": len(annotations),  # from 0, which pycocotools alone would take for "no match"
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": bbox,
                    "area": bbox[2] * bbox[3] * (0.6 if seed % 3 else 1.0),
                    "iscrowd": int(rng.random() < 0.2),
                }
            )
            for _ in range(rng.integers(0, 4)):
                near = (np.array(bbox) + rng.normal(0, 0.06, 4) * np.array(bbox)[[2, 3, 2, 3]]).tolist()
                detect(image_id, int(rng.choice(category_ids)) if rng.random() < 0.2 else category_id, near)
        flood = 130 if seed % 10 == 4 else int(rng.integers(0, 4))
        for _ in range(flood):
            detect(image_id, category_ids[0], box())
    rng.shuffle(results)
    truth = {
        "images": [{"id": image_id} for image_id in image_ids],
        "annotations": annotations,
        "categories": [{"id": category_id, "name": f"class {category_id}"} for category_id in category_ids],
    }
    return ([] if seed % 10 == 7 else results), truth


def flatten(metrics: dict[str, Any]) -> dict[str, float | None]:
    return {name: metrics[name] for name in METRICS} | {f"of {k}": v for k, v in metrics["per_class"].items()}


@pytest.mark.parametrize("seed", range(30))
def test_equals_the_definition(seed: int) -> None:
    results, truth = random_case(seed)
    before = copy.deepcopy((results, truth))
    ours, expected = flatten(evaluate(results, truth)), flatten(oracle(results, truth))
    assert {name for name, value in ours.items() if value is None} == {k for k, v in expected.items() if v is None}
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, abs=1e-12), name
    assert (results, truth) == before


def test_random_cases_cover_what_they_promise() -> None:
    cases = [random_case(seed) for seed in range(30)]
    assert any(not results for results, _ in cases)
    assert any(len(results) > 100 * len(truth["images"]) for results, truth in cases)
    assert any(a["iscrowd"] for _, truth in cases for a in truth["annotations"])
    assert any(
        {image["id"] for image in truth["images"]} - {a["image_id"] for a in truth["annotations"]} for _, truth in cases
    )


def perfect(truth: dict, shift: int = 0) -> list[dict]:
    ids = [category["id"] for category in truth["categories"]]
    return [
        {
            "image_id": a["image_id"],
            "category_id": ids[(ids.index(a["category_id"]) + shift) % len(ids)],
            "bbox": a["bbox"],
            "score": 0.9,
        }
        for a in truth["annotations"]
    ]


@pytest.fixture
def truth() -> dict:
    """One object of each size and class; annotation ids from 0, no `info`, no `area`, no `iscrowd`."""
    boxes = [[10, 10, 20, 20], [40, 40, 60, 60], [5, 5, 150, 150]]
    return {
        "images": [{"id": 7}, {"id": 3}, {"id": 100}],
        "annotations": [
            {"id": place, "image_id": 7, "category_id": category, "bbox": box}
            for place, (category, box) in enumerate(zip((1, 44, 90), boxes, strict=True))
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 44, "name": "dog"}, {"id": 90, "name": "[b]bird"}],
    }


def test_perfect_detections_give_one(truth: dict) -> None:
    metrics = evaluate(perfect(truth), truth)
    assert [metrics[name] for name in METRICS] == pytest.approx([1.0] * 12)
    assert metrics["per_class"] == pytest.approx({"cat": 1.0, "dog": 1.0, "[b]bird": 1.0})


def test_neighbouring_class_gives_zero(truth: dict) -> None:
    metrics = evaluate(perfect(truth, shift=1), truth)
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == 0.0


def test_no_detections_give_zeros(truth: dict) -> None:
    metrics = evaluate([], truth)
    assert [metrics[name] for name in METRICS] == [0.0] * 12
    assert set(metrics["per_class"].values()) == {0.0}


def test_what_does_not_exist_is_none(truth: dict) -> None:
    truth["annotations"] = truth["annotations"][1:2]
    metrics = evaluate([], truth)
    assert metrics["per_class"] == {"cat": None, "dog": 0.0, "[b]bird": None}
    assert [name for name in METRICS if metrics[name] is None] == ["APs", "APl", "ARs", "ARl"]
    truth["annotations"] = []
    assert all(evaluate([], truth)[name] is None for name in METRICS)


def test_results_on_images_that_are_not_scored_do_not_count(truth: dict) -> None:
    noise = [{"image_id": 3, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 1.0}]
    assert evaluate(perfect(truth) + noise, truth)["AP"] < 1
    assert evaluate(perfect(truth) + noise, truth, image_ids=[7, 100])["AP"] == pytest.approx(1.0)
    assert evaluate(perfect(truth), truth, image_ids=[3])["AP"] is None


def test_ids_may_be_strings(truth: dict) -> None:
    results = perfect(truth)
    for item in (*truth["annotations"], *results):
        item["image_id"] = f"image {item['image_id']}"
    truth["images"] = [{"id": f"image {image['id']}"} for image in truth["images"]]
    assert evaluate(results, truth)["AP"] == pytest.approx(1.0)


def test_files_and_silence(truth: dict, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "truth.json", truth)
    write_json(tmp_path / "results.json", perfect(truth))
    from_files = evaluate(str(tmp_path / "results.json"), tmp_path / "truth.json")
    assert from_files == evaluate(perfect(truth), truth)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": 12345}, ["12345", "image id", "3, 7, 100"]),
        ({"image_id": "8"}, ["'8'", "image id"]),
        ({"image_id": [7]}, ["results[1]", "image id", "[7]", "3, 7, 100"]),
        ({"category_id": 2}, ["2", "category id", "1, 44, 90"]),
        ({"bbox": [1, 2, 3]}, ["results[1]", "[1, 2, 3]", "four"]),
        ({"bbox": [1, 2, 3, float("nan")]}, ["results[1]", "nan", "finite"]),
        ({"bbox": [1, 2, -3, 4]}, ["results[1]", "negative"]),
        ({"bbox": None}, ["results[1]", "None", "four"]),
        ({"score": float("inf")}, ["results[1]", "score", "inf"]),
        ({"score": "0.5"}, ["results[1]", "score", "'0.5'"]),
    ],
)
def test_wrong_results_are_named(truth: dict, change: dict, words: list[str]) -> None:
    results = perfect(truth)
    results[1] |= change
    with pytest.raises(InputError) as error:
        evaluate(results, truth)
    assert all(word in str(error.value) for word in words)


def test_many_unknown_ids_are_counted_not_listed(truth: dict) -> None:
    results = [perfect(truth)[0] | {"image_id": 1000 + place} for place in range(400)]
    with pytest.raises(InputError, match=r"400 unknown image id.*1000, 1001.*\(400 in all\)") as error:
        evaluate(results, truth)
    assert len(str(error.value)) < 300


def test_missing_keys_are_named(truth: dict) -> None:
    with pytest.raises(InputError, match=r"results\[0\] lacks bbox, score"):
        evaluate([{"image_id": 7, "category_id": 1}], truth)
    with pytest.raises(InputError, match="expected a list"):
        evaluate({"annotations": []}, truth)  # type: ignore[arg-type]


def test_wrong_ground_truth_is_named(truth: dict, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json: no such annotation file"):
        evaluate([], tmp_path / "absent.json")
    (tmp_path / "text.json").write_text("{no")
    with pytest.raises(InputError, match="not valid JSON"):
        evaluate([], tmp_path / "text.json")
    with pytest.raises(InputError, match="`annotations`"):
        evaluate([], {"images": [], "categories": []})
    with pytest.raises(InputError, match="category id 1 has no `name`"):
        evaluate([], truth | {"categories": [{"id": 1}]})
    with pytest.raises(InputError, match="category name 'cat' appears more than once"):
        evaluate([], truth | {"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]})
    truth["annotations"][1]["bbox"] = [1, 2]
    with pytest.raises(InputError, match=r"`bbox` of annotation id 1 is \[1, 2\]"):
        evaluate([], truth)
    truth["annotations"][1]["bbox"] = [1, 2, float("nan"), 4]
    with pytest.raises(InputError, match=r"`bbox` of annotation id 1 is .*nan.*4 finite numbers"):
        evaluate([], truth)
    truth["annotations"][1] = "a box"
    with pytest.raises(InputError, match="entry 1 of `annotations` is not an object"):
        evaluate([], truth)


def test_table_shows_every_figure(truth: dict) -> None:
    truth["annotations"] = truth["annotations"][1:]
    text = format_table(evaluate(perfect(truth), truth), "shapes: val")
    assert text.splitlines()[0] == "shapes: val"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    pairs = {row[i]: row[i + 1] for row in cells for i in range(0, len(row) - 1, 2)}
    assert pairs["AP"] == pairs["ARl"] == pairs["dog"] == pairs["[b]bird"] == "1.000"
    assert pairs["APs"] == pairs["cat"] == "-"
    assert set(METRICS) <= set(pairs)
    assert text.isascii()


def test_table_shows_the_figures_of_lvis(truth: dict) -> None:
    for image in truth["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    truth["categories"][0]["frequency"] = "r"
    text = format_table(evaluate(perfect(truth), truth, metrics="lvis"), "")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    pairs = {row[i]: row[i + 1] for row in cells for i in range(0, len(row) - 1, 2)}
    assert set(LVIS_METRICS) <= set(pairs)
    assert pairs["APr"] == pairs["AR300"] == pairs["cat"] == "1.000"
    assert pairs["APc"] == pairs["APf"] == "-"


def test_table_of_eighty_classes_fits_a_screen() -> None:
    metrics = dict.fromkeys(METRICS, 0.5) | {"per_class": {f"a rather long class {i}": i / 100 for i in range(80)}}
    lines = format_table(metrics, "").splitlines()
    assert len(lines) < 45
    assert max(map(len, lines)) <= 100
    assert all(f"a rather long class {i} " in "\n".join(lines) for i in range(80))


def test_saved_metrics_come_back(truth: dict, tmp_path: Path) -> None:
    truth["annotations"] = truth["annotations"][1:]
    metrics = evaluate([], truth)
    save_metrics(metrics, tmp_path / "new" / "metrics.json")
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == metrics
    assert metrics["APs"] is None


def interrupted_write(path: Path) -> None:
    with replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"AP": np.float32(0.5), "counts": np.arange(2)})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"AP": float("nan")})
    with pytest.raises(KeyboardInterrupt):
        interrupted_write(path)
    assert json.loads(path.read_text()) == {"AP": 0.5, "counts": [0, 1]}
    assert list(tmp_path.iterdir()) == [path]


def test_import_is_light() -> None:
    heavy = "{'torch', 'pycocotools', 'rich', 'matplotlib', 'torchvision', 'lightning', 'hydra'}"
    code = f"import sys, detector.evaluation; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
