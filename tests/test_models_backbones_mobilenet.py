"""MobileNet V1 against timm, V2 against torchvision, both against the published costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from backbone_files import build, entry, randomise

from detector.errors import InputError
from detector.lab.cost import multiply_adds, parameters
from detector.models.backbones import parse_backbone
from detector.models.backbones.classifier import ImageClassifier
from detector.models.backbones.contract import ClassifierOptions


def test_v1_equals_timm() -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("mobilenetv1_100", pretrained=False, features_only=True, out_indices=(2, 3, 4))
    randomise(theirs).eval()
    ours = build("mobilenet_v1_1.0", activation="relu6").eval()
    # The two name their tensors in other words, but in the same order.
    names, tensors = list(ours.state_dict()), list(theirs.state_dict().values())
    ours.load_state_dict(dict(zip(names, tensors, strict=True)))
    images = torch.randn(2, 3, 96, 75)
    with torch.no_grad():
        expected, got = theirs(images), ours(images)
    for feature, (key, own) in zip(expected, got.items(), strict=True):
        assert own.std() > 1e-3, key
        torch.testing.assert_close(own, feature, rtol=1e-4, atol=1e-5)


# torchvision's features after which the stride changes next, with the rounding of the file and with torchvision's.
@pytest.mark.parametrize(
    ("width", "multiple_of", "scale_last"),
    [(0.6, 8, True), (1.0, 8, True), (1.4, 8, True), (0.6, 4, False), (0.15, 4, False), (0.15, 8, True)],
)
def test_v2_equals_torchvision(width: float, multiple_of: int, scale_last: bool) -> None:
    last = 320 if scale_last else 320 / width
    table_2 = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2)]
    theirs = torchvision.models.MobileNetV2(
        width_mult=width, round_nearest=multiple_of, inverted_residual_setting=[*table_2, (6, last, 1, 1)]
    )
    randomise(theirs).eval()
    ours = build("mobilenet_v2_1.0", width=width, multiple_of=multiple_of, scale_last=scale_last).eval()
    keys = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not keys.missing_keys
    assert all(key.startswith(("features.18.", "classifier.")) for key in keys.unexpected_keys)
    x = images = torch.randn(2, 3, 96, 75).contiguous(memory_format=torch.channels_last)
    expected = []
    with torch.no_grad():
        got = ours(images)
        for block in theirs.features:
            x = block(x)
            expected.append(x)
    for key, number in (("c3", 6), ("c4", 13), ("c5", 17)):
        assert got[key].std() > 1e-3
        assert torch.equal(got[key], expected[number])
        assert ours.channels[key] == expected[number].shape[1]


@pytest.mark.parametrize("file_name", ["mobilenet_v2_1.0", "mobilenet_v2_1.4"])
def test_classifier_of_v2_counts_as_torchvisions(file_name: str) -> None:
    settings = entry(file_name)
    with torch.device("meta"):
        theirs = torchvision.models.MobileNetV2(width_mult=settings["width"])
        ours = ImageClassifier(build(file_name), 1000, parse_backbone(settings).classifier or ClassifierOptions())
    assert parameters(ours) == parameters(theirs)
    images = torch.zeros(1, 3, 224, 224, device="meta")
    assert multiply_adds(ours, images) == multiply_adds(theirs, images)


# V1: Howard et al. 2017, table 6, with millions of parameters. V2: Ma et al. 2018, table 8 ("our impl."), whose
# rounding is not published; 0.4 at 160 x 160, 0.75 at 192 x 192.
@pytest.mark.parametrize(
    ("file_name", "size", "published", "tolerance", "count"),
    [
        ("mobilenet_v1_0.25", 224, 41, 0.005, 0.5),
        ("mobilenet_v1_0.5", 224, 149, 0.005, 1.3),
        ("mobilenet_v1_0.75", 224, 325, 0.005, 2.6),
        ("mobilenet_v1_1.0", 224, 569, 0.005, 4.2),
        ("mobilenet_v2_0.15", 224, 39, 0.005, None),
        ("mobilenet_v2_0.4", 160, 43, 0.005, None),
        ("mobilenet_v2_0.6", 224, 141, 0.02, None),
        ("mobilenet_v2_0.75", 192, 145, 0.022, None),
        ("mobilenet_v2_1.0", 224, 301, 0.005, 3.5),
        ("mobilenet_v2_1.4", 224, 587, 0.01, None),
    ],
)
def test_costs_are_the_published_ones(
    file_name: str, size: int, published: int, tolerance: float, count: float | None
) -> None:
    with torch.device("meta"):
        network = ImageClassifier(
            build(file_name), 1000, parse_backbone(entry(file_name)).classifier or ClassifierOptions()
        )
    cost = multiply_adds(network, torch.zeros(1, 3, size, size, device="meta")) / 1e6
    assert cost == pytest.approx(published, rel=tolerance)
    if count is not None:
        assert round(parameters(network) / 1e6, 1) == count


@pytest.mark.parametrize(
    ("file_name", "changes", "message"),
    [
        ("mobilenet_v1_0.25", {"width": 0.3}, "no whole number"),
        ("mobilenet_v1_0.25", {"width": 0}, "above 0"),
        ("mobilenet_v1_0.25", {"activation": "swish"}, "activation=swish: expected relu or relu6"),
        ("mobilenet_v2_0.4", {"width": 0}, "above 0"),
        ("mobilenet_v2_0.4", {"multiple_of": 0}, "from 1 to"),
        ("mobilenet_v2_0.4", {"depth": 2}, "depth"),
    ],
)
def test_wrong_values_are_named(file_name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(file_name, **changes)
