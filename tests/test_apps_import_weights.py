"""tools/import_weights.py as a user runs it: what it writes, what it says, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from test_models_backbones_key_maps import CLASSES, authors
from tool_runner import ROOT, run_tool

from detector.models.backbones import Backbone, build_backbone, parse_backbone
from detector.models.backbones.classifier import ImageClassifier
from detector.models.backbones.contract import ClassifierOptions
from detector.models.backbones.pretrained import load_weights


def build(name: str, **changes: Any) -> Backbone:
    entry = yaml.safe_load((ROOT / "conf" / "backbone" / f"{name}.yaml").read_text())
    return build_backbone(parse_backbone(entry | changes))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "x0_5.pth"
    torch.save(torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict(), path)
    return path


def test_what_it_writes_is_what_training_takes(published: Path, tmp_path: Path) -> None:
    done = run_tool(
        "import_weights", f"source={published}", "backbone=v2star_0.5x", "out=new/star.pth", cwd=tmp_path
    ).ok()
    for text in (
        "330",
        "matched",
        "ignored (classifier)",
        "conv5.1 (5)",
        "96",
        "start as the identity",
        "input: rgb_i",
    ):
        assert text in done.err, done.err
    content = torch.load(tmp_path / "new" / "star.pth", weights_only=True)
    original = torch.load(published, weights_only=True)
    assert all(torch.equal(content[key], value) for key, value in original.items())  # conv5 and fc too
    assert sum(".extra." in key for key in content) == len(content) - len(original) == 96
    star = build("v2star_0.5x")
    assert load_weights(star, tmp_path / "new" / "star.pth").kept == ()  # a whole V2* now
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["star.pth"]


@pytest.mark.slow
def test_the_authors_file_becomes_a_classifier_of_ours(tmp_path: Path) -> None:
    theirs = authors("1x")
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "authors.pth.tar")
    arguments = ("source=authors.pth.tar", "backbone=v2_1x", "out=ours.pth")
    refused = run_tool("import_weights", *arguments, cwd=tmp_path).error()
    assert "Add backbone.layout=paper" in refused
    assert not (tmp_path / "ours.pth").exists()

    done = run_tool("import_weights", *arguments, "backbone.layout=paper", "input=rgb_imagenet", cwd=tmp_path).ok()
    assert "the authors' ShuffleNet V2" in done.err
    assert "conv_last.1 (5)" in done.err
    content = torch.load(tmp_path / "ours.pth", weights_only=True)
    classifier = ImageClassifier(build("v2_1x", layout="paper"), CLASSES, ClassifierOptions(conv5_channels=1024))
    classifier.load_state_dict(
        {key if key.startswith(("conv5.", "fc.")) else f"backbone.{key}": value for key, value in content.items()}
    )
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, got = theirs.float()(images)[1], classifier.eval()(images)
    assert torch.allclose(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())

    run_tool("import_weights", *arguments, "backbone.layout=paper", cwd=tmp_path).ok()
    raw = torch.load(tmp_path / "ours.pth", weights_only=True)
    changed = {key for key, value in content.items() if not torch.equal(value, raw[key])}
    assert changed == {"conv1.0.weight", "conv1.1.running_mean"}  # bgr255 is what these files are


@pytest.mark.slow
def test_a_partial_match_needs_to_be_asked_for(published: Path, tmp_path: Path) -> None:
    content = torch.load(published, weights_only=True)
    del content["stage4.3.branch2.5.weight"]
    content["stage2.0.branch1.0.weight"] = torch.zeros(7, 1, 3, 3)
    content["surplus"] = torch.zeros(1)
    torch.save(content, tmp_path / "gap.pth")
    arguments = ("source=gap.pth", "backbone=v2_0.5x", "out=out.pth")
    refused = run_tool("import_weights", *arguments, cwd=tmp_path)
    for text in (
        "stage4.3.branch2.5.weight is missing, expected (96, 96, 1, 1)",
        "stage2.0.branch1.0.weight is (7, 1, 3, 3), expected (24, 1, 3, 3)",
        "surplus has no place here",
    ):
        assert text in refused.err
    assert "3 tensors do not fit" in refused.error()
    assert "partial=true" in refused.error()
    assert not (tmp_path / "out.pth").exists()

    done = run_tool("import_weights", *arguments, "partial=true", cwd=tmp_path).ok()
    assert "start at random" in done.err
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert torch.equal(written["stage4.3.branch2.0.weight"], content["stage4.3.branch2.0.weight"])
    assert written["stage2.0.branch1.0.weight"].shape == (24, 1, 3, 3)
    assert "surplus" not in written


def test_help_and_mistakes(published: Path, tmp_path: Path) -> None:
    arguments = (f"source={published}", "backbone=v2_0.5x", "out=out.pth")
    assert "source is missing" in run_tool("import_weights", "out=out.pth", cwd=tmp_path).error()
    assert (
        "input=bgr: expected rgb_imagenet or bgr255"
        in run_tool("import_weights", *arguments, "input=bgr", cwd=tmp_path).error()
    )
    before = published.read_bytes()
    arguments = (f"source={published}", "backbone=v2_0.5x", f"out=./{published.name}")
    refused = run_tool("import_weights", *arguments, cwd=tmp_path).error()
    assert f"out=./{published.name}: is the file that is read" in refused
    assert published.read_bytes() == before
    shown = run_tool("import_weights", "--help", cwd=tmp_path).ok().out
    assert "backbone.layout=paper" in shown
    assert "[v2_1x]" in shown
    assert not (tmp_path / "out.pth").exists()
