"""ShuffleNet V1 against the paper's figure 2 drawn again, and against the published costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbone_files import build, entry, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from detector.errors import InputError
from detector.lab.cost import multiply_adds, parameters
from detector.models.backbones import parse_backbone
from detector.models.backbones.classifier import ImageClassifier
from detector.models.backbones.contract import ClassifierOptions
from detector.models.backbones.shufflenet_v1 import shuffle_groups


def classifier(file_name: str, **changes: Any) -> ImageClassifier:
    with torch.device("meta"):  # shapes alone: no time for weights
        return ImageClassifier(
            build(file_name, **changes), 1000, parse_backbone(entry(file_name)).classifier or ClassifierOptions()
        )


def millions(file_name: str, **changes: Any) -> float:
    return multiply_adds(classifier(file_name, **changes), torch.zeros(1, 3, 224, 224, device="meta")) / 1e6


class Naive:
    """The paper's figure 2, literally: ReLU after the concatenation, one convolution after another, nothing folded."""

    def __init__(self, state: dict[str, Tensor], *, groups: int, shuffle: bool, se: bool) -> None:
        self.state, self.groups, self.shuffle, self.se = state, groups, shuffle, se

    def conv_bn(self, x: Tensor, convolution: str, norm: str, **options: Any) -> Tensor:
        x = F.conv2d(x, self.state[f"{convolution}.weight"], **options)
        mean, var, weight, bias = (
            self.state[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5)

    def excite(self, x: Tensor, name: str) -> Tensor:
        """Hu et al. 2018, equations 2 to 4."""
        first, second = (self.state[f"{name}.{key}.weight"].flatten(1) for key in ("fc1", "fc2"))
        assert first.shape == (x.shape[1] // 16, x.shape[1])
        z = F.linear(x.mean(dim=(2, 3)), first, self.state[f"{name}.fc1.bias"]).relu()
        s = F.linear(z, second, self.state[f"{name}.fc2.bias"]).sigmoid()
        return x * s[:, :, None, None]

    def unit(self, x: Tensor, name: str, *, stride: int, first_groups: int, pooled: bool) -> Tensor:
        y = F.relu(self.conv_bn(x, f"{name}.reduce.0", f"{name}.reduce.1", groups=first_groups))
        if self.shuffle:
            y = F.channel_shuffle(y, self.groups)
        y = self.conv_bn(y, f"{name}.expand.0", f"{name}.expand.1", stride=stride, padding=1, groups=y.shape[1])
        y = self.conv_bn(y, f"{name}.expand.2", f"{name}.expand.3", groups=self.groups)
        if pooled:  # figure 2 (c)
            y = torch.cat([F.avg_pool2d(x, 3, stride=2, padding=1), y], dim=1)
            return F.relu(self.excite(y, f"{name}.se") if self.se else y)
        y = self.excite(y, f"{name}.se") if self.se else y
        padded = torch.zeros_like(y)
        padded[:, : x.shape[1]] = x
        return F.relu(y + padded)

    def __call__(self, images: Tensor, repeats: dict[str, int]) -> dict[str, Tensor]:
        x = F.relu(self.conv_bn(images, "stem.0", "stem.1", stride=2, padding=1))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        maps = {}
        for index, (stage, count) in enumerate(repeats.items()):
            for number in range(count):
                pooled = number == 0 and stage != "stage1"
                first_groups = 1 if index == number == 0 else self.groups  # section 3.2: not on the first pointwise
                stride = 2 if pooled else 1
                x = self.unit(x, f"{stage}.{number}", stride=stride, first_groups=first_groups, pooled=pooled)
            maps[stage] = x
        return {"c3": maps["stage2"], "c4": maps["stage3"], "c5": maps["stage4"]}


THREE = {"stage2": 4, "stage3": 8, "stage4": 4}  # table 1
SMALL_FOUR: dict[str, Any] = {"channels": [24, 48, 96, 192], "stem_channels": 8, "repeats": [3, 4, 6, 3]}


@pytest.mark.parametrize(
    ("file_name", "changes", "repeats"),
    [
        ("v1_0.25x", {"groups": 1}, THREE),
        ("v1_0.25x", {"groups": 2}, THREE),
        ("v1_0.5x", {}, THREE),
        ("v1_0.25x", {"groups": 4}, THREE),
        ("v1_0.25x", {"groups": 8}, THREE),
        ("v1_0.25x", {"shuffle": False}, THREE),
        ("v1_0.25x", {"se": True}, THREE),
        ("v1_50", SMALL_FOUR, {"stage1": 3, "stage2": 4, "stage3": 6, "stage4": 3}),
    ],
)
def test_equals_figure_2_drawn_again(file_name: str, changes: dict[str, Any], repeats: dict[str, int]) -> None:
    options = entry(file_name) | changes
    ours = randomise(build(file_name, **changes)).double().eval()
    naive = Naive(ours.state_dict(), groups=options["groups"], shuffle=options["shuffle"], se=options["se"])
    for size in ((96, 64), (75, 97)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            expected, got = naive(images, repeats), ours(images)
        for key, feature in got.items():
            assert feature.std() > 1e-3
            torch.testing.assert_close(feature, expected[key], rtol=1e-9, atol=1e-9)


def test_shuffle_groups_is_torchs_channel_shuffle_in_channels_last_memory() -> None:
    x = torch.randn(2, 24, 5, 7).contiguous(memory_format=torch.channels_last)
    for groups in (2, 3, 4, 8):
        got = shuffle_groups(x, groups)
        assert torch.equal(got, F.channel_shuffle(x, groups))
        assert got.is_contiguous(memory_format=torch.channels_last)


# Zhang et al. 2018, table 1: outputs of stage 2, and millions of multiply-adds; the same to one digit more.
@pytest.mark.parametrize(
    ("groups", "outputs", "table_1", "computed"),
    [(1, 144, 143, 143.1), (2, 200, 140, 140.8), (3, 240, 137, 137.5), (4, 272, 133, 134.3), (8, 384, 137, 138.4)],
)
def test_table_1(groups: int, outputs: int, table_1: int, computed: float) -> None:
    network = classifier("v1_1x", groups=groups)
    assert network.backbone.channels == {"c3": outputs, "c4": 2 * outputs, "c5": 4 * outputs}
    cost = millions("v1_1x", groups=groups)
    assert cost == pytest.approx(computed, abs=0.1)
    assert cost == pytest.approx(table_1, rel=0.011)


# Zhang et al. 2018, table 2: rows of 38 and 13 M, which stand for five networks as the row of 140 M stands for the
# 133 to 143 of table 1: within 5%.
@pytest.mark.parametrize(("width", "row"), [("0.5x", 38), ("0.25x", 13), ("1x", 140)])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
def test_rows_of_table_2(width: str, row: int, groups: int) -> None:
    assert millions(f"v1_{width}", groups=groups) == pytest.approx(row, rel=0.05)


# Zhang et al. 2018, table 5; millions of parameters and the widths with 8 groups: the authors' code
# (github.com/megvii-model/ShuffleNet-Series, README).
@pytest.mark.parametrize(
    ("width", "changes", "cost", "count"),
    [
        ("0.5x", {}, 38, 0.7),
        ("0.5x", {"groups": 8, "stem_channels": 16}, 40, 1.0),
        ("1x", {}, None, 1.9),
        ("1x", {"groups": 8}, 138, 2.4),
        ("1.5x", {}, 292, 3.4),
        ("1.5x", {"groups": 8}, 290, 4.3),
        ("2x", {}, 524, 5.4),
        ("2x", {"groups": 8}, 522, 6.5),
        ("2x", {"se": True}, 527, None),
    ],
)
def test_other_published_costs(width: str, changes: dict[str, Any], cost: int | None, count: float | None) -> None:
    if cost is not None:
        assert round(millions(f"v1_{width}", **changes)) == cost
    if count is not None:
        assert parameters(classifier(f"v1_{width}", **changes)) / 1e6 == pytest.approx(count, abs=0.06)


# Ma et al. 2018, table 6, in thousands of millions.
@pytest.mark.parametrize(("file_name", "published"), [("v1_50", 2.3), ("v2_50", 2.3)])
def test_large_models(file_name: str, published: float) -> None:
    assert round(millions(file_name) / 1e3, 1) == published


@pytest.mark.slow
def test_the_deepest_model() -> None:
    """12.7 G in table 6, 164 layers: those of the stem, three of every unit, conv6 and the classifier."""
    network = classifier("se_v2_164")
    images = torch.zeros(1, 3, 224, 224, device="meta")
    assert multiply_adds(network, images) / 1e9 == pytest.approx(12.7, rel=0.01)  # ours 12.60
    stem = [layer for layer in network.backbone.conv1 if isinstance(layer, nn.Conv2d)]
    units = sum(len(network.backbone.get_submodule(f"stage{number}")) for number in (1, 2, 3, 4))
    assert len(stem) + 3 * units + 2 == 164
    assert [layer.out_channels for layer in stem] == [64, 64, 128]


@pytest.mark.slow
@pytest.mark.parametrize("file_name", ["v1_50", "v2_50", "se_v2_164"])
def test_signal_survives_a_deep_network(file_name: str) -> None:
    with torch.no_grad():
        features = build(file_name).train()(torch.randn(4, 3, 64, 64))
    for feature in features.values():
        assert feature.isfinite().all()
        assert 0.1 < feature.std() < 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 5}, "groups=5: expected 1 or 2 or 3 or 4 or 8"),
        ({"width": 0.3, "groups": 8}, "no whole number"),
        ({"channels": [60, 120, 240]}, "give one of the two"),
        ({"width": None, "channels": [60, 120, 240]}, "stem_channels is missing"),
        ({"width": None, "channels": [60, 120, 250], "stem_channels": 12}, "multiples of groups"),
        ({"width": None, "channels": [120, 60, 240], "stem_channels": 12}, "wider than the one before"),
        ({"width": None, "channels": [60, 120], "stem_channels": 12}, "three of each"),
        ({"stem_channels": 10}, "stem_channels=10: must be a multiple of groups=3"),
        ({"repeats": [4, 0, 4]}, "from 1 to"),
        ({"bottleneck": 40}, "at least groups"),
        ({"wdith": 2}, "wdith"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build("v1_0.25x", **changes)
