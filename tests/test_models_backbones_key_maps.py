"""The authors' ShuffleNet V2, written again from its description, against ours with its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from detector.errors import InputError
from detector.models import light_head_rcnn
from detector.models.backbones import build_backbone, parse_backbone
from detector.models.backbones.classifier import ImageClassifier
from detector.models.backbones.contract import ClassifierOptions
from detector.models.backbones.input_frame import MEAN, STD, for_normalised_rgb
from detector.models.backbones.key_maps import STAGES, megvii_names, stage_order
from detector.models.backbones.pretrained import load_weights
from detector.models.backbones.shufflenet_v2 import ExtraDepthwise, ShuffleNetV2

CONF = Path(__file__).parents[1] / "conf" / "backbone"
WIDTHS = {"0.5x": (48, 96, 192, 1024), "1x": (116, 232, 464, 1024), "1.5x": (176, 352, 704, 1024),
          "2x": (244, 488, 976, 2048)}  # fmt: skip
CLASSES = 10


def conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


class AuthorsUnit(nn.Module):
    """Even channels pass, odd ones are worked on; at stride 2 all go both ways, and the projection keeps its width."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, middle = stride, outputs // 2
        worked = inputs if stride == 2 else inputs // 2
        if stride == 2:
            self.branch_proj = nn.Sequential(
                conv(inputs, inputs, 3, 2, inputs), nn.BatchNorm2d(inputs),
                conv(inputs, inputs, 1), nn.BatchNorm2d(inputs), nn.ReLU(),
            )  # fmt: skip
        self.branch_main = nn.Sequential(
            conv(worked, middle, 1), nn.BatchNorm2d(middle), nn.ReLU(),
            conv(middle, middle, 3, stride, middle), nn.BatchNorm2d(middle),
            conv(middle, outputs - worked, 1), nn.BatchNorm2d(outputs - worked), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            return torch.cat((self.branch_proj(x), self.branch_main(x)), 1)
        return torch.cat((x[:, 0::2], self.branch_main(x[:, 1::2])), 1)


class AuthorsNetwork(nn.Module):
    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(conv(3, 24, 3, 2), nn.BatchNorm2d(24), nn.ReLU())
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        units, inputs = [], 24
        for outputs, repeats in zip(widths, (4, 8, 4), strict=False):
            for unit in range(repeats):
                units.append(AuthorsUnit(inputs if unit == 0 else outputs, outputs, 2 if unit == 0 else 1))
            inputs = outputs
        self.features = nn.Sequential(*units)
        self.conv_last = nn.Sequential(conv(inputs, widths[-1], 1), nn.BatchNorm2d(widths[-1]), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(widths[-1], CLASSES, bias=False))

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        x, features = self.maxpool(self.first_conv(images)), {}
        for key, units in (("c3", slice(0, 4)), ("c4", slice(4, 12)), ("c5", slice(12, 16))):
            features[key] = x = self.features[units](x)
        return features, self.classifier(self.conv_last(x).mean((2, 3)))


def authors(width: str) -> AuthorsNetwork:
    """As after training: every channel of every layer is different, and its statistics fit its activations."""
    torch.manual_seed(0)
    network = AuthorsNetwork(WIDTHS[width]).double().train()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # statistics are those of the one pass below
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.2)
    with torch.no_grad():
        network(torch.randn(8, 3, 64, 64, dtype=torch.float64))
    return network.eval()


def build(name: str, **changes: Any) -> ShuffleNetV2:
    torch.manual_seed(1)
    backbone = build_backbone(parse_backbone(yaml.safe_load((CONF / f"{name}.yaml").read_text()) | changes))
    assert isinstance(backbone, ShuffleNetV2)
    for module in backbone.double().modules():
        if isinstance(module, ExtraDepthwise):  # the identity to the last digit of float32, and now of float64
            module[1].running_var.fill_(1 - module[1].eps)
    return backbone.eval()


def feature_order(backbone: ShuffleNetV2) -> dict[str, list[int]]:
    """For c3, c4, c5: the authors' channel at each place of ours."""
    ends = (stage_order(getattr(backbone, stage))[1][-1] for stage in STAGES)
    return dict(zip(backbone.channels, ends, strict=True))


def saved(network: nn.Module, path: Path) -> Path:
    torch.save({"state_dict": {f"module.{key}": value for key, value in network.state_dict().items()}}, path)
    return path


def column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(3, 1, 1)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(
    ("name", "layout"),
    [(f"{family}_{width}", "paper") for width in WIDTHS for family in ("v2", "v2star")]
    + [("v2_0.5x", "torchvision"), ("v2star_0.5x", "torchvision")],
)
def test_features_and_logits_are_the_authors(name: str, layout: str, tmp_path: Path) -> None:
    width = name.partition("_")[2]
    theirs, ours = authors(width), build(name, layout=layout)
    report = load_weights(ours, saved(theirs, tmp_path / "authors.pth"), input_frame="rgb_imagenet")
    assert report.format == "the authors' ShuffleNet V2"
    assert len(report.matched) == sum(".extra." not in key and ".order" not in key for key in ours.state_dict())
    assert len(report.kept) == (16 * 6 if "star" in name else 0)
    assert set(report.ignored) == {key for key in theirs.state_dict() if key.startswith(("conv_last.", "classifier."))}

    classifier = ImageClassifier(ours, CLASSES, ClassifierOptions(conv5_channels=WIDTHS[width][-1])).double().eval()
    missing, unexpected = classifier.load_state_dict(dict(report.classifier), strict=False)
    assert all(key.startswith("backbone.") for key in missing)
    assert not unexpected
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        features, logits = theirs(images)
        got, got_logits = ours(images), classifier(images)
    assert relative_error(got_logits, logits) < 1e-10
    for key, order in feature_order(ours).items():
        assert sorted(order) == list(range(ours.channels[key]))
        assert relative_error(got[key], features[key][:, order]) < 1e-10
        assert relative_error(got[key], features[key]) > 0.1  # the order matters: the test can fail


def test_repeats_of_other_numbers() -> None:
    """Orders exist whatever the number of units: each is a permutation, and no two readers share a channel."""
    ours = build("v2_1x", layout="paper", repeats=[7, 1, 2])
    for stage, units in ((ours.stage2, 7), (ours.stage3, 1), (ours.stage4, 2)):
        outputs, inputs = stage_order(stage)
        assert sorted(outputs) == [-1, *range(units)]
        assert all(sorted(order) == list(range(len(order))) for order in outputs.values())
        assert all(sorted(order) == list(range(len(order))) for order in inputs)


def test_raw_pixels_fold_into_the_stem(tmp_path: Path) -> None:
    """Theirs sees BGR in 0-255, ours normalised RGB: equal inside, different where the padding is seen."""
    theirs, ours = authors("0.5x"), build("v2_0.5x")
    theirs.first_conv[0].weight.data /= 60  # so that pixels of 0-255 give outputs of about 1
    report = load_weights(ours, saved(theirs, tmp_path / "authors.pth"))
    assert report.input_frame == "bgr255"
    rgb = torch.randint(0, 256, (2, 3, 192, 192)).double()
    normalised = (rgb - column(MEAN)) / column(STD)
    with torch.no_grad():
        expected, got = theirs.first_conv[:2](rgb.flip(1)), ours.conv1(normalised)
        features, ours_features = theirs(rgb.flip(1))[0], ours(normalised)
    error = (got - expected).abs()
    assert error[..., 1:, 1:].max() < 1e-10 * expected.abs().max()
    assert error[..., 0, :].max() > 0.1
    assert error[..., :, 0].max() > 0.1
    # c3 sees 63 pixels: from its fifth cell on it is beyond the border's reach, and equal.
    c3 = features["c3"][:, feature_order(ours)["c3"]]
    assert relative_error(ours_features["c3"][..., 5:, 5:], c3[..., 5:, 5:]) < 1e-10
    assert relative_error(ours_features["c3"][..., :1, :], c3[..., :1, :]) > 1e-3


def test_where_zero_is_black_raw_pixels_are_exact_to_the_border(tmp_path: Path) -> None:
    theirs, ours = authors("0.5x"), build("v2_0.5x")
    theirs.first_conv[0].weight.data /= 60
    report = load_weights(ours, saved(theirs, tmp_path / "authors.pth"), input_frame="rgb_imagenet")
    stem = {name: value for name, value in ours.state_dict().items() if name.startswith("conv1.")}
    mean = stem["conv1.1.running_mean"]  # of images / STD: MEAN is not taken off, and zero is black here too
    ours.load_state_dict(for_normalised_rgb(stem) | {"conv1.1.running_mean": mean}, strict=False)
    rgb = torch.randint(0, 256, (2, 3, 63, 64)).double()
    with torch.no_grad():
        expected, got = theirs(rgb.flip(1))[0], ours(rgb / column(STD))
    assert report.kept == ()
    for key, order in feature_order(ours).items():
        assert relative_error(got[key], expected[key][:, order]) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(("size", "bounds"), [((224, 224), (0.05, 0.13)), ((480, 640), (0.05, 0.13))])
def test_the_border_s_worth_is_what_the_docstring_says(
    size: tuple[int, int], bounds: tuple[float, float], shared: Path
) -> None:
    """Real weights and photographs; black outside is written with a padding of its own."""

    class BlackOutside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            black = functional.pad(x + mean / std, (1, 1, 1, 1)) - mean / std
            return functional.conv2d(black, grey.conv1[0].weight, stride=2)

    mean, std = column(MEAN), column(STD)
    grey, black = build("v2_0.5x"), build("v2_0.5x")
    for backbone in (grey, black):
        load_weights(backbone, shared / "weights" / "shufflenet_v2_x0_5_backbone.pth")
    black.conv1[0] = BlackOutside()
    changes, cosines, far = [], [], []
    for path in sorted((shared / "data" / "coco-permissive-320" / "images").rglob("*.jpg"))[:8]:
        picture = Image.open(path).convert("RGB").resize(size[::-1])
        images = (torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].double() - mean) / std
        with torch.no_grad():
            c5, other = grey(images)["c5"], black(images)["c5"]
        half = [side // 2 for side in c5.shape[-2:]]
        changes.append(relative_error(c5, other))
        far.append(relative_error(c5[..., half[0] :, half[1] :], other[..., half[0] :, half[1] :]))
        cosines.append(functional.cosine_similarity(c5.mean((2, 3)), other.mean((2, 3))).item())
    assert bounds[0] < sum(changes) / len(changes) < bounds[1]
    assert sum(far) / len(far) < 0.04
    assert sum(cosines) / len(cosines) > 0.998


def test_the_frame_is_the_network_s() -> None:
    assert (MEAN, STD) == (light_head_rcnn.MEAN, light_head_rcnn.STD)


@pytest.mark.parametrize("width", ["1x", "1.5x", "2x"])
def test_torchvision_s_layout_has_no_place_for_their_projection(width: str, tmp_path: Path) -> None:
    ours = build(f"v2_{width}")
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    path = saved(authors(width), tmp_path / "authors.pth")
    for partial in (False, True):
        with pytest.raises(
            InputError, match=r"features\.0\.branch_proj\.2\.weight keeps its 24.*backbone\.layout=paper"
        ):
            load_weights(ours, path, partial=partial)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_damaged_and_other_files_of_the_authors_are_named(tmp_path: Path) -> None:
    state = authors("1x").state_dict()
    path = tmp_path / "authors.pth"
    torch.save({key: value for key, value in state.items() if key != "features.5.branch_main.3.weight"}, path)
    with pytest.raises(
        InputError, match=r"features\.5\.branch_main\.3\.weight \(here stage3\.1\.branch2\.3\.weight\) is missing"
    ):
        load_weights(build("v2_1x", layout="paper"), path)
    torch.save(state, path)
    with pytest.raises(InputError, match=r"features\.0\.branch_main\.0\.weight .*is \(58, 24, 1, 1\), expected \(24,"):
        load_weights(build("v2_0.5x"), path)
    with pytest.raises(InputError, match=r"features\.15\.branch_main.* has no place here"):
        load_weights(build("v2_1x", layout="paper", repeats=[4, 8, 3]), path)
    with pytest.raises(InputError, match="no residuals"):
        load_weights(build("v2_1x", layout="paper", residual=True), path)
    with pytest.raises(InputError, match="shuffle=true"):
        load_weights(build("v2_1x", layout="paper", shuffle=False), path)


def test_units_numbered_by_stage_are_the_authors_too(tmp_path: Path) -> None:
    """As FastestDet and Yolo-FastestV2 publish them: the authors' code with a module for each stage."""
    state = authors("0.5x").state_dict()
    load_weights(through := build("v2_0.5x"), saved(authors("0.5x"), tmp_path / "through.pth"))
    starts = {0: "stage2", 4: "stage3", 12: "stage4"}

    def by_stage(name: str) -> str:
        if not name.startswith("features."):
            return name
        _, unit, rest = name.split(".", 2)
        start = max(start for start in starts if start <= int(unit))
        return f"{starts[start]}.{int(unit) - start}.{rest}"

    torch.save({by_stage(name): value for name, value in state.items()}, tmp_path / "by_stage.pth")
    report = load_weights(ours := build("v2_0.5x"), tmp_path / "by_stage.pth")
    assert report.format == "the authors' ShuffleNet V2"
    expected = through.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())


def test_a_file_of_another_network_says_what_it_has(tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.zeros(3), "encoder.bias": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"The file has 2 tensors: encoder\.weight, encoder\.bias"):
        load_weights(build("v2_0.5x"), tmp_path / "other.pth", partial=True)


def test_names_are_one_to_one() -> None:
    names = megvii_names(build("v2_0.5x", layout="paper"))
    assert len(set(names.values())) == len(names) == 330 + 7
    assert set(names) == set(authors("0.5x").state_dict())
    assert names["features.12.branch_proj.2.weight"] == "stage4.0.branch1.2.weight"
    assert names["features.11.branch_main.6.running_var"] == "stage3.7.branch2.6.running_var"


@pytest.mark.parametrize("odd", ["conv_last.0.weight", "classifier.0.weight"])
@pytest.mark.parametrize("value", [torch.zeros(()), torch.zeros(3), torch.zeros(2, 0, 1, 1)])
def test_an_odd_classifier_does_not_cost_the_backbone(tmp_path: Path, odd: str, value: torch.Tensor) -> None:
    theirs = authors("0.5x").state_dict()
    torch.save(theirs, tmp_path / "whole.pth")
    torch.save(theirs | {odd: value}, tmp_path / "odd.pth")
    expected, found = build("v2_0.5x"), build("v2_0.5x")
    load_weights(expected, tmp_path / "whole.pth")
    assert load_weights(found, tmp_path / "odd.pth").problems == ()
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in expected.state_dict().items())
