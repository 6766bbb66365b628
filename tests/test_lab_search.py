"""The search: its space against known networks, its front against a naive filter, resuming, the files it writes."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tool_runner import run_tool

from detector import cli
from detector.cli import composition
from detector.errors import InputError
from detector.files import CONF
from detector.lab import search
from detector.lab.capacity import PROXIES, canvas, capacity
from detector.lab.cost import detection_multiply_adds, multiply_adds
from detector.lab.layer_times import held_out_errors
from detector.lab.roofline import fit_costs
from detector.lab.search import (
    SearchOptions,
    Timed,
    command_line,
    finalists,
    hand_made,
    open_study,
    run_trials,
    write_conf,
)
from detector.lab.space import DetectorOptions, choices, detector_options, point_of
from detector.models.backbones import build_backbone
from detector.models.build import build_network
from detector.models.fuse import fuse
from detector.training.run import TrainOptions

optuna = pytest.importorskip("optuna")
BASE = SearchOptions.parse(
    {
        "neck": {"name": "cem", "width": 96},
        "rpn": {"separable": True, "scales": [16, 32, 64], "test_limits": {"before_nms": 100, "after_nms": 20}},
        "light_head": {"kernel_size": 1, "mid_channels": 32, "thin_channels": 5, "hidden_channels": 64},
        "input": {"short_side": 128, "long_side": 192},
        "turns": 1,
    }
)
NAMES = choices(BASE, everything=True)


def backbone_cost(options: DetectorOptions) -> int:
    with torch.device("meta"):
        return multiply_adds(build_backbone(options.backbone), torch.empty(1, 3, 64, 96))


@pytest.mark.parametrize("name", ["v2_0.5x", "v2_1x", "v2star_1x"])
def test_published_networks_are_points_of_the_space(name: str) -> None:
    _, known = hand_made(BASE, name)
    point = point_of(known, NAMES)
    assert all(value in NAMES[key] for key, value in point.items())
    assert set(point) == set(NAMES)
    found = detector_options(point, BASE)
    assert backbone_cost(found) == backbone_cost(known)
    assert {key: value for key, value in found.spec().items() if key != "backbone"} == {
        key: value for key, value in known.spec().items() if key != "backbone"
    }


def test_a_point_changes_what_it_says() -> None:
    point = point_of(BASE, NAMES) | {"units_c3": 3, "star_c3": 0.5, "input": 1.25, "hidden": 256, "neck": 64}
    found = detector_options(point, BASE)
    assert found.backbone.repeats == (3, 8, 4)  # type: ignore[union-attr]
    assert found.backbone.extra_depthwise == (2, 0, 0)  # type: ignore[union-attr]
    assert found.light_head.hidden_channels == 256
    assert found.neck.width == 64  # type: ignore[union-attr]
    assert canvas(found) == (160, 256)  # multiples of 32
    assert found.rpn.scales == (20, 40, 80)  # as large on the image
    assert found.rpn.test_limits == BASE.rpn.test_limits
    assert "mid" not in NAMES  # with a kernel of 1 it is merged into one convolution: no cost, no use
    wide = BASE.model_copy(update={"light_head": BASE.light_head.model_copy(update={"kernel_size": 5})})
    assert set(choices(wide, everything=True)) == {*NAMES, "mid"}


def planted(options: DetectorOptions) -> float:
    """Latency by a rule of the test: milliseconds by the units alone."""
    return float(sum(options.backbone.repeats))  # type: ignore[union-attr]


def looked_at(out: Path, trials: int, monkeypatch: pytest.MonkeyPatch, target: float = 10.0) -> Any:
    def width(options: DetectorOptions, proxy: str) -> float:
        return float(sum(options.backbone.channels))  # type: ignore[union-attr]

    monkeypatch.setattr(search, "capacity", width)
    study = open_study(BASE.model_copy(update={"trials": trials}), out)
    run_trials(study, BASE.model_copy(update={"trials": trials}), target, planted)
    return study


def test_the_search_keeps_the_target_and_finds_the_widest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = looked_at(tmp_path, 110, monkeypatch)
    front = np.array([trial.values for trial in study.best_trials])
    assert front[:, 0].max() <= search.MARGIN * 10
    assert [trial.params["units_c4"] for trial in study.trials[:6]] == [8] * 6  # it begins with the published ones
    # What keeps the target and that nothing else is at least as good as, found by looking at every pair.
    kept = np.array([trial.values for trial in study.trials if trial.values[0] <= search.MARGIN * 10])
    better = [any(a[0] <= b[0] and a[1] >= b[1] and (a != b).any() for a in kept) for b in kept]
    assert {tuple(one) for one in front} == {tuple(one) for one, worse in zip(kept, better, strict=True) if not worse}
    # Widths cost nothing here: the search must come near the sum of the largest.
    assert front[:, 1].max() > 0.7 * sum(max(NAMES[stage]) for stage in ("c3", "c4", "c5"))
    slowest = [planted(detector_options(point, BASE)) for point in finalists(study, 10.0).values()]
    assert sorted(front[:, 0])[-len(slowest) :] == slowest


def test_a_stopped_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at(tmp_path, 12, monkeypatch)
    study = looked_at(tmp_path, 30, monkeypatch)
    assert len(study.trials) == 30
    assert len({json.dumps(trial.params) for trial in study.trials}) > 26  # not the same draws again
    assert len(looked_at(tmp_path, 30, monkeypatch).trials) == 30
    with pytest.raises(InputError, match=r"other options \(proxy\)"):
        open_study(BASE.model_copy(update={"proxy": "naswot"}), tmp_path)


def test_the_model_of_latency_finds_planted_costs() -> None:
    """Times made of known costs; with noise, those left out are predicted as well as noise allows."""
    rng = np.random.default_rng(0)
    true = np.array([1e-11, 5e-11, 2e-11, 0, 1e-10, 5e-5, 2e-3])
    known = rng.uniform(0.5, 2, (60, 7)) * np.array([2e8, 1e7, 3e7, 1e7, 5e6, 100, 0]) + np.eye(7)[-1]
    costs = fit_costs(known, known @ true)
    assert np.allclose(known @ costs, known @ true, rtol=1e-6)
    assert costs.min() >= 0
    noisy = known @ true * rng.normal(1, 0.05, 60)
    assert 0.02 < np.median(np.abs(held_out_errors(known, noisy))) < 0.06


def test_multiply_adds_are_those_of_what_runs() -> None:
    counted = 10 ** PROXIES["multiply_adds"](BASE)
    assert counted == pytest.approx(detection_multiply_adds(fuse(build_network(BASE, 7)), *canvas(BASE)), rel=1e-9)


def test_proxies_grow_with_width_and_come_out_alike() -> None:
    small, large = (hand_made(BASE, name)[1] for name in ("v2_0.5x", "v2_1x"))
    for proxy in PROXIES:
        found = capacity(small, proxy)
        assert found < capacity(large, proxy), proxy
        assert found == capacity(small, proxy), proxy


def test_what_is_written_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of conf/, and the command line, lead to the detector that was found; without pre-trained weights."""
    conf = shutil.copytree(CONF, tmp_path / "conf")
    monkeypatch.setattr(composition, "CONF", conf)
    base = cli.compose("search", ["recipe=finetune"]).options()
    assert isinstance(base, SearchOptions)
    names = choices(base, everything=True)
    point = point_of(base, names) | {"c4": 160, "units_c4": 3, "star_c4": 1.0, "input": 0.75, "thin": 7}
    wanted = detector_options(point, base)
    write_conf("searched_8ms", base, Timed("7", point, 8.0, 8.0, 8.0, 1.0), conf)
    words = shlex.split(command_line(point, base))[2:]
    for command in (["recipe=searched_8ms"], words):
        found = cli.compose("train", command).options()
        assert isinstance(found, TrainOptions)
        assert found.spec() == wanted.spec(), command
        assert found.input == wanted.input
        assert found.backbone.weights is None
    other = cli.compose("train", ["backbone=searched_8ms", "recipe=paper"]).options()
    assert isinstance(other, TrainOptions)
    assert other.backbone.spec() == wanted.backbone.spec()


def test_hand_made_by_default() -> None:
    options = cli.compose("search", []).options()
    assert isinstance(options, SearchOptions)
    assert (options.backbone_name, options.recipe_name) == ("v2_1x", "demo")
    assert options.backbone.channels == (116, 232, 464)  # type: ignore[union-attr]


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    words = ("trials=12", "turns=1", "target_ms=1000", "input.short_side=64", "input.long_side=64", "out=found")
    run_tool("search", *words, cwd=tmp_path).ok()
    report = json.loads((tmp_path / "found" / "search.json").read_text())
    assert report["measured"][0]["name"] == "hand-made"
    assert report["measured"][0]["ratio"] == 1
    ours = [one for one in report["measured"] if one["name"].isdecimal()]
    assert report["found"] == max(ours, key=lambda one: one["capacity"])
    assert "searched_1e+03ms" in {path.stem for path in (tmp_path / "found" / "recipe").iterdir()}
    assert (tmp_path / "found" / "search.png").stat().st_size > 10_000
    run_tool("search", *words, "trials=14", cwd=tmp_path).ok()
    assert "14 trials" in (tmp_path / "found" / "search.md").read_text()
    assert "proxy" in run_tool("search", *words, "proxy=naswot", cwd=tmp_path).error()


@pytest.mark.slow
def test_a_target_that_no_detector_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def time_detectors(_: object, detectors: dict[str, Any], __: str) -> dict[str, list[float]]:
        return {name: [0.01] for name in detectors}

    monkeypatch.setattr(search, "SAMPLES", 1)
    monkeypatch.setattr(search, "time_detectors", time_detectors)
    monkeypatch.setattr(search, "take_cores", lambda _: None)  # of this process, which has other tests to run
    words = ("trials=1", "turns=1", "target_ms=0.01", "input.short_side=32", "input.long_side=32")
    with pytest.raises(InputError, match=r"No detector takes 0\.01 ms or less; raise target_ms"):
        search.search(cli.compose("search", [*words, f"out={tmp_path}"]).options())
