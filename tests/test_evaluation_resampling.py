"""AP of image multisets against pycocotools on data sets in which the images are there twice."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import pytest
from scored_rows import evaluate, match_detections

from detector.evaluation.records import SIZES
from detector.evaluation.resampling import average_precision, draw_images, leave_one_out

FIGURES = {"AP": "all", "APs": "small", "APm": "medium", "APl": "large"}


def random_case(seed: int, images: int = 12, classes: int = 4) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth with crowds, empty images and all sizes; detections near objects and anywhere, with equal scores.

    Equal scores are on different images only: within an image pycocotools' order of copies is not that of their
    originals.
    """
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        scores = iter(rng.permutation(200) / 200)
        for _ in range(rng.poisson(3)):
            label, (w, h), (x, y) = int(rng.integers(1, classes + 1)), rng.uniform(10, 150, 2), rng.uniform(0, 200, 2)
            entry = {"image_id": image, "category_id": label, "bbox": [x, y, w, h], "area": w * h * 0.8}
            annotations.append(entry | {"id": len(annotations) + 1, "iscrowd": int(rng.random() < 0.1)})
            for _ in range(rng.integers(0, 3)):
                moved = [x + rng.normal(0, 0.1) * w, y + rng.normal(0, 0.1) * h, w * rng.uniform(0.8, 1.2), h]
                results.append({"image_id": image, "category_id": label, "bbox": moved, "score": next(scores)})
        for _ in range(rng.integers(0, 8)):
            box = [*rng.uniform(0, 200, 2), *rng.uniform(5, 150, 2)]
            label = int(rng.integers(1, classes + 1))
            results.append({"image_id": image, "category_id": label, "bbox": box, "score": next(scores)})
    truth = {
        "images": [{"id": image} for image in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": label, "name": f"class {label}"} for label in range(1, classes + 1)],
    }
    return truth, results


def copied(rows: list[dict[str, Any]], times: np.ndarray) -> list[dict[str, Any]]:
    """Image i as times[i - 1] images, with ids that keep the order of the images."""
    return [row | {"image_id": row["image_id"] * 1000 + k} for row in rows for k in range(times[row["image_id"] - 1])]


def pycocotools_scores(truth: dict[str, Any], results: list[dict[str, Any]], times: np.ndarray) -> np.ndarray:
    """pycocotools' precision (T, R, K, A, M) of the images written out as often as `times` says."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = [{"id": image["id"] * 1000 + k} for image in truth["images"] for k in range(times[image["id"] - 1])]

    def index(rows: list[dict[str, Any]]) -> COCO:
        api = COCO()
        api.dataset = {
            "images": images, "categories": truth["categories"],
            "annotations": [{"iscrowd": 0, "area": r["bbox"][2] * r["bbox"][3]} | r | {"id": i}
                            for i, r in enumerate(rows, start=1)],
        }  # fmt: skip
        api.createIndex()
        return api

    with redirect_stdout(io.StringIO()):
        scores = COCOeval(index(copied(truth["annotations"], times)), index(copied(results, times)), "bbox")
        scores.evaluate()
        scores.accumulate()
    precision: np.ndarray = scores.eval["precision"]
    return precision


@pytest.mark.parametrize("seed", range(4))
def test_each_image_once_is_the_score_of_the_data_set(seed: int) -> None:
    truth, results = random_case(seed)
    matches, figures = match_detections(results, truth), evaluate(results, truth)
    once = np.ones((len(truth["images"]), 1), np.int32)
    for name, area in FIGURES.items():
        ours = np.stack([average_precision(m, once) for m in matches.by_class[area]])
        assert np.nanmean(ours) == pytest.approx(figures[name], abs=1e-9)
    by_class = [average_precision(m, once).mean() for m in matches.by_class["all"]]
    assert by_class == pytest.approx(list(figures["per_class"].values()), abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_multiplicities_are_images_written_out_that_often(seed: int) -> None:
    """Every class, threshold and area; with images that are left out, and classes that have no object in the draw."""
    truth, results = random_case(seed)
    matches = match_detections(results, truth)
    weights = draw_images(len(truth["images"]), 3, seed)
    for column in weights.T:
        precision = pycocotools_scores(truth, results, column)
        for place, area in enumerate(SIZES):
            expected = precision[..., place, -1].mean(axis=1).T  # (K, T), -1 where there is no object
            ours = np.stack([average_precision(m, column[:, None])[:, 0] for m in matches.by_class[area]])
            np.testing.assert_allclose(np.nan_to_num(ours, nan=-1.0), expected, atol=1e-9)


def test_draws_do_not_depend_on_their_company() -> None:
    """More columns than are accumulated at once give what each gives alone."""
    truth, results = random_case(0)
    weights = draw_images(len(truth["images"]), 300, 0)
    for m in match_detections(results, truth).by_class["all"]:
        together = average_precision(m, weights)
        alone = np.concatenate([average_precision(m, weights[:, [s]]) for s in (0, 127, 128, 299)], axis=1)
        np.testing.assert_array_equal(together[:, [0, 127, 128, 299]], alone)


def test_only_the_best_hundred_of_an_image_and_class_count() -> None:
    """A class on an image without objects takes another way through the code; the limit holds there too."""
    box = [10.0, 10.0, 40.0, 40.0]
    truth = {
        "images": [{"id": 1}, {"id": 2}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 1600.0}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    results = [{"image_id": 2, "category_id": 1, "bbox": box, "score": 1 - i / 1000} for i in range(150)]
    results.append({"image_id": 1, "category_id": 1, "bbox": box, "score": 0.1})
    precision = average_precision(match_detections(results, truth).by_class["all"][0], np.ones((2, 1), np.int32))
    assert precision[0, 0] == pytest.approx(1 / 101)  # behind 100 false alarms, not 150
    assert evaluate(results, truth)["AP50"] == pytest.approx(1 / 101)


def test_leaving_an_image_out_is_scoring_without_it() -> None:
    truth, results = random_case(2)
    matches = match_detections(results, truth)
    alone = np.stack([leave_one_out(m) for m in matches.by_class["all"]])
    for place in (0, 5, 11):
        times = np.ones(len(truth["images"]), int)
        times[place] = 0
        expected = pycocotools_scores(truth, results, times)[..., 0, -1].mean(axis=(0, 1))
        np.testing.assert_allclose(np.nan_to_num(alone[:, place], nan=-1.0), expected, atol=1e-9)


def test_a_draw_takes_as_many_images_as_there_are() -> None:
    weights = draw_images(50, 400, 1)
    assert weights.shape == (50, 400)
    assert (weights.sum(axis=0) == 50).all()
    # Binomial(50, 1/50): mean 1, variance 0.98; the bounds are five standard errors of these estimates.
    assert weights.mean(axis=1) == pytest.approx(np.ones(50), abs=5 * (0.98 / 400) ** 0.5)
    assert weights.var() == pytest.approx(0.98, abs=0.06)
