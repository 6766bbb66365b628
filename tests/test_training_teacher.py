"""A teacher: what it says is what its own head says, in the learner's order; the loss by hand; a run with one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scored_data import overrides_of, write_scored_data
from tool_runner import run_tool

from detector.data.collate import Batch
from detector.errors import InputError
from detector.inference.detector import Detector
from detector.models.build import NetworkOptions, build_network
from detector.models.light_head import imitation
from detector.training import teacher
from detector.training.teacher import Teacher

OBJECTS = [[(4, 4, 40, 40, 0), (50, 10, 90, 60, 2)], [(10, 20, 60, 50, 1)]]


@pytest.fixture
def teacher_file(small_detector: Detector, tmp_path: Path) -> Path:
    small_detector.save(tmp_path / "teacher.ckpt")
    return tmp_path / "teacher.ckpt"


def test_the_loss_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    taught = torch.rand(2, 5, 4, generator=generator, dtype=torch.float64).softmax(dim=-1)
    taught[0, 0] = torch.tensor([1.0, 0.0, 0.0, 0.0])  # 0 log 0 counts as 0
    used = torch.rand(2, 5, generator=generator) > 0.4
    expected, count = 0.0, 0
    for image, place in used.nonzero().tolist():
        values = [math.exp(value) for value in logits[image, place].tolist()]
        for value, wanted in zip(values, taught[image, place].tolist(), strict=True):
            expected += wanted * math.log(wanted / (value / sum(values))) if wanted else 0.0
        count += 1
    assert 0 < count < 10
    assert imitation(logits, taught, used).item() == pytest.approx(expected / count, rel=1e-12)
    assert imitation(taught[:, 1:].log(), taught[:, 1:], used[:, 1:]).item() == pytest.approx(0.0, abs=1e-12)
    assert imitation(logits, taught, torch.zeros_like(used)).item() == 0.0


@pytest.mark.parametrize(("fast", "apart"), [(False, 1e-5), (True, 0.1)])
def test_it_says_what_its_own_head_says_of_its_own_proposals(
    small_detector: Detector,
    teacher_file: Path,
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    fast: bool,
    apart: float,
) -> None:
    monkeypatch.setattr(teacher, "fast_in_bf16", lambda: fast)
    batch, network = make_batch(OBJECTS), small_detector.network.eval()
    with torch.no_grad():
        regions = network.propose(batch.images, batch.image_sizes)
        own = network.head(regions.thin_features, regions.proposals.boxes).class_logits.softmax(dim=-1)
    said = Teacher(str(teacher_file), ("Bird", "cat"))(batch.images, regions.proposals.boxes)
    assert said.shape == (2, 20, 3)
    # There: cat, dog, bird, background. A dog is background to one that does not know dogs.
    expected = torch.stack((own[..., 2], own[..., 0], own[..., 3] + own[..., 1]), dim=-1)
    torch.testing.assert_close(said, expected, rtol=10 * apart, atol=apart)
    assert (said - expected).abs().mean() < apart / 5
    assert said.std() > 0.05


def test_it_has_to_know_all_classes(teacher_file: Path) -> None:
    with pytest.raises(InputError, match=r"teacher=.*: it does not know fox. A teacher has to know all classes"):
        Teacher(str(teacher_file), ("cat", "fox"))
    with pytest.raises(InputError, match=r"teacher=nowhere: No checkpoint at 'nowhere'.*teacher=null"):
        Teacher("nowhere", ("cat",))
    with pytest.raises(InputError, match=r"it has one class for cat; Cat\."):
        Teacher(str(teacher_file), ("cat", "dog", "Cat"))


def test_it_moves_the_learner_and_stays_itself(
    small_spec: dict[str, Any], teacher_file: Path, make_batch: Callable[..., Batch]
) -> None:
    batch, taught_by = make_batch(OBJECTS), Teacher(str(teacher_file), ("cat", "dog", "bird"))
    before = {name: value.clone() for name, value in taught_by.network.state_dict().items()}
    torch.manual_seed(1)
    network = build_network(NetworkOptions.parse(small_spec), 3).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    found = []
    for _ in range(30):
        losses = network.losses(batch, taught_by)
        assert losses.keys() - network.losses(batch).keys() == {"head_teacher"}
        optimizer.zero_grad()
        losses["head_teacher"].backward()
        optimizer.step()
        found.append(losses["head_teacher"].item())
    assert sum(found[-5:]) < 0.7 * sum(found[:5])
    for name, value in taught_by.network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.slow
def test_a_run_with_a_teacher_goes_on_and_does_not_keep_it(small_detector: Detector, tmp_path: Path) -> None:
    write_scored_data(tmp_path / "data", small_detector)
    short = (
        *overrides_of(small_detector.options.spec()), "recipe=finetune", "ckpt=null", "backbone.weights=null",
        "data.root=data", "input.short_side=64", "input.long_side=96", "train.batch_size=2", "schedule.epochs=1",
        "workers=0", "trainer.accelerator=cpu",
    )  # fmt: skip
    run_tool("train", *short, "run_dir=big", cwd=tmp_path).ok()
    run_tool("train", *short, "run_dir=small", "teacher=big/last.ckpt", cwd=tmp_path).ok()
    big, small = (torch.load(tmp_path / f"{name}/last.ckpt", weights_only=True) for name in ("big", "small"))
    assert small["state_dict"].keys() == big["state_dict"].keys()
    assert any((small["state_dict"][name] != value).any() for name, value in big["state_dict"].items())
    assert "loss_head_teacher" in (tmp_path / "small/metrics.csv").read_text().splitlines()[0]
    assert "loss_head_teacher" not in (tmp_path / "big/metrics.csv").read_text()
    inside = (*short, "run_dir=big", "overwrite=true", "teacher=big/last.ckpt")
    assert "teacher=big/last.ckpt lies in run_dir=big" in run_tool("train", *inside, cwd=tmp_path).error()
    again = ("ckpt=small/last.ckpt", "resume=true")
    run_tool("train", *again, "schedule.epochs=2", cwd=tmp_path).ok()
    (tmp_path / "big/last.ckpt").unlink()
    assert (
        "teacher=big/last.ckpt: No checkpoint" in run_tool("train", *again, "schedule.epochs=3", cwd=tmp_path).error()
    )
    run_tool("train", *again, "schedule.epochs=3", "teacher=null", cwd=tmp_path).ok()
