"""The learning rate and the parameter groups, against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from detector.errors import InputError
from detector.inference.detector import Detector
from detector.training.schedule import OptimizerOptions, ScheduleOptions, build_optimizer, parameter_groups


def schedule(**changes: Any) -> ScheduleOptions:
    values: dict[str, Any] = {
        "kind": "steps", "epochs": 4, "images": None, "milestones": [0.75], "warmup_steps": 4, "warmup_factor": 0.2,
        "final_share": 0.0,
    }  # fmt: skip
    return ScheduleOptions(**values | changes)


def optimizer(**changes: Any) -> OptimizerOptions:
    values: dict[str, Any] = {
        "name": "sgd", "lr": 0.01, "base_batch": 16, "momentum": 0.9, "weight_decay": 1e-4, "lr_scales": None,
        "clip_norm": None,
    }  # fmt: skip
    return OptimizerOptions(**values | changes)


def test_steps_with_warm_up() -> None:
    factors = [schedule(milestones=[0.5, 0.75]).factor(step, 40) for step in range(40)]
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factors[19:21] == pytest.approx([1.0, 0.1])
    assert factors[29:31] == pytest.approx([0.1, 0.01])
    assert factors[39] == pytest.approx(0.01)


def test_the_papers_schedule() -> None:
    """Li et al. 2017, section 4.1: 2 million images of which the last half million at a tenth; 16 images a step."""
    paper = ScheduleOptions()
    assert paper.epochs_for(118_287) == 17  # 2 M / 118,287 = 16.9
    total = 125_000
    assert paper.factor(0, total) == pytest.approx(1 / 3)
    assert [paper.factor(step, total) for step in (500, 93_749, 93_750, 124_999)] == pytest.approx([1, 1, 0.1, 0.1])


def test_cosine_with_warm_up() -> None:
    cosine = schedule(kind="cosine", final_share=0.1, warmup_steps=10, warmup_factor=0.0)
    assert [cosine.factor(step, 110) for step in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])
    # Half-way between warm-up and end: half-way between 1 and the final share; a third of it: cos(60 deg) = 1/2.
    assert cosine.factor(60, 110) == pytest.approx(0.55)
    assert cosine.factor(10 + 100 / 3, 110) == pytest.approx(0.1 + 0.9 * 0.75)  # type: ignore[arg-type]
    assert cosine.factor(110, 110) == pytest.approx(0.1)
    falling = [cosine.factor(step, 110) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


def test_a_line_with_and_without_warm_up() -> None:
    line = schedule(kind="linear", warmup_steps=0)
    assert [line.factor(step, 8) for step in range(9)] == pytest.approx([1 - step / 8 for step in range(9)])
    assert line.factor(9, 8) == 0  # one step too many does not climb the hill
    warm = schedule(kind="linear", warmup_steps=2, warmup_factor=0.5, final_share=0.2)
    assert [warm.factor(step, 10) for step in (0, 1, 2, 6, 10)] == pytest.approx([0.5, 0.75, 1.0, 0.6, 0.2])


@pytest.mark.parametrize("total", [1, 2, 4, 5, 20])
def test_a_short_run_warms_up_for_a_fifth_of_it(total: int) -> None:
    factors = [schedule(warmup_steps=100, milestones=[]).factor(step, total) for step in range(total)]
    assert sum(factor < 1 for factor in factors) == total // 5
    assert all(0 < factor <= 1 for factor in factors)


def test_the_length_of_a_run() -> None:
    assert schedule(epochs=7, images=100).epochs_for(10) == 7
    assert schedule(epochs=None, images=100).epochs_for(30) == 3
    assert schedule(epochs=None, images=10).epochs_for(1000) == 1
    with pytest.raises(InputError, match=r"schedule\.epochs=12"):
        ScheduleOptions.parse({"epochs": None, "images": None})
    with pytest.raises(InputError, match=r"schedule\.kind=line: expected cosine or linear or steps"):
        ScheduleOptions.parse({"kind": "line"}, "schedule")


def test_the_rate_follows_the_batch_size() -> None:
    assert optimizer().scaled_lr(4) == pytest.approx(0.0025)  # Goyal et al. 2017
    assert optimizer(base_batch=None).scaled_lr(4) == 0.01


def test_parameter_groups(small_detector: Detector) -> None:
    network = small_detector.network
    network.backbone.conv1.requires_grad_(False)
    settings = optimizer(lr_scales={"head": 2.0, "head.thin": 3.0})
    groups = parameter_groups(network, settings, 0.5)
    place = {id(parameter): group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(place)
    for name, parameter in network.named_parameters():
        if name.startswith("backbone.conv1."):
            assert id(parameter) not in place
            continue
        group = place[id(parameter)]
        assert group["lr"] == 0.5 * (6 if name.startswith("head.thin") else 2 if name.startswith("head") else 1), name
        # Biases, and scales and shifts of normalisation, are vectors.
        assert group["weight_decay"] == (0.0 if name.endswith("bias") or parameter.ndim == 1 else 1e-4), name
    assert len(groups) <= 6


def test_a_prefix_that_fits_nothing(small_detector: Detector) -> None:
    with pytest.raises(InputError, match="no parameter starts with 'hed'"):
        parameter_groups(small_detector.network, optimizer(lr_scales={"hed": 2.0}), 0.5)


def test_one_step_of_sgd_is_the_formula(small_detector: Detector) -> None:
    network = small_detector.network
    sgd = build_optimizer(network, optimizer(weight_decay=0.1), 32)
    weight, bias = network.head.class_logits.weight, network.head.class_logits.bias
    before = weight.detach().clone(), bias.detach().clone()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    sgd.step()
    assert torch.allclose(weight, before[0] - 0.02 * (1 + 0.1 * before[0]), atol=1e-7)
    assert torch.allclose(bias, before[1] - 0.02, atol=1e-7)


def test_adamw_and_nothing_else(small_detector: Detector) -> None:
    adamw = build_optimizer(small_detector.network, optimizer(name="adamw"), 16)
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.9, 0.999)
    assert math.isclose(adamw.param_groups[0]["lr"], 0.01)
    with pytest.raises(InputError, match=r"optimizer\.name=lion: expected sgd or adamw"):
        OptimizerOptions.parse({"name": "lion"}, "optimizer")
