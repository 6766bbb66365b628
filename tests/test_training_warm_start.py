"""A detector as the start of a training on other classes: its network, its rows by name, and what contradicts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scored_data import overrides_of

from detector import cli
from detector.data.preprocess import Preprocessing
from detector.errors import InputError
from detector.inference import shipped
from detector.inference.detector import Detector, read_checkpoint
from detector.models.build import NetworkOptions
from detector.training.run import TrainOptions
from detector.training.warm_start import FREE, find_start, matched, warm_start

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
LAYERS = ("head.class_logits.weight", "head.class_logits.bias", "head.box_deltas.weight", "head.box_deltas.bias")


def fresh(spec: dict[str, Any], *class_names: str) -> Detector:
    torch.manual_seed(1)
    return Detector(NetworkOptions.parse(spec), class_names, Preprocessing(short_side=64, long_side=96))


def trained(spec: dict[str, Any], excite: Any) -> Detector:
    start = fresh(spec, "cat", "dog", "bird")
    excite(start.network)
    return start


@pytest.mark.parametrize("class_agnostic", [True, False])
def test_the_same_classes_in_another_order_are_found_as_before(
    small_spec: dict[str, Any], excite: Any, class_agnostic: bool
) -> None:
    small_spec["light_head"]["class_agnostic"] = class_agnostic
    start, detector = trained(small_spec, excite), fresh(small_spec, "BIRD", "cat", "dog")
    warm_start(detector, start)
    before, after = (one.predict(IMAGE, score_threshold=0.0)[0] for one in (start, detector))
    assert [name.lower() for name in after.names] == before.names
    assert len({*before.names}) == 3
    np.testing.assert_allclose(after.boxes, before.boxes, atol=1e-3)
    np.testing.assert_allclose(after.scores, before.scores, atol=1e-6)


def test_rows_by_hand(small_spec: dict[str, Any], excite: Any) -> None:
    """Known classes and the background have their rows, a new one the mean beside its own; the rest is the start's."""
    small_spec["light_head"]["class_agnostic"] = False
    start, detector = trained(small_spec, excite), fresh(small_spec, "fish", "bird", "Cat", "cow")
    own = {key: value.clone() for key, value in detector.network.state_dict().items()}
    theirs = start.network.state_dict()
    table = warm_start(detector, start)
    for name, value in detector.network.state_dict().items():
        if name not in LAYERS:
            assert torch.equal(value, theirs[name]), name
            continue
        rows = 1 if "logits" in name else 4
        for label, there in enumerate((None, 2, 0, None)):
            for row in range(rows):
                expected = [theirs[name][k * rows + row] for k in range(3)]
                mean = sum(expected) / 3 + own[name][label * rows + row]
                wanted = mean if there is None else expected[there]
                torch.testing.assert_close(value[label * rows + row], wanted, msg=f"{name} {label} {row}")
    background = [state["head.class_logits.bias"][-1] for state in (detector.network.state_dict(), theirs)]
    assert background[0] == background[1] != 0
    assert [cell.strip() for cell in table.splitlines()[-1].split("|")[1:-1]] == [
        "classes", "background, 'bird', 'Cat'", "'fish', 'cow'", "'dog'",
    ]  # fmt: skip


def test_names_are_matched_as_written_first() -> None:
    assert matched(["cat", "CAT", "Dog", "tv"], ["Cat", "cat", "dog"]) == [1, 1, 2, None]
    assert matched(["Cat"], ["cat", "Cat"]) == [1]


def test_voc_and_coco_name_the_same_classes() -> None:
    """Four of VOC's 20 have another name in COCO, two are written in two words there."""
    voc = read_checkpoint(shipped.find("v2_0.5x_voc"))["detector"]["class_names"]
    coco = [
        "airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
        "horse", "motorcycle", "person", "potted plant", "sheep", "couch", "train", "tv",
    ]  # fmt: skip
    assert matched(coco, voc) == matched(voc, coco) == list(range(20))
    assert matched(["Dining-Table", "hot dog", "TV_monitor", "cattle"], voc) == [10, None, 19, None]


def test_free_options_exist_and_the_rest_of_the_spec_decides_the_network() -> None:
    for part, free in FREE.items():
        assert free < set(NetworkOptions().spec()[part])


@pytest.fixture
def ckpt(small_detector: Detector, tmp_path: Path) -> str:
    small_detector.provenance["config"] = {"backbone_name": "v2star_1x"}
    small_detector.save(tmp_path / "start.ckpt", half=True)
    return str(tmp_path / "start.ckpt")


def options(*words: str, recipe: str = "finetune") -> TrainOptions:
    composed: Any = cli.compose("train", [f"recipe={recipe}", *words]).options()
    return composed


def test_the_network_is_the_detectors_and_what_is_free_the_recipes(
    ckpt: str, small_spec: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        found, start = find_start(asked := options(f"ckpt={ckpt}", "rpn.nms_threshold=0.6", "backbone.weights=x.pth"))
    assert start is not None
    assert found.backbone.spec().items() >= small_spec["backbone"].items()
    assert found.neck.to_dict()["width"] == 16
    assert (found.rpn.channels, found.rpn.scales, found.rpn.nms_threshold) == (16, (16, 32, 64), 0.6)
    assert found.rpn.train_limits == asked.rpn.train_limits != start.options.rpn.train_limits
    assert (found.light_head.kernel_size, found.light_head.sampling) == (5, "random")
    assert found.input == asked.input
    assert found.backbone_name == "v2star_1x"
    assert "backbone.weights=x.pth is not read" in caplog.text
    # Half precision in the file, float32 here.
    warm_start(detector := Detector(found, ("dog",), found.input), start)
    assert {value.dtype for value in detector.network.state_dict().values()} == {torch.float32, torch.int64}
    assert found.backbone.weights is None


def test_what_contradicts_the_detector_is_named(ckpt: str) -> None:
    for words, said in (
        (["backbone=v2_0.5x"], r"backbone=v2_0\.5x asks for backbone\.stem_channels=24 and \d more, but it is 8"),
        (["neck=none"], r"neck=none asks for neck\.name=none and \d more, but it is cem"),
        (["rpn.scales=[16,32,128]"], r"rpn\.scales=\[16\.0, 32\.0, 128\.0\], but it is \[16\.0, 32\.0, 64\.0\]"),
        (["detector=light_head_l"], r"backbone\.dilate_c5=true and 2 more, but it is false"),
        (
            ["backbone=v2star_1x", "light_head={thin_channels:5}"],
            r"^light_head=.* asks for .*thin_channels=5, but it is 2",
        ),
    ):
        with pytest.raises(InputError, match=rf"{said} in the detector of ckpt=.*start\.ckpt, .*ckpt=null"):
            find_start(options(f"ckpt={ckpt}", *words))


def test_what_agrees_or_is_free_is_no_contradiction(ckpt: str, small_spec: dict[str, Any]) -> None:
    free = ["detector=light_head_s", "light_head.sampling=ohem", "freeze.stages=2", "light_head={nms_threshold: 0.4}"]
    found, start = find_start(options(f"ckpt={ckpt}", "backbone=v2star_1x", *overrides_of(small_spec), *free))
    assert start is not None
    assert (found.light_head.sampling, found.light_head.nms_threshold) == ("ohem", 0.4)


def test_v2_is_a_start_for_v2_star(ckpt: str, small_detector: Detector) -> None:
    found, start = find_start(options(f"ckpt={ckpt}", *overrides_of(
        {"backbone": small_detector.options.spec()["backbone"] | {"extra_depthwise": True}}
    )))  # fmt: skip
    assert start is not None
    detector = Detector(found, start.class_names, start.preprocessing)
    table = warm_start(detector, start)
    assert "the identity" in table
    assert any(".extra." in name for name in detector.network.state_dict())
    images = torch.from_numpy(IMAGE).permute(2, 0, 1)[None]
    before, after = (one.network.eval().features(images)[0] for one in (start, detector))
    torch.testing.assert_close(after, before)


def test_the_packages_detector_of_the_backbone(
    ckpt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    (tmp_path / "start.ckpt").rename(tmp_path / "v2star_1x_voc.ckpt")
    found, start = find_start(options("backbone=v2star_1x", "input.short_side=320"))
    assert start is not None
    assert (found.ckpt, found.neck.to_dict()["width"]) == ("v2star_1x_voc", 16)
    for words, why in (
        (["backbone=mobilenet_v2_1.0"], "this package has no detector with backbone=mobilenet_v2_1.0; from backbone."),
        (["backbone=v2star_1x", "neck=none"], "neck=none asks for neck.name=none"),
        (
            ["backbone=v2star_1x", "backbone.weights=null"],
            "backbone.weights=null is given; from random weights instead",
        ),
    ):
        caplog.clear()
        with caplog.at_level("INFO"):
            found, start = find_start(asked := options(*words))
        assert start is None
        assert found == asked.model_copy(update={"ckpt": None})
        (line,) = caplog.messages
        assert line.startswith(f"ckpt=auto: {why}")
    for recipe in ("demo", "voc", "paper"):
        assert options(recipe=recipe).ckpt is None
    assert cli.compose("benchmark", []).values["ckpt"] is None
