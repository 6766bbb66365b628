"""Pairs of imaginary detectors whose true difference is known: matches are drawn, without images and boxes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from detector.evaluation.resampling import ClassMatches

CLASSES = 3
THRESHOLDS = 10


class Skill(NamedTuple):
    """Of an imaginary detector."""

    found: float  # log-odds that it finds an object of middling difficulty
    placed: float  # mean quality of its boxes: the IoU is 0.4 + 0.6 * quality
    false: float  # false alarms an image and class
    apart: float  # standard deviations between the scores of hits and of false alarms


A = Skill(found=1.0, placed=0.62, false=1.0, apart=1.5)
B = Skill(found=1.3, placed=0.66, false=1.0, apart=1.7)


def draw_pair(rng: np.random.Generator, images: int, a: Skill, b: Skill) -> tuple[list[ClassMatches], ...]:
    """What two detectors find on the same images: a list of CLASSES for each.

    Image and object have a difficulty that both detectors feel, so that their results are correlated, as real ones are;
    objects come in clusters (a third of the images have none of a class), as real ones do.
    """
    hard_image = rng.normal(0, 0.7, images)
    sides: tuple[list[ClassMatches], ...] = ([], [])
    for label in range(CLASSES):
        crowded = rng.gamma(1.5, 1 / 1.5, images)
        objects = rng.poisson((2.0, 1.0, 0.5)[label] * crowded)
        place = np.repeat(np.arange(images), objects)
        hard = hard_image[place] + rng.normal(0, 0.7, len(place))
        for side, skill in zip(sides, (a, b), strict=True):
            side.append(_draw_class(rng, skill, hard_image, objects, place, hard))
    return sides


def _draw_class(
    rng: np.random.Generator,
    skill: Skill,
    hard_image: np.ndarray,
    objects: np.ndarray,
    place: np.ndarray,
    hard: np.ndarray,
) -> ClassMatches:
    seen = rng.random(len(place)) < 1 / (1 + np.exp(hard - skill.found))
    quality = rng.beta(8 * skill.placed, 8 * (1 - skill.placed), seen.sum()) - 0.03 * hard[seen]
    iou = 0.4 + 0.6 * quality
    false = np.repeat(np.arange(len(objects)), rng.poisson(skill.false * np.exp(0.3 * hard_image)))
    image = np.concatenate((place[seen], false))
    score = np.concatenate(
        (skill.apart - 0.3 * hard[seen] + rng.normal(0, 1, seen.sum()), rng.normal(0, 1, len(false)))
    )
    hit = np.zeros((THRESHOLDS, len(image)), bool)
    hit[:, : seen.sum()] = iou >= np.linspace(0.5, 0.95, THRESHOLDS)[:, None]
    order = np.argsort(-score, kind="stable")
    counted = np.ones_like(hit)
    return ClassMatches(image[order], score[order], hit[:, order], counted, objects.astype(np.int64))
