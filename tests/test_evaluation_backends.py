"""The fast package against pycocotools on many small cases and a large one; LVIS's protocol against a plain loop."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scored_rows import evaluate, index_of

from detector.data.results import read_results
from detector.errors import InputError
from detector.evaluation import LVIS_METRICS, METRICS
from detector.evaluation.backends import hotcoco_evaluation, pycocotools_evaluation, score
from detector.evaluation.records import by_id
from detector.files import write_json

CASES = 1000
EXACT = 1e-9


# Detections and objects at random.


def near(rng: np.random.Generator, box: list[float], spread: float = 0.08) -> list[float]:
    x, y, width, height = box
    dx, dy, dw, dh = rng.normal(0, spread, 4)
    return [x + dx * width, y + dy * height, width * abs(1 + dw), height * abs(1 + dh)]


def random_box(rng: np.random.Generator) -> list[float]:
    """Often exactly 32 x 32 or 96 x 96, or with that area; now and then without a width."""
    size: tuple[float, float] = ((32, 32), (96, 96), (16, 64), (64, 144), (0, 20))[rng.integers(5)]
    if rng.random() < 0.6:
        width, height = np.exp(rng.uniform(1, 5, 2)).round(1)
        size = (float(width), float(height))
    return [float(rng.integers(0, 150)), float(rng.integers(0, 150)), *map(float, size)]


def small_case(seed: int) -> tuple[list[dict], dict, list[int] | None]:
    """Results, ground truth, and the images to score (None: all)."""
    rng = np.random.default_rng(seed)
    image_ids = rng.choice(100_000, rng.integers(1, 5), replace=False).tolist()
    category_ids = rng.choice(91, 1 + rng.binomial(2, 0.3), replace=False).tolist()
    annotations: list[dict] = []
    results: list[dict] = []

    def detect(image_id: int, category_id: int, box: list[float]) -> None:
        score = float(rng.integers(0, 6) / 5) if seed % 2 else float(rng.random())
        results.append({"image_id": image_id, "category_id": category_id, "bbox": box, "score": score})

    for image_id in image_ids:
        for _ in range(rng.integers(0, 6)):
            box, category_id = random_box(rng), int(rng.choice(category_ids[: 1 + seed % 3]))
            area = float(rng.choice([box[2] * box[3], 32.0**2, 96.0**2, 1e11, 0.6 * box[2] * box[3]]))
            crowd = int(rng.random() < 0.15)
            annotations.append(
                {"image_id": image_id, "category_id": category_id, "bbox": box, "area": area, "iscrowd": crowd}
            )
            for _ in range(rng.integers(0, 4)):
                detect(image_id, category_id, box if rng.random() < 0.3 else near(rng, box))
        for _ in range(120 if seed % 20 == 4 else rng.integers(0, 4)):
            detect(image_id, int(rng.choice(category_ids)), random_box(rng))
    rng.shuffle(results)
    for number, annotation in enumerate(annotations):
        annotation["id"] = number + 1
    categories = [{"id": category_id, "name": f"class {category_id}"} for category_id in category_ids]
    truth = {"images": [{"id": i} for i in image_ids], "annotations": annotations, "categories": categories}
    only = rng.choice(image_ids, rng.integers(1, 1 + len(image_ids)), replace=False).tolist() if seed % 4 == 3 else None
    return ([] if seed % 10 == 7 else results), truth, only


def large_case() -> tuple[list[dict], dict]:
    """A fifth of COCO val2017, a hundred detections an image: half of them on objects, scores with ties."""
    rng = np.random.default_rng(0)
    images, classes, objects, detections = 1000, 80, 7_200, 100_000
    image_ids = np.sort(rng.choice(600_000, images, replace=False))
    category_ids = np.sort(rng.choice(np.arange(1, 91), classes, replace=False))
    often = 1 / np.arange(1, classes + 1) ** 0.8
    often /= often.sum()
    of_image, of_class = rng.integers(0, images, objects), rng.choice(classes, objects, p=often)
    boxes = np.hstack((rng.uniform(0, 400, (objects, 2)), np.exp(rng.uniform(1.5, 5.8, (objects, 2))))).round(2)
    areas, crowd = boxes[:, 2:].prod(axis=1) * rng.uniform(0.4, 1, objects), rng.random(objects) < 0.012
    source = rng.integers(0, objects, detections)
    noise = rng.normal(0, 1, (detections, 4)) * rng.choice([0.05, 0.3], (detections, 1))
    found = boxes[source] + noise * boxes[source][:, [2, 3, 2, 3]]
    found[:, 2:] = np.abs(found[:, 2:]) + 1
    astray = rng.random(detections) < 0.5
    at_image = np.where(astray, rng.integers(0, images, detections), of_image[source])
    at_class = np.where(astray, rng.choice(classes, detections, p=often), of_class[source])
    scores = (rng.random(detections) ** 3).round(3)

    def rows(at: np.ndarray, label: np.ndarray, box: np.ndarray, **more: np.ndarray) -> list[dict]:
        names = ("image_id", "category_id", "bbox", *more)
        columns = (image_ids[at], category_ids[label], box, *more.values())
        return [dict(zip(names, row, strict=True)) for row in zip(*(c.tolist() for c in columns), strict=True)]

    truth = {
        "images": [{"id": i} for i in image_ids.tolist()],
        "annotations": rows(
            of_image, of_class, boxes, area=areas, iscrowd=crowd.astype(int), id=np.arange(1, objects + 1)
        ),
        "categories": [{"id": i, "name": f"class {i}"} for i in category_ids.tolist()],
    }
    return rows(at_image, at_class, found, score=scores), truth


# COCO: pycocotools by its own road, without a line of ours.


def pycocotools_scores(results: list[dict], truth: dict, only: list[int] | None = None) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(None):
        objects = COCO()
        # Copies, because pycocotools writes into them.
        objects.dataset = {"info": {}, **truth, "annotations": [dict(a) for a in truth["annotations"]]}
        objects.createIndex()
        if results:
            found = objects.loadRes([dict(r) for r in results])
        else:
            found = COCO()
            found.dataset = {"images": truth["images"], "categories": truth["categories"], "annotations": []}
            found.createIndex()
        scores = COCOeval(objects, found, "bbox")
        if only is not None:
            scores.params.imgIds = only
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return scores


def difference(results: list[dict], truth: dict, only: list[int] | None, scores: Any, metrics: str = "coco") -> float:
    """The largest difference in any metric, class, or point of a curve; infinite where one exists only in one."""
    index = index_of(truth, only)
    arrays = by_id(read_results(results, index), index)
    found = evaluate(results, truth, image_ids=only, metrics=metrics)
    table = score((pycocotools_evaluation if metrics == "pycocotools" else hotcoco_evaluation)(*arrays)).precision
    expected = scores.eval["precision"]
    names = {c["id"]: c["name"] for c in truth["categories"]}
    pairs: list[tuple[Any, Any]] = [(found[name], scores.stats[i]) for i, name in enumerate(METRICS)]
    for place, category_id in enumerate(sorted(names)):
        own = expected[:, :, place, 0, 2]
        pairs.append((found["per_class"][names[category_id]], np.mean(own[own > -1]) if (own > -1).any() else -1))
    gaps = [abs(theirs - (-1 if ours is None else ours)) for ours, theirs in pairs]
    assert ((table < 0) == (expected < 0)).all()
    return float(max(*gaps, np.abs(table - expected).max()))


@pytest.mark.parametrize(
    "seeds", [range(CASES // 5), pytest.param(range(CASES // 5, CASES), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_a_thousand_small_cases_equal_pycocotools(seeds: range) -> None:
    worst = 0.0
    for seed in seeds:
        results, truth, only = small_case(seed)
        gap = difference(results, truth, only, pycocotools_scores(results, truth, only))
        assert gap <= EXACT, f"seed {seed}: {gap}"
        worst = max(worst, gap)
    print(f"\nlargest difference in {len(seeds)} small cases: {worst:g}")


@pytest.mark.parametrize("seed", range(20))
def test_pycocotools_by_our_road_is_pycocotools(seed: int) -> None:
    results, truth, only = small_case(seed)
    scores = pycocotools_scores(results, truth, only)
    assert difference(results, truth, only, scores, metrics="pycocotools") <= EXACT


def test_small_cases_cover_what_they_promise() -> None:
    cases = [small_case(seed) for seed in range(CASES)]
    objects = [a for _, truth, _ in cases for a in truth["annotations"]]
    found = [r for results, _, _ in cases for r in results]
    assert sum(a["iscrowd"] for a in objects) > 500
    assert all(sum(a["area"] == side**2 for a in objects) > 500 for side in (32, 96))
    assert all(sum(r["bbox"][2] * r["bbox"][3] == side**2 for r in found) > 500 for side in (32, 96))
    assert sum(a["area"] > 1e10 for a in objects) > 500
    assert sum(not results for results, _, _ in cases) >= 100
    assert sum(len(results) > 100 * len(truth["images"]) for results, truth, _ in cases) >= 50
    for part in ("image", "category"):
        with_none = [
            {i["id"] for i in truth[f"{part}s" if part == "image" else "categories"]}
            - {a[f"{part}_id"] for a in truth["annotations"]}
            for _, truth, _ in cases
        ]
        assert sum(map(bool, with_none)) > 100
    assert sum(len({r["score"] for r in results}) < len(results) for results, _, _ in cases) > 300
    assert any(i["id"] == 0 for _, truth, _ in cases for i in truth["categories"])


def test_golden_example_equals_pycocotools_to_the_last_digit(shared: Path) -> None:
    folder = shared / "data" / "coco-golden"
    truth = json.loads((folder / "instances_val2014_100_bbox.json").read_text())
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    gap = difference(results, truth, None, pycocotools_scores(results, truth))
    print(f"\nlargest difference on the golden example: {gap:g}")
    assert gap <= EXACT


@pytest.mark.slow
def test_a_hundred_thousand_detections_are_scored_fifty_times_faster(tmp_path: Path) -> None:
    results, truth = large_case()
    write_json(tmp_path / "truth.json", truth)
    (tmp_path / "results.json").write_text(json.dumps(results))
    times = [timed(lambda: evaluate(results, truth)) for _ in range(3)]
    from_files = timed(lambda: evaluate(tmp_path / "results.json", tmp_path / "truth.json"))
    inside = packages_time(results, truth)
    start = time.perf_counter()
    scores = pycocotools_scores(results, truth)
    theirs = time.perf_counter() - start
    gap = difference(results, truth, None, scores)
    print(
        f"\npycocotools {theirs:.1f} s; ours {min(times):.2f} s ({theirs / min(times):.0f} times), of that the package "
        f"{inside:.2f} s ({theirs / inside:.0f} times); from JSON files {from_files:.1f} s; "
        f"peak memory of that {peak_memory(tmp_path)}; largest difference {gap:g}"
    )
    assert gap <= EXACT
    assert theirs / inside >= 50
    assert theirs / min(times) >= 25  # with numbering and checking all rows


def timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def packages_time(results: list[dict], truth: dict) -> float:
    """Of evaluate, accumulate and summarise, from arrays."""
    index = index_of(truth)
    arrays = by_id(read_results(results, index), index)
    return min(timed(lambda: score(hotcoco_evaluation(*arrays))) for _ in range(3))


def peak_memory(folder: Path) -> str:
    """At most, while the two files are read and scored, in a process of its own."""
    code = (
        "import sys; from scored_rows import evaluate; evaluate(*sys.argv[1:]);"
        "print(*[line for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    )
    command = [sys.executable, "-c", code, str(folder / "results.json"), str(folder / "truth.json")]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()


# LVIS: the protocol of Gupta et al. 2019 and lvis-api, one plain loop for each sentence.

AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
THRESHOLDS = np.linspace(0.5, 0.95, 10)


def federated_case(seed: int) -> tuple[list[dict], dict]:
    rng = np.random.default_rng(seed)
    category_ids = rng.choice(1000, rng.integers(1, 6), replace=False).tolist()
    images: list[dict] = []
    annotations: list[dict] = []
    results: list[dict] = []

    def detect(image_id: int, category_id: int, box: list[float]) -> None:
        score = float(rng.integers(0, 12) / 10) if seed % 2 else float(rng.random())
        results.append({"image_id": image_id, "category_id": category_id, "bbox": box, "score": score})

    for image_id in rng.choice(1000, rng.integers(1, 5), replace=False).tolist():
        order = rng.permutation(category_ids).tolist()
        present = order[: rng.integers(0, len(order) + 1)]
        lacking = order[len(present) :][: rng.integers(0, len(order) + 1)]
        loose = [c for c in order if rng.random() < (0.4 if c in present else 0.1)]
        images.append({"id": image_id, "neg_category_ids": lacking, "not_exhaustive_category_ids": loose})
        for category_id in present:
            for _ in range(rng.integers(1, 4)):
                box = random_box(rng)
                place = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id}
                annotations.append(place | {"bbox": box, "area": box[2] * box[3] * 0.8})
                for _ in range(rng.integers(0, 4)):
                    detect(image_id, category_id, near(rng, box))
        for _ in range(330 if seed % 10 == 0 else rng.integers(0, 6)):
            detect(image_id, int(rng.choice(category_ids)), random_box(rng))
    rng.shuffle(results)
    categories = [{"id": c, "name": f"class {c}", "frequency": "rcf"[rng.integers(3)]} for c in category_ids]
    if seed % 5 == 3:
        for category in categories:
            del category["frequency"]
    return results, {"images": images, "annotations": annotations, "categories": categories}


def overlap(box: list[float], other: list[float]) -> float:
    width = min(box[0] + box[2], other[0] + other[2]) - max(box[0], other[0])
    height = min(box[1] + box[3], other[1] + other[3]) - max(box[1], other[1])
    inside = max(width, 0) * max(height, 0)
    union = box[2] * box[3] + other[2] * other[3] - inside
    return inside / union if union > 0 else 0.0


def judge(found: list[dict], objects: list[dict], threshold: float, area: str, loose: bool) -> list[str]:
    """What becomes of each detection of a class in an image ("hit", "miss", "ignored"), best score first."""
    low, high = AREAS[area]
    counted = [low <= o["area"] <= high for o in objects]
    taken: set[int] = set()
    outcome = []
    for detection in found:
        free = [i for i in range(len(objects)) if i not in taken]
        overlaps = {i: overlap(detection["bbox"], objects[i]["bbox"]) for i in free}
        enough = [i for i in free if overlaps[i] >= threshold]
        # An object that counts goes first; among equals the larger overlap, then the later one.
        enough.sort(key=lambda i: (counted[i], overlaps[i], i))
        if enough:
            taken.add(enough[-1])
            outcome.append("hit" if counted[enough[-1]] else "ignored")
        else:
            size = detection["bbox"][2] * detection["bbox"][3]
            outcome.append("ignored" if loose or not low <= size <= high else "miss")
    return outcome


def lvis_class(results: list[dict], truth: dict, category: int, threshold: float, area: str) -> list[float] | None:
    """AP and recall of one class."""
    pooled: list[tuple[float, str]] = []
    count, (low, high) = 0, AREAS[area]
    for image in sorted(truth["images"], key=lambda i: i["id"]):
        best = sorted((r for r in results if r["image_id"] == image["id"]), key=lambda r: -r["score"])[:300]
        found = [r for r in best if r["category_id"] == category]
        objects = [a for a in truth["annotations"] if a["image_id"] == image["id"] and a["category_id"] == category]
        if not objects and category not in image["neg_category_ids"]:
            continue
        count += sum(low <= o["area"] <= high for o in objects)
        loose = category in image["not_exhaustive_category_ids"]
        pooled += zip((r["score"] for r in found), judge(found, objects, threshold, area, loose), strict=True)
    if not count:
        return None
    order = [what for _, what in sorted(pooled, key=lambda pair: -pair[0]) if what != "ignored"]
    hits = [order[: rank + 1].count("hit") for rank in range(len(order))]
    curve = [(hit / count, hit / (rank + 1)) for rank, hit in enumerate(hits)]
    points = [max((p for r, p in curve if r >= wanted), default=0.0) for wanted in np.linspace(0, 1, 101)]
    return [float(np.mean(points)), hits[-1] / count if hits else 0.0]


def lvis_oracle(results: list[dict], truth: dict) -> dict[str, float | None]:
    cells = {
        (c["id"], threshold, area): lvis_class(results, truth, c["id"], threshold, area)
        for c in truth["categories"]
        for threshold in THRESHOLDS
        for area in AREAS
    }

    def mean(which: int, thresholds: Any = THRESHOLDS, area: str = "", only: Any = None) -> float | None:
        chosen = [c["id"] for c in truth["categories"] if only is None or only(c)]
        values = [cells[c, t, area][which] for c in chosen for t in thresholds if cells[c, t, area] is not None]
        return float(np.mean(values)) if values else None

    figures = {"AP": mean(0), "AP50": mean(0, THRESHOLDS[:1]), "AP75": mean(0, THRESHOLDS[5:6]), "AR300": mean(1)}
    figures |= {f"AP{area}": mean(0, area=area) for area in "sml"} | {f"AR{area}": mean(1, area=area) for area in "sml"}
    figures |= {f"AP{group}": mean(0, only=lambda c, g=group: c.get("frequency") == g) for group in "rcf"}
    return figures | {c["name"]: mean(0, only=lambda d, i=c["id"]: d["id"] == i) for c in truth["categories"]}


@pytest.mark.parametrize("seed", range(40))
def test_lvis_equals_the_definition(seed: int) -> None:
    results, truth = federated_case(seed)
    figures = evaluate(results, truth, metrics="lvis")
    assert list(figures) == [*LVIS_METRICS, "per_class"]
    ours = {name: figures[name] for name in LVIS_METRICS} | figures["per_class"]
    expected = lvis_oracle(results, truth)
    assert ours.keys() == expected.keys()
    assert {name for name in ours if ours[name] is None} == {name for name in ours if expected[name] is None}
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, abs=EXACT), name


def test_lvis_by_hand() -> None:
    """One hit; what is wrong with the others is not known for two of them, so half the detections that count are right.

    Image 1 shows a cat and certainly no dog; of cats, not every one is annotated. Nobody looked for birds.
    """
    truth = {
        "images": [{"id": 1, "neg_category_ids": [20], "not_exhaustive_category_ids": [10]}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 10, "bbox": [0, 0, 50, 50], "area": 2500}],
        "categories": [{"id": 10, "name": "cat"}, {"id": 20, "name": "dog"}, {"id": 30, "name": "bird"}],
    }

    def found(category_id: int, x: float, score: float) -> dict:
        return {"image_id": 1, "category_id": category_id, "bbox": [x, 0, 50, 50], "score": score}

    results = [found(10, 200, 0.9), found(30, 0, 0.8), found(10, 0, 0.7), found(20, 0, 0.6)]
    figures = evaluate(results, truth, metrics="lvis")
    assert figures["AP"] == pytest.approx(1.0)
    assert figures["AR300"] == 1.0
    assert figures["APr"] is figures["APf"] is None
    truth["images"][0]["not_exhaustive_category_ids"] = []
    assert evaluate(results, truth, metrics="lvis")["AP"] == pytest.approx(0.5)
    truth["annotations"].append({"id": 2, "image_id": 1, "category_id": 20, "bbox": [200, 0, 50, 50], "area": 2500})
    assert evaluate(results, truth, metrics="lvis")["per_class"] == {"cat": pytest.approx(0.5), "dog": 0, "bird": None}


def test_a_crowd_region_is_ignored_in_lvis_as_in_coco() -> None:
    box, region = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50]}, [100, 0, 90, 90]
    truth = {
        "images": [{"id": 1, "neg_category_ids": [], "not_exhaustive_category_ids": []}],
        "annotations": [box | {"id": 1}, box | {"id": 2, "bbox": region, "iscrowd": 1}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    inside = [box | {"bbox": [x, 10, 20, 20], "score": 0.9} for x in (110, 150)]
    assert evaluate([*inside, box | {"score": 0.5}], truth, metrics="lvis")["AP"] == pytest.approx(1.0)
    truth["annotations"].pop()
    assert evaluate([*inside, box | {"score": 0.5}], truth, metrics="lvis")["AP"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ({"not_exhaustive_category_ids": []}, ["image 5", "neg_category_ids", "metrics=coco"]),
        ({"neg_category_ids": []}, ["image 5", "not_exhaustive_category_ids"]),
        ({"neg_category_ids": [9], "not_exhaustive_category_ids": []}, ["image 5", "neg_category_ids", "9"]),
        ({"neg_category_ids": [[1]], "not_exhaustive_category_ids": []}, ["image 5", "neg_category_ids", "[1]"]),
    ],
)
def test_lvis_needs_to_know_what_was_looked_for(image: dict, words: list[str]) -> None:
    truth = {"images": [{"id": 5} | image], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    with pytest.raises(InputError) as error:
        evaluate([], truth, metrics="lvis")
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("package", ["hotcoco", "pycocotools"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results, truth, _ = small_case(1)
    for module in (package, f"{package}.coco"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"metrics=pycocotools.* {package}, which .*'light-head-detector\[train\]'"):
        evaluate(results, truth, metrics="coco" if package == "hotcoco" else package)
