"""Differences of detectors: hand-worked cases, another package's bootstrap, and how often the interval is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from paired_detectors import A, B, Skill, draw_pair
from scored_rows import compare, evaluate, match_detections

from detector.errors import InputError
from detector.evaluation.compare import contributions, difference, format_comparison, mean_precision, verdict
from detector.evaluation.resampling import ClassMatches, MatchedDetections, average_precision, draw_images

BOX = [10.0, 10.0, 40.0, 40.0]


def ground_truth(images: int = 6) -> dict[str, Any]:
    """One cat on each image, one dog on the last."""
    objects = [(image, 1) for image in range(1, images + 1)] + [(images, 2)]
    return {
        "images": [{"id": image, "file_name": f"{image}.jpg"} for image in range(1, images + 1)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": label, "bbox": BOX, "area": 1600.0}
            for i, (image, label) in enumerate(objects, start=1)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def detection(image: int, label: int = 1, score: float = 0.9, shift: float = 0.0) -> dict[str, Any]:
    return {"image_id": image, "category_id": label, "bbox": [BOX[0] + shift, *BOX[1:]], "score": score}


def test_figures_are_those_of_the_evaluation() -> None:
    a = [detection(i, score=0.5 + i / 100, shift=i) for i in range(1, 7)]
    b = [detection(i, score=0.5 + i / 100, shift=i / 2) for i in range(1, 7)] + [detection(3, score=0.99, shift=60)]
    result = compare(a, b, ground_truth(), draws=20)
    for side, results in (("a", a), ("b", b)):
        metrics = evaluate(results, ground_truth())
        assert {name: row[side] for name, row in result["figures"].items()} == pytest.approx(
            {name: metrics[name] for name in result["figures"]}, abs=1e-9
        )
        assert {name: row[side] for name, row in result["per_class"].items()} == pytest.approx(
            metrics["per_class"], abs=1e-9
        )
    row = result["figures"]["AP"]
    assert row["difference"] == pytest.approx(row["b"] - row["a"])
    assert result["figures"]["APl"] == dict.fromkeys(("a", "b", "difference", "low", "high", "b_better"))


def test_what_changed_is_named_and_the_rest_is_not() -> None:
    """b finds the cat of image 2, loses that of image 4, puts a dog where none is on image 5, places better on 6."""
    both = [detection(i) for i in (1, 3)]
    a = [*both, detection(4), detection(5), detection(6, shift=8)]
    b = [*both, detection(2), detection(5), detection(5, label=2, score=0.8), detection(6)]
    result = compare(a, b, ground_truth(), draws=10)
    what = {row["image_id"]: row["what"] for row in result["better"] + result["worse"]}
    assert what[2] == "found: 1 cat"
    assert what[4] == "lost: 1 cat"
    assert what[6] == "boxes tighter"
    assert {row["image_id"] for row in result["better"]} >= {2, 6}
    assert 4 in {row["image_id"] for row in result["worse"]}
    assert 1 not in what
    row = next(row for row in result["better"] if row["image_id"] == 2)
    assert (row["objects"], row["a"]["found"], row["b"]["found"], row["b"]["placed"]) == (1, 0, 1, 1.0)
    # IoU of a shift by 8 of 40 is 32 / 48: it passes 0.50, 0.55, 0.60 and 0.65.
    assert next(r for r in result["better"] if r["image_id"] == 6)["a"]["placed"] == pytest.approx(0.4)


def test_the_change_of_an_image_is_what_the_others_do_not_account_for() -> None:
    a = [detection(i, score=0.5 + i / 100, shift=2 * i) for i in range(1, 6)]
    b = [detection(i, score=0.5 + i / 100, shift=i) for i in range(1, 7)]
    result = compare(a, b, ground_truth(), draws=1)
    rows = result["better"] + result["worse"]
    assert len(rows) == 6

    def part(results: list[dict[str, Any]], image: int) -> float:
        rest = [i for i in range(1, 7) if i != image]
        whole, others = (evaluate(results, ground_truth(), image_ids=i)["per_class"] for i in (None, rest))
        cat = whole["cat"] - 5 / 6 * others["cat"]
        return (cat + whole["dog"] - (0 if image == 6 else whole["dog"])) / 2  # the only dog is on image 6

    for row in rows:
        assert row["change"] == pytest.approx(part(b, row["image_id"]) - part(a, row["image_id"]), abs=1e-9)


def test_the_parts_of_all_images_are_nearly_the_whole() -> None:
    """102% and 109% of AP here; the bound says no more than that no part is counted twice or left out."""
    for count in (200, 1600):
        side, _ = draw_pair(np.random.default_rng(0), count, A, B)
        parts = contributions(MatchedDetections(list(range(count)), [], {"all": side}), -np.inf)
        whole = mean_ap(side, np.ones((count, 1), np.int32))[0]
        print(f"{count} images: the parts are {parts.sum() / whole:.1%} of AP")
        assert parts.sum() == pytest.approx(whole, rel=0.15)


def test_an_image_as_good_as_the_others_has_its_share_and_a_missed_one_nothing() -> None:
    matches = match_detections([detection(i) for i in range(1, 7) if i != 3], ground_truth())
    parts = contributions(matches, 0.3)
    # Five of six cats found without a false alarm: 84 of the 101 recalls up to 5 / 6. Without a found one, 4 of 5: 81.
    assert parts[0] == pytest.approx((84 / 101 - 5 / 6 * 81 / 101) / 2)
    assert parts[2] == pytest.approx((84 / 101 - 5 / 6) / 2)
    assert abs(parts[2]) < 0.001


def test_a_detector_against_itself() -> None:
    results = [detection(i, score=0.5 + i / 100, shift=i) for i in range(1, 7)]
    result = compare(results, results, ground_truth(), draws=50)
    row = result["figures"]["AP"]
    assert (row["difference"], row["low"], row["high"], row["b_better"]) == (0, 0, 0, 0.5)
    assert result["better"] == result["worse"] == []
    assert "do not tell" in verdict(result)


def test_the_table_and_the_verdict() -> None:
    a, b = [detection(1)], [detection(i) for i in range(1, 7)]
    result = compare(a, b, ground_truth(), draws=200)
    text = format_comparison(result, "old", "[b]new[/b]")
    assert "b is better" in verdict(result)
    assert verdict(result) in text
    for part in ("old", "[b]new[/b]", "AP50", "dog", "found: 1 cat"):
        assert part in text
    assert "b is worse" in verdict(compare(b, a, ground_truth(), draws=200))


def test_the_same_seed_gives_the_same_interval_and_another_does_not() -> None:
    a = [detection(i, score=0.5 + i / 100, shift=i) for i in range(1, 7)]
    b = [detection(i, score=0.5 + i / 100, shift=i / 3) for i in range(1, 6)]
    first, again, other = (compare(a, b, ground_truth(), draws=100, seed=s)["figures"]["AP"] for s in (3, 3, 4))
    assert first == again
    assert first["low"] != other["low"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"a": [detection(99)]}, ["results", "99", "same data set"]),
        ({"b": [detection(1, label=7)]}, ["results", "7", "same data set"]),
        ({"draws": 0}, ["draws=0"]),
    ],
)
def test_mistakes(arguments: dict[str, Any], parts: list[str]) -> None:
    given = {"a": [detection(1)], "b": [detection(2)]} | arguments
    with pytest.raises(InputError) as error:
        compare(ground_truth=ground_truth(), **given)
    assert [part for part in parts if part not in str(error.value)] == []


def test_a_bootstrap_of_another_package() -> None:
    """hotcoco.compare, which counts an image once that a draw has taken twice: with such draws the intervals agree.

    With real draws ours is wider, as it must be: about 63% of the images are in a draw, and the variance of a mean over
    these alone is 0.37 / 0.63 of the variance that one data set after another shows.
    """
    hotcoco = pytest.importorskip("hotcoco")
    rng = np.random.default_rng(0)
    truth = ground_truth(80)
    # One class: a class that a draw lacks is not left out of the mean there.
    truth = truth | {"annotations": truth["annotations"][:80], "categories": truth["categories"][:1]}
    a = [detection(i, score=rng.random(), shift=rng.normal(0, 9)) for i in range(1, 81)]
    b = [detection(i, score=rng.random(), shift=rng.normal(0, 6)) for i in range(1, 81)]
    dataset = truth | {"annotations": [row | {"iscrowd": 0} for row in truth["annotations"]]}

    def evaluation(results: list[dict[str, Any]]) -> Any:
        objects = hotcoco.COCO(dataset)
        scores = hotcoco.COCOeval(objects, objects.load_res(results), "bbox")
        scores.evaluate()
        return scores

    theirs = hotcoco.compare(evaluation(a), evaluation(b), n_bootstrap=2000, seed=1)
    taken = np.concatenate((np.ones((80, 1), np.int32), draw_images(80, 2000, 0).clip(max=1)), axis=1)
    precision = [average_precision(match_detections(r, truth).by_class["all"][0], taken) for r in (a, b)]
    real = compare(a, b, truth, draws=2000)["figures"]
    for name, thresholds in (("AP", slice(None)), ("AP50", slice(0, 1)), ("AP75", slice(5, 6))):
        ours, interval = difference(*(p[thresholds].mean(axis=0) for p in precision)), theirs["ci"][name]
        width = interval["upper"] - interval["lower"]
        assert ours["difference"] == pytest.approx(theirs["deltas"][name], abs=1e-9)
        # Two sets of 2,000 draws: each end has a standard error of about 1.5% of the width.
        assert ours["low"] == pytest.approx(interval["lower"], abs=0.08 * width)
        assert ours["high"] == pytest.approx(interval["upper"], abs=0.08 * width)
        assert real[name]["high"] - real[name]["low"] == pytest.approx((0.63 / 0.37) ** 0.5 * width, rel=0.15)


def mean_ap(side: list[ClassMatches], weights: np.ndarray) -> np.ndarray:
    return mean_precision(np.stack([average_precision(m, weights) for m in side]))


@pytest.mark.slow
@pytest.mark.parametrize("b", [B, A], ids=["better", "the same"])
def test_the_interval_holds_the_true_difference_in_95_of_100_data_sets(b: Skill) -> None:
    """500 data sets of 200 images from a world whose true difference is known; 500 draws each.

    The truth is the difference on 400,000 images; of a pair of equal skill it is 0 by symmetry. 93% to 97% is two
    standard errors of 500: what is right in 95% of all worlds passes 19 times of 20. The seeds are fixed.
    """
    truth = 0.0
    if b is not A:
        once = np.ones((400_000, 1), np.int32)
        truth = float(
            np.diff([mean_ap(side, once)[0] for side in draw_pair(np.random.default_rng(10**6), 400_000, A, b)])[0]
        )
        assert truth > 0.05  # not the same once more
    held = 0
    for number in range(500):
        sides = draw_pair(np.random.default_rng([7, number]), 200, A, b)
        weights = np.concatenate((np.ones((200, 1), np.int32), draw_images(200, 500, number)), axis=1)
        row = difference(*(mean_ap(side, weights) for side in sides))
        assert row["low"] is not None
        assert row["high"] is not None
        held += row["low"] <= truth <= row["high"]
    print(f"{held / 500:.1%} of 500 intervals hold the true difference {truth:.4f}")
    assert 0.93 <= held / 500 <= 0.97
