"""Search for a detector under a latency target on this machine: widths, depths, V2 or V2* units, input and head sizes.

python tools/search.py                                the most capable detector that takes as long as the v2_1x one
python tools/search.py target_ms=8 threads=2          ... that takes 8 ms with two threads
python tools/search.py target_ms=3 device=cuda        ... on a GPU
python tools/search.py proxy=naswot                   heads and input stay: this proxy sees the backbone alone
python tools/search.py recipe=finetune trials=2000    with that recipe's heads and input as the hand-made ones
python tools/search.py out=DIR                        again with the same DIR: go on where it stopped
python tools/search.py conf=true                      write the result into conf/ too: recipe=searched_8ms trains it

Sampled detectors are measured first, and a model of latency is fitted to them. NSGA-II then trades predicted latency
against a proxy of capacity that needs no training. The best of the predicted front are measured in turns with hand-made
ones; the most capable of those that keep the target is the result. How far to believe the proxy: docs/search.md.
"""

from __future__ import annotations

import logging
import random
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import yaml
from pydantic import ConfigDict

from detector.data.progress import progress
from detector.data.scenes import CLASS_NAMES
from detector.errors import InputError, require
from detector.evaluation.tables import markdown_table
from detector.files import CONF, check_writable, replacing, write_json
from detector.inference.detector import Detector
from detector.lab.capacity import COUNTED, Proxy, capacity
from detector.lab.controlled import Device
from detector.lab.latency import Call, machine, median_ratio, milliseconds, take_cores, take_turns
from detector.lab.layer_times import held_out_errors, terms
from detector.lab.networks import backbone_options
from detector.lab.roofline import fit_costs
from detector.lab.space import DetectorOptions, Point, changes, choices, detector_options, point_of
from detector.models.fuse import fuse, multiply_pointwise
from detector.options import Count, Flag, Natural, Positive, shown

log = logging.getLogger(__name__)
Predict: TypeAlias = Callable[[DetectorOptions], float]

HAND_MADE = ("v2_0.5x", "v2_1x", "v2_1.5x", "v2star_0.5x", "v2star_1x", "v2star_1.5x")
SAMPLES = 40  # detectors that the model of latency is fitted to, beside the hand-made ones
FINALISTS = 12  # detectors of the predicted front that are measured
MARGIN = 1.05  # the search may go so far above the target, where the prediction may be too high
POPULATION = 50


class SearchOptions(DetectorOptions):
    """What to search for, and where; the network and the input are those of the hand-made detector. What else a recipe
    says is not used here."""

    model_config = ConfigDict(extra="ignore")

    target_ms: Positive | None = None
    """Milliseconds from an image in memory to its boxes, one image at a time; null: as the hand-made detector."""
    device: Device = "cpu"
    """cpu or cuda."""
    threads: Count = 1
    """Of the CPU."""
    trials: Count = 1000
    """Detectors that are looked at, about four a second."""
    proxy: Proxy = "multiply_adds"
    """Of capacity; what it found learnt more (docs/search.md). With naswot heads and input stay as they are."""
    seed: Natural = 0
    """Of all draws."""
    turns: Count = 30
    """Of each detector that is measured, after three that are not counted."""
    out: str = "search"
    """A folder for search.{json,md,png,log} and the result as files of conf/."""
    conf: Flag = False
    """Write these files into conf/ too."""
    recipe_name: str = "demo"
    """What the result's recipe builds on: from recipe=."""
    backbone_name: str = "v2_1x"
    """The hand-made detector's: from backbone=."""
    overrides: tuple[str, ...] = ()
    """The command line."""


@dataclass
class Timed:
    """A detector that was measured.

    Attributes:
        name: "hand-made", a file of conf/backbone/, or the number of a trial.
        point: where it lies in the space, of a trial.
        capacity: by the proxy.
        predicted_ms, ms: latency.
        ratio: of its latency to that of the hand-made detector, the median over the turns.
    """

    name: str
    point: Point | None
    capacity: float
    predicted_ms: float
    ms: float
    ratio: float


def search(options: SearchOptions) -> None:
    """Search, and write what was found into `out`.

    Raises:
        InputError: optuna is not installed, `out` holds another search, or no detector keeps the target.
    """
    require("optuna", package="[search]", what="tools/search.py")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: torch sees no GPU here; device=cpu measures the CPU.")
    out = Path(options.out)
    check_writable(out)
    if options.conf:
        check_writable(CONF / "backbone", "conf")
    take_cores(options.threads)
    study = open_study(options, out)
    if "latency" not in study.user_attrs:
        study.set_user_attr("latency", calibrate(options))
    costs, target = np.array(study.user_attrs["latency"]["costs"]), study.user_attrs["latency"]["target_ms"]

    def predict(one: DetectorOptions) -> float:
        return float(1000 * terms(one) @ costs)

    run_trials(study, options, target, predict)
    measured = measure(options, finalists(study, target), predict)
    limit = options.target_ms or measured[0].ms
    share = limit / measured[0].ms  # turn by turn: the machine may be slower in some
    kept = [one for one in measured if one.name.isdecimal() and one.ratio <= share]
    if not kept:
        raise InputError(f"No detector takes {limit:.3g} ms or less; raise target_ms, or trials.")
    found = max(kept, key=lambda one: one.capacity)
    write(options, study, measured, found, limit)


def open_study(options: SearchOptions, out: Path) -> Any:
    """The study in a folder, new where there is none.

    Raises:
        InputError: it has other options, but for the number of trials and what happens after them.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="search",
        storage=JournalStorage(JournalFileBackend(str(out / "search.log"))),
        load_if_exists=True,
        directions=["minimize", "maximize"],
    )
    settings = options.to_dict()
    for name in ("trials", "turns", "conf", "out", "overrides"):
        del settings[name]
    if (known := study.user_attrs.get("options", settings)) != settings:
        other = [name for name, value in settings.items() if known.get(name) != value]
        raise InputError(f"'{out}' holds a search with other options ({', '.join(other)}); choose another out=.")
    study.set_user_attr("options", settings)
    # What is drawn follows from where it goes on, and is nothing that was drawn before.
    seed = options.seed + len(study.trials)
    study.sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    return study


def run_trials(study: Any, options: SearchOptions, target: float, predict: Predict) -> None:
    """Look at detectors until the study has as many as it should.

    Args:
        study: is added to; begins with the hand-made detectors.
        options: of the search.
        target: in milliseconds.
        predict: milliseconds of a detector.
    """
    import optuna

    names = choices(options, everything=options.proxy in COUNTED)
    distributions = {name: optuna.distributions.CategoricalDistribution(values) for name, values in names.items()}
    if not study.trials:
        for _, one in (hand_made(options, name) for name in HAND_MADE):
            study.enqueue_trial(point_of(one, names))
    done = sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.trials)
    for _ in progress(range(done, options.trials), "search", unit="trial"):
        trial = study.ask(distributions)
        one = detector_options(trial.params, options)
        milliseconds = predict(one)
        trial.set_constraint("latency", milliseconds - MARGIN * target)
        study.tell(trial, (milliseconds, capacity(one, options.proxy)))


def finalists(study: Any, target: float) -> dict[str, Point]:
    """Number and point of FINALISTS of the predicted front: spread from 0.85 of the target on, or the slowest."""
    front = sorted(study.best_trials, key=lambda trial: trial.values[0])
    near = front[-max(FINALISTS, sum(trial.values[0] > 0.85 * target for trial in front)) :]
    chosen = np.linspace(0, len(near) - 1, min(FINALISTS, len(near))).round().astype(int)
    return {str(near[at].number): near[at].params for at in chosen}


def hand_made(base: DetectorOptions, name: str) -> tuple[str, DetectorOptions]:
    """A backbone of conf/backbone/ with the heads and the input of the hand-made detector."""
    return name, base.model_copy(update={"backbone": backbone_options(name)})


def calibrate(options: SearchOptions) -> dict[str, Any]:
    """Measure detectors of the space and fit the model of latency; says how well it predicts those left out."""
    draw = random.Random(options.seed)
    names = choices(options, everything=True)
    points = [{name: draw.choice(values) for name, values in names.items()} for _ in range(SAMPLES)]
    sampled = {str(at): detector_options(point, options) for at, point in enumerate(points)}
    sampled |= dict(hand_made(options, name) for name in HAND_MADE) | {"hand-made": options}
    seconds = time_detectors(options, sampled, "calibration")
    known = [terms(one) for one in progress(sampled.values(), "terms", unit="detector")]
    medians = [milliseconds(one) / 1000 for one in seconds.values()]
    errors = held_out_errors(known, medians)
    log.info("latency of detectors left out: median error %.1f%%", 100 * np.median(np.abs(errors)))
    target = options.target_ms or 1000 * medians[-1]
    return {"costs": fit_costs(known, medians).tolist(), "errors": errors.tolist(), "target_ms": target}


def time_detectors(
    options: SearchOptions, detectors: Mapping[str, DetectorOptions], title: str
) -> dict[str, list[float]]:
    """Seconds from an image in memory to its boxes, in turns; random weights."""
    sides = options.input.short_side, options.input.long_side
    image = np.random.default_rng(options.seed).integers(0, 256, (*sides, 3), np.uint8)
    calls: dict[str, Call] = {}
    for name, one in progress(detectors.items(), f"{title}: build", unit="detector"):
        torch.manual_seed(options.seed)
        detector = Detector(one, CLASS_NAMES, one.input)
        detector.network, detector.fused = fuse(detector.network), True
        multiply_pointwise(detector.network)
        calls[name] = partial(detector.to(options.device).predict, image)
    return take_turns(calls, options.turns, title)


def measure(options: SearchOptions, points: Mapping[str, Point], predict: Predict) -> list[Timed]:
    """Detectors in turns: the hand-made one first, then it with other backbones, then those at points of the space."""
    detectors = {"hand-made": options} | dict(hand_made(options, name) for name in HAND_MADE)
    detectors.pop(options.backbone_name, None)
    detectors |= {name: detector_options(point, options) for name, point in points.items()}
    seconds = time_detectors(options, detectors, "in turns")
    return [
        Timed(
            name,
            points.get(name),
            capacity(one, options.proxy),
            predict(one),
            milliseconds(seconds[name]),
            median_ratio(seconds[name], seconds["hand-made"]),
        )
        for name, one in progress(detectors.items(), "capacity", unit="detector")
    ]


def write(options: SearchOptions, study: Any, measured: Sequence[Timed], found: Timed, limit: float) -> None:
    """search.{json,md,png}, and the result as files of conf/; limit: milliseconds that it keeps."""
    latency, point, out = study.user_attrs["latency"], found.point, Path(options.out)
    assert point is not None
    name = f"searched_{limit:.3g}ms"
    for folder in (out, *([CONF] if options.conf else [])):
        write_conf(name, options, found, folder)
    rows = [
        (one.name, *(f"{value:.4g}" for value in (one.capacity, one.predicted_ms, one.ms, one.ratio)))
        for one in measured
    ]
    heads = ("detector", options.proxy, "predicted, ms", "ms", f"times {options.backbone_name}")
    errors = np.abs(latency["errors"])
    text = "\n\n".join(
        (
            f"# Searched: {name}",
            f"{machine()}, {options.device}; one image of {options.input.short_side} x {options.input.long_side}, from "
            f"memory to boxes, random weights. {len(study.trials)} trials; capacity: {options.proxy}. Target: "
            f"{limit:.2f} ms. Latency of {len(errors)} detectors, each predicted by a fit to others: "
            f"median error {np.median(errors):.1%}, largest {errors.max():.1%}.",
            f"Trial {found.name} is the result:\n\n    {command_line(point, options)}",
            f"With {name}.yaml of backbone/ and recipe/ in conf/, the same is `python tools/train.py recipe={name}`.",
            markdown_table(heads, rows, width=None),
            "![Pareto front](search.png)",
        )
    )
    plot(study, measured, found, options, limit)
    content = {"machine": machine(), "options": options.to_dict(), "latency": latency, "found": asdict(found)}
    front = [{"number": one.number, "values": one.values, "point": one.params} for one in study.best_trials]
    content |= {"front": front, "measured": [asdict(one) for one in measured]}
    write_json(out / "search.json", content)
    with replacing(out / "search.md") as partial_file:
        partial_file.write_text(f"{text}\n", encoding="utf-8")
    log.info("%s\n\n%s", text, out / "search.md")


def write_conf(name: str, options: SearchOptions, found: Timed, folder: Path) -> None:
    """backbone/NAME.yaml, and recipe/NAME.yaml with the heads and the input."""
    assert found.point is not None
    detector = detector_options(found.point, options)
    about = f"# By tools/search.py: {found.ms:.2f} ms, {found.ratio:.2f} times {options.backbone_name}, {machine()}.\n"
    overrides = [options.recipe_name, "_self_", {"override /backbone": name}]
    parts = {name: getattr(detector, name).to_dict() for name in DetectorOptions.model_fields if name != "backbone"}
    recipe = {"defaults": overrides, "backbone": {"weights": None}} | parts
    files = {"backbone": ("backbone", changes(found.point, options)["backbone"]), "recipe": ("_global_", recipe)}
    for group, (package, values) in files.items():
        with replacing(folder / group / f"{name}.yaml") as partial_file:
            body = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120)
            partial_file.write_text(f"# @package {package}\n{about}{body}", encoding="utf-8")


def command_line(point: Point, options: SearchOptions) -> str:
    """What trains the detector at a point, without its files."""
    own = {"backbone", "recipe", *SearchOptions.__annotations__}
    words = dict(word.split("=", 1) for word in options.overrides if re.split(r"[.=]", word)[0] not in own)
    for part, values in changes(point, options).items():
        words |= {f"{part}.{key}": shown(value) for key, value in values.items()}
    start = f"python tools/train.py recipe={options.recipe_name} backbone=v2_1x backbone.weights=null"
    return f"{start} {shlex.join(f'{key}={value}' for key, value in words.items())}"


def plot(study: Any, measured: Sequence[Timed], found: Timed, options: SearchOptions, limit: float) -> None:
    """Capacity against latency: all trials and their front as predicted, what was measured as measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    values = np.array([trial.values for trial in study.trials if trial.values])
    axes.scatter(values[:, 0], values[:, 1], s=6, color="0.8", label="trials, predicted")
    front = np.array(sorted(trial.values for trial in study.best_trials))
    axes.plot(front[:, 0], front[:, 1], color="C0", label="their front, predicted")
    by_hand = [one for one in measured if not one.name.isdecimal()]
    ours = [one for one in measured if one.name.isdecimal()]
    for members, colour, label in ((by_hand, "C1", "hand-made"), (ours, "C0", "of the front")):
        times, predicted, heights = np.array([(one.ms, one.predicted_ms, one.capacity) for one in members]).T
        axes.hlines(heights, times, predicted, color=colour, linewidth=0.8)
        axes.scatter(times, heights, color=colour, label=f"{label}, measured")
    for one in by_hand:
        name = options.backbone_name if one.name == "hand-made" else one.name
        axes.annotate(name, (one.ms, one.capacity), xytext=(6, -10), textcoords="offset points")
    axes.scatter([found.ms], [found.capacity], marker="*", s=220, color="C3", zorder=3, label="the result")
    axes.axvline(limit, color="0.4", linestyle=":")
    axes.set(xlabel="ms from an image to its boxes", ylabel=options.proxy)
    axes.set_xlim(0, 1.25 * max(one.ms for one in measured))
    axes.legend()
    with replacing(Path(options.out) / "search.png") as partial_file:
        figure.savefig(partial_file, dpi=120)
