"""The ablations in small: equal costs, what shuffling reaches, intervals and verdicts, going on; feature reuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from tool_runner import run_tool
from torch import Tensor, nn
from torchvision.models import DenseNet

from detector.data.crops import CLASSES
from detector.errors import InputError
from detector.lab import ablation_networks, ablations
from detector.lab.ablation_networks import NETWORKS, TABLES, Row, Table
from detector.lab.ablation_report import T_95, differences, gain, interval, published_gains
from detector.lab.ablations import AblationsOptions, train_all
from detector.lab.reuse import by_distance, read_reuse, reuse, v2_sources
from detector.models.backbones.shufflenet_v1 import Unit as V1Unit
from detector.models.backbones.shufflenet_v2 import ShuffleNetV2, ShuffleNetV2Options, Stage


def test_equal_multiply_adds() -> None:
    """By hooks that see every convolution and fully connected layer, as by torch's counter."""
    costs = {}
    for name in NETWORKS:
        network, total = ablation_networks.build(name, len(CLASSES)).eval(), 0

        def count(layer: nn.Module, _: object, output: Tensor) -> None:
            nonlocal total
            weight = layer.get_parameter("weight")
            total += weight[0].numel() * output.numel()

        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_hook(count)
        network(torch.zeros(1, 3, 64, 64))
        costs[name] = total
        assert ablation_networks.cost(name) == total
    assert all(abs(cost / ablation_networks.COST - 1) < 0.05 for cost in costs.values()), costs
    for table in TABLES.values():
        found = [costs[row.network] for row in table.rows]
        assert max(found) / min(found) < 1.05


@pytest.mark.parametrize("groups", [3, 8])
@pytest.mark.parametrize("shuffle", [True, False])
def test_without_shuffle_a_channel_stays_in_its_group(groups: int, shuffle: bool) -> None:
    """Through two units of stride 1, whose shortcuts keep the place of a channel."""
    width = 24 * groups
    units = ablation_networks.shufflenet(width, groups, shuffle).get_submodule("stage3")
    two = nn.Sequential(*list(units.children())[1:3]).double().eval()
    assert all(isinstance(unit, V1Unit) for unit in two)
    for parameter in two.parameters():
        nn.init.uniform_(parameter, 0.1, 1.0)  # nothing cancels, no ReLU is at zero
    x = torch.rand(1, 2 * width, 4, 4, dtype=torch.double, requires_grad=True)
    reached = torch.zeros(groups, groups, dtype=torch.bool)
    for group, part in enumerate(two(x).chunk(groups, dim=1)):
        (gradient,) = torch.autograd.grad(part.sum(), x, retain_graph=True)
        reached[group] = torch.stack([one.abs().sum() > 0 for one in gradient.chunk(groups, dim=1)])
    expected = torch.ones(groups, groups) if shuffle else torch.eye(groups)
    assert torch.equal(reached, expected.bool())


def test_units_are_the_papers() -> None:
    """Zhang et al. 2018, section 4.2: ResNet's bottleneck is 1:4, ResNeXt has 16 groups and 1:2 (where 32 divide)."""
    for name, groups, ratio in (("ResNet", 1, 4), ("ResNeXt", 16, 2)):
        build, _ = NETWORKS[name]
        block = build(64).get_submodule("stage3.1")
        convolution = block.get_submodule("conv2")
        assert isinstance(convolution, nn.Conv2d)
        assert (convolution.groups, convolution.out_channels) == (groups, 128 // ratio)


def test_published_gains() -> None:
    """By hand from tables 2 to 4."""
    assert published_gains(TABLES["groups"]) == pytest.approx([0.975, 2.225, 2.425])
    assert published_gains(TABLES["shuffle"]) == pytest.approx([3.55, 4.15, 2.55])
    assert published_gains(TABLES["units"]) == pytest.approx([6.325, 5.0333333, 9.3])


@pytest.mark.parametrize("count", range(2, 11))
def test_interval_is_students(count: int) -> None:
    values = np.random.default_rng(count).normal(40, 3, count)
    low, high = scipy.stats.t.interval(0.95, count - 1, values.mean(), scipy.stats.sem(values))
    found = interval(values)
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high), rel=1e-3)
    assert len(T_95) == 9


def test_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    found = [interval(rng.normal(2.0, 1.5, 3)) for _ in range(2000)]
    assert np.mean([one.low <= 2.0 <= one.high for one in found]) == pytest.approx(0.95, abs=0.015)


PLANTED = Table("", "", (Row("a", "a", (3, 3, 3)), Row("b", "b", (1, 2, None), "a"), Row("c", "c", (2, 2, 2), "a")), -1)


@pytest.mark.parametrize(
    ("true", "noise", "verdict"),
    [(5.0, 0.5, "holds"), (-5.0, 0.5, "does not hold"), (0.2, 1.5, "undecided")],
)
def test_verdict_of_planted_errors(true: float, noise: float, verdict: str) -> None:
    """Seeds differ by far more than networks do; what they share cancels, because differences are paired."""
    rng = np.random.default_rng(1)
    seeds = rng.normal(40, 20, 3)
    errors = {name: (seeds + rng.normal(0, noise, 3) - (name != "a") * true).tolist() for name in "abc"}
    assert gain(PLANTED, errors).verdict == verdict
    by_hand = np.mean([(errors["a"][i] * 2 - errors["b"][i] - errors["c"][i]) / 2 for i in range(3)])
    assert gain(PLANTED, errors).mean == pytest.approx(by_hand)
    assert differences(PLANTED, errors)["b"] == pytest.approx([errors["b"][i] - errors["a"][i] for i in range(3)])


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, int]] = []

    def train(name: str, seed: int, _: AblationsOptions) -> float:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((name, seed))
        return 10.0 * seed + len(name)

    monkeypatch.setattr(ablations, "train", train)
    options = AblationsOptions(out=str(tmp_path), seeds=2)
    with pytest.raises(KeyboardInterrupt):
        train_all({"a": 2, "bb": 2}, options)
    assert done == [("a", 0), ("bb", 0), ("a", 1)]  # one seed of all before the next
    done.clear()
    assert train_all({"a": 2, "bb": 2}, options) == {"a": [1.0, 11.0], "bb": [2.0, 12.0]}
    assert done == [("bb", 1)]
    done.clear()
    train_all({"a": 3}, options)
    assert done == [("a", 2)]
    with pytest.raises(InputError, match="Choose another out="):
        train_all({"a": 3}, AblationsOptions(out=str(tmp_path), epochs=7))


def v2(layout: str = "torchvision", **more: object) -> ShuffleNetV2:
    options = {"channels": (48, 96, 192), "repeats": (4, 6, 3), "layout": layout} | more
    return ShuffleNetV2(ShuffleNetV2Options.parse(options))


class Made(nn.Module):
    """In the place of a branch: maps whose every value is the number of the unit."""

    def __init__(self, number: int, channels: int, seen: list[Tensor]) -> None:
        super().__init__()
        self.number, self.channels, self.seen = number, channels, seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x[0, :, 0, 0])
        return torch.full((1, self.channels, 1, 1), float(self.number))


@pytest.mark.parametrize("layout", ["torchvision", "paper"])
@pytest.mark.parametrize("name", ["stage2", "stage3", "stage4"])
def test_sources_are_those_of_the_real_forward(layout: str, name: str) -> None:
    """Each unit's branches give their own number; what arrives at later branches tells who made it."""
    backbone = v2(layout)
    stage = backbone.get_submodule(name)
    assert isinstance(stage, Stage)
    units, channels = list(stage.children()), backbone.channels[f"c{int(name[-1]) + 1}"]
    first, seen = units[0], list[Tensor]()
    for branch in ("branch1", "branch2"):
        made = [one for one in first.get_submodule(branch).modules() if isinstance(one, nn.Conv2d)][-1].out_channels
        setattr(first, branch, Made(0, made, []))
    for number, unit in enumerate(units[1:], 1):
        unit.branch2 = Made(number, channels // 2, seen)  # type: ignore[assignment]
    stage(torch.zeros(1, 8, 1, 1))
    assert len(seen) == len(units) - 1
    for number, labels in enumerate(seen, 1):
        assert v2_sources(channels, number).tolist() == labels.tolist(), number


def test_reuse_of_v2_decays_geometrically() -> None:
    """Ma et al. 2018, section 3.3: r^j c channels connect blocks j apart, with r = 1/2."""
    network = v2(channels=(128, 256, 512), repeats=(4, 6, 3))
    for parameter in network.parameters():
        nn.init.constant_(parameter, -0.25)  # then the share of the weights is that of the channels
    found = reuse(network.state_dict())
    assert [(one.stage, len(one.channels)) for one in found] == [("stage2", 3), ("stage3", 5), ("stage4", 2)]
    for one in found:
        half = one.channels[0, 0]
        for target, row in enumerate(one.channels):
            expected = [half >> target, *(half >> (target + 1 - source) for source in range(1, target + 1))]
            assert row[: target + 1].tolist() == expected
            assert row.sum() == half
    distances = by_distance(found)
    assert [one["channels"] for one in distances] == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 16])
    assert [one["share"] for one in distances] == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 16])
    assert [one["average"] for one in distances] == pytest.approx([0.25] * 4)


def test_reuse_of_densenet() -> None:
    """Two blocks; the layer that reads its block's input and an earlier layer has planted weights."""
    network = DenseNet(4, (3, 2), 10, 2, 0.0, num_classes=2)
    state = network.state_dict()
    weight = state["features.denseblock1.denselayer3.conv1.weight"]
    assert weight.shape[1] == 10 + 2 * 4
    weight[:, :10], weight[:, 10:14], weight[:, 14:] = -1.0, 2.0, 5.0
    found = reuse(state)
    assert [(one.stage, len(one.channels)) for one in found] == [("denseblock1", 3), ("denseblock2", 2)]
    assert found[0].channels.tolist() == [[10, 0, 0], [10, 4, 0], [10, 4, 4]]
    assert found[0].average[2].tolist() == pytest.approx([1.0, 2.0, 5.0])
    assert found[0].share[2].tolist() == pytest.approx([10 / 38, 8 / 38, 20 / 38])


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[object], str]:
    def save(content: object) -> str:
        torch.save(content, tmp_path / "some.pth")
        return str(tmp_path / "some.pth")

    return save


def test_any_checkpoint(saved: Callable[[object], str]) -> None:
    state = v2(extra_depthwise=True).state_dict()
    plain = read_reuse(saved(state))
    named = {f"network.backbone.{name}": value for name, value in state.items()}
    spec = {"backbone": {"name": "shufflenet_v2", "shuffle": True}}
    whole = read_reuse(saved({"state_dict": named, "detector": {"spec": spec}}))
    assert [one.norms.tolist() for one in plain] == [one.norms.tolist() for one in whole]
    assert np.isfinite(json.loads(json.dumps(plain[0].share.tolist()))).all()
    with pytest.raises(InputError, match="no ShuffleNet V2 whose units are shuffled"):
        read_reuse(saved({"state_dict": named, "detector": {"spec": {"backbone": {"shuffle": False}}}}))
    with pytest.raises(InputError, match="no ShuffleNet V2 whose units are shuffled"):
        read_reuse(saved({"layer.weight": torch.zeros(2)}))


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    """Tiny, from nothing; then a seed more, and the network's error is that of its run."""
    small = ("scenes=24", "epochs=1", "data=crops", "out=found")
    run_tool("ablations", "shuffle", "reuse", "seeds=2", *small, cwd=tmp_path).ok()
    found = tmp_path / "found"
    kept = json.loads((found / "ablations.json").read_text())["runs"]
    assert {name: len(values) for name, values in kept.items()} == {
        "g=3, no shuffle": 2, "g=3": 2, "g=8, no shuffle": 2, "g=8": 2, "DenseNet": 1, "ShuffleNet V2 0.5x": 1,
    }  # fmt: skip
    last = json.loads((found / "runs/g=8_no_shuffle_1/metrics.json").read_text())["last"]
    assert kept["g=8, no shuffle"][1] == pytest.approx(100 * (1 - last["top1"]))
    tables = json.loads((found / "tables.json").read_text())
    by_hand = np.mean(np.subtract(kept["g=3, no shuffle"], kept["g=3"])) / 2
    by_hand += np.mean(np.subtract(kept["g=8, no shuffle"], kept["g=8"])) / 2
    assert tables["shuffle"]["gain"]["mean"] == pytest.approx(by_hand)
    assert {"DenseNet", "ShuffleNet V2 0.5x"} == set(json.loads((found / "reuse.json").read_text()))
    for name in ("ablations.png", "reuse.png"):
        assert (found / name).stat().st_size > 10_000
    assert "Channel shuffle (table 3)" in (found / "ablations.md").read_text()
    again = run_tool("ablations", "shuffle", "reuse", "seeds=2", *small, cwd=tmp_path).ok()
    assert "seed 0" not in again.err
    message = run_tool("ablations", "shuffle", "epochs=2", *small[:1], *small[2:], cwd=tmp_path).error()
    assert "epochs=1" in message
