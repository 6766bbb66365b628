"""Costs of operations against the paper's equations; the model of latency against planted machines."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import spearmanr
from torch import Tensor, nn

from detector.errors import InputError
from detector.files import CONF
from detector.lab import cost, cost_survey
from detector.lab.benchmark import BenchmarkOptions, benchmark
from detector.lab.cost import KINDS, Operation, operations
from detector.lab.cost_survey import COSTS, family_of, rank_correlation, ranking
from detector.lab.roofline import LatencyModel, Measured, Rates, features, fit, left_out, sample_layers
from detector.models.backbones import parse_backbone
from detector.models.backbones.classifier import build_classifier
from detector.models.fuse import fuse

H, W = 12, 10


class Apply(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def image(channels: int) -> Tensor:
    return torch.randn(1, channels, H, W).contiguous(memory_format=torch.channels_last)


def only(module: nn.Module, *inputs: Tensor) -> Operation:
    (found,) = operations(module, *inputs)
    return found


@pytest.mark.parametrize(
    ("c1", "c2", "k", "g", "kind"),
    [
        (8, 24, 1, 1, "dense 1x1"),
        (8, 24, 3, 1, "dense"),
        (1, 24, 3, 1, "dense"),
        (8, 24, 1, 4, "grouped"),
        (8, 8, 5, 8, "depthwise"),
    ],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_by_the_papers_equation(c1: int, c2: int, k: int, g: int, kind: str, stride: int) -> None:
    """Ma et al. 2018, G1 and G2: B = hw c1 c2 / g and MAC = hw (c1 + c2) + c1 c2 / g, with k x k in the weights."""
    one = only(nn.Conv2d(c1, c2, k, stride, padding=k // 2, groups=g), image(c1))
    after = H * W // stride**2
    assert one.kind == kind
    assert one.multiply_adds == after * c1 * c2 * k * k // g
    assert one.memory_access == H * W * c1 + after * c2 + c1 * c2 * k * k // g
    assert one.intensity == one.multiply_adds / (4 * one.memory_access)


def test_other_operations_by_hand() -> None:
    """What is read and what is written; views are free, and so is a layer that does nothing for prediction."""
    values = 8 * H * W
    assert only(Apply(torch.relu_), image(8)) == Operation("relu_", "element-wise", 0, 2 * values, 0)
    assert only(Apply(torch.add), image(8), image(8)) == Operation("add", "element-wise", 0, 3 * values, 0)
    joined = only(Apply(lambda a, b: torch.cat([a, b], 1)), image(8), image(4))
    assert joined == Operation("cat", "copy", 0, 2 * (8 + 4) * H * W, 0)
    pooled = only(nn.MaxPool2d(3, 2, 1), image(8))
    assert (pooled.kind, pooled.memory_access) == ("pooling", values + values // 4)
    product = only(nn.Linear(30, 7), torch.randn(5, 30))
    assert (product.kind, product.multiply_adds, product.memory_access) == ("matrix product", 1050, 150 + 35 + 210)
    assert operations(Apply(lambda x: x[:, 2:6].permute(0, 2, 3, 1).unflatten(-1, (2, 2))), image(8)) == []
    assert operations(nn.Sequential(nn.Dropout(), nn.Identity()).train(), image(8)) == []


def test_shuffling_channels_is_one_copy() -> None:
    def shuffle(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2).permute(0, 3, 1, 2)

    one = only(Apply(shuffle), image(8))
    assert (one.kind, one.memory_access) == ("copy", 2 * 8 * H * W)


def classifier(name: str) -> nn.Module:
    return build_classifier(parse_backbone(yaml.safe_load((CONF / "backbone" / f"{name}.yaml").read_text())), 1000)


def test_operations_of_a_network_add_up_to_torchs_count() -> None:
    network = fuse(classifier("v1_0.25x"))
    images = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    found = operations(network, images)
    assert sum(one.multiply_adds for one in found) == cost.multiply_adds(network, images)
    # Sixteen units, each with one shuffle, and with one addition or concatenation (Zhang et al. 2018, figure 2).
    names = [one.name for one in found]
    assert [names.count(name) for name in ("flatten", "add", "cat")] == [16, 13, 3]


PLANTED = {kind: Rates((1 + at) * 1e-11, (1 + at) * 1e-10, (1 + at) * 1e-6) for at, kind in enumerate(KINDS)}
TRUTH = LatencyModel("planted", 1, PLANTED, 1.3, 0.0, 0.0)
with torch.device("meta"):
    OPERATIONS = {name: (kind, operations(module, image)) for name, kind, module, image in sample_layers()}


def planted_samples(noise: float, seed: int = 0) -> list[Measured]:
    rng = np.random.default_rng(seed)
    return [
        Measured(name, kind, found, TRUTH.seconds(found) / TRUTH.factor * np.exp(rng.normal(0, noise)))
        for name, (kind, found) in OPERATIONS.items()
    ]


def planted_networks(slow: float = 1.0) -> list[Measured]:
    """Five families of four networks; those of the last take `slow` times as long."""
    rng, rows = np.random.default_rng(1), list(OPERATIONS.values())
    networks = []
    for at in range(20):
        found = [one for place in rng.integers(len(rows), size=15) for one in rows[place][1]]
        family = f"family {at % 5}"
        networks.append(Measured(str(at), family, found, TRUTH.seconds(found) * (slow if at % 5 == 4 else 1)))
    return networks


def test_every_kind_is_sampled_in_many_sizes() -> None:
    """Fewer layers than coefficients could not tell them apart."""
    for place, kind in enumerate(KINDS):
        rows = np.array([features(found)[3 * place :][:3] for one, found in OPERATIONS.values() if one == kind])
        computes = 0 if rows[:, 0].any() else 1
        assert np.linalg.matrix_rank(rows[:, computes:] / rows[:, -1:]) == 3 - computes, kind


def test_planted_costs_are_found() -> None:
    model = fit(planted_samples(noise=0), planted_networks(), machine="planted", threads=1)
    assert model.factor == pytest.approx(1.3)
    assert model.worst_error < 1e-6
    for kind, rates in model.rates.items():
        assert rates.value == pytest.approx(PLANTED[kind].value, rel=1e-4), kind
        assert rates.fixed == pytest.approx(PLANTED[kind].fixed, rel=1e-4), kind
        if kind not in ("element-wise", "copy", "pooling"):
            assert rates.multiply_add == pytest.approx(PLANTED[kind].multiply_add, rel=1e-4), kind


def test_noise_of_ten_percent_costs_a_few() -> None:
    model = fit(planted_samples(noise=0.1), planted_networks(), machine="planted", threads=1)
    assert model.median_error < 0.04
    assert all(value >= 0 for rates in model.rates.values() for value in vars(rates).values())


def test_a_family_left_out_is_left_out() -> None:
    """One that takes twice as long is predicted at half its time, by a factor that knows nothing of it."""
    networks = planted_networks(slow=2)
    model = fit(planted_samples(noise=0), networks, machine="planted", threads=1)
    ratio = left_out(model, networks) / np.array([one.seconds for one in networks])
    other = np.array([one.family == "family 4" for one in networks])
    np.testing.assert_allclose(ratio[other], 0.5, rtol=1e-4)
    assert (ratio[~other] > 1.02).all()  # whose factors do know it
    assert model.worst_error == pytest.approx(0.5, rel=1e-4)
    assert model.factor > 1.35


def test_prediction_is_fast_and_leaves_the_network_alone() -> None:
    network = fuse(classifier("v2_1x"))
    before = [one.data_ptr() for one in network.parameters()]
    images = torch.randn(1, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    predicting, running = [], []
    for _ in range(15):  # the least of each: what else runs makes it longer, never shorter
        start = time.process_time()
        predicted = TRUTH.predict(network, 224, 224)
        predicting.append(time.process_time() - start)
        start = time.process_time()
        with torch.inference_mode():
            network(images)
        running.append(time.process_time() - start)
    assert min(predicting) < 8 * min(running)  # a measurement takes hundreds
    assert predicted == pytest.approx(1.3 * sum(TRUTH.seconds([one]) / 1.3 for one in operations(network, images)))
    assert TRUTH.predict(network, 224, 224, batch=8) > 4 * predicted
    assert [one.data_ptr() for one in network.parameters()] == before


def test_a_model_is_kept_as_json(tmp_path: Path) -> None:
    TRUTH.save(tmp_path / "model.json")
    assert LatencyModel.load(tmp_path / "model.json") == TRUTH
    (tmp_path / "other.json").write_text('{"rates": {}}')
    for name in ("other.json", "none.json"):
        with pytest.raises(InputError, match=name):
            LatencyModel.load(tmp_path / name)


def test_rank_correlation_is_scipys() -> None:
    values = np.random.default_rng(0).integers(8, size=(30, 6)).astype(float)  # with many equal values
    for column, found in zip(values.T, rank_correlation(values), strict=False):
        assert found == pytest.approx(spearmanr(column, values[:, -1]).statistic)


def test_what_ranks_better_is_told_apart() -> None:
    """Costs of which one is noise, and one as good as the roofline."""
    rng = np.random.default_rng(0)
    ms = np.exp(rng.normal(0, 1, 40))
    near = ms * np.exp(rng.normal(0, 0.1, 40))
    columns = dict.fromkeys(COSTS, near) | {"operations": rng.normal(size=40), "roofline": near, "ms": ms}
    found = ranking([{key: values[at] for key, values in columns.items()} for at in range(40)])
    assert found["operations"]["low"] < 0 < found["operations"]["high"]
    assert found["roofline"]["low"] > 0.9
    assert found["operations"]["behind_low"] > 0.3
    assert found["MAC, M"]["behind_low"] == found["MAC, M"]["behind_high"] == 0


def test_families() -> None:
    names = {path.stem for path in (CONF / "backbone").glob("*.yaml")} - {"timm", "torchvision"}
    families: dict[str, set[str]] = {}
    for name in names:
        families.setdefault(family_of(name), set()).add(name)
    assert families["ShuffleNet V2"] >= {"v2_1x", "v2_50", "se_v2_164"}
    assert families["ResNet, ResNeXt, DenseNet"] == {"resnet50", "resnext50", "densenet121"}
    assert families["MobileNet V3"] == {"mobilenet_v3_large", "mobilenet_v3_small"}


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_survey, "PROCESSES", 1)
    names = ("v2_0.5x", "mobilenet_v1_0.25")
    benchmark(BenchmarkOptions(what="cost", only=names, turns=1, out=str(tmp_path / "cost")))
    model = LatencyModel.load(tmp_path / "cost" / "model.json")
    assert model.threads == 1
    assert 0 < model.median_error < 1
    written = json.loads((tmp_path / "cost" / "cost_model.json").read_text())
    assert [row["name"] for row in written["networks"]] == ["mobilenet_v1_0.25", "v2_0.5x"]
    # Zhang et al. 2018 and Ma et al. 2018: 41 M each.
    assert [round(row["multiply-adds, M"]) for row in written["networks"]] == [41, 40]
    assert "| v2_0.5x " in (tmp_path / "cost" / "cost_model.md").read_text()
    assert (tmp_path / "cost" / "cost_model.png").stat().st_size > 10_000


def test_what_cannot_be_surveyed_is_told(tmp_path: Path) -> None:
    options = BenchmarkOptions(what="cost", only=("v2_0.5x", "v2_1x"), out=str(tmp_path / "out"))
    with pytest.raises(InputError, match="name one of another"):
        benchmark(options)
    with pytest.raises(InputError, match=r"threads=\[1, 2\]"):
        benchmark(options.model_copy(update={"threads": (1, 2)}))
