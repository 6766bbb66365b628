"""Detectors of the package: found by name, written small, used where none is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import detector as package
from detector.apps.evaluate import _load
from detector.apps.export import ExportOptions, calibration_images, export
from detector.apps.scoring import EvalOptions
from detector.errors import InputError
from detector.inference import shipped
from detector.inference.detector import Detector, read_torch_file

CONFIG = {
    "data": {"root": "/mnt/me/voc"}, "overrides": ["data.root=/mnt/me/voc"], "run_dir": "runs/a", "seed": 0,
    "backbone": {"name": "shufflenet_v2", "weights": "/mnt/me/a.pth"}, "schedule": {"epochs": 12},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where detectors of the package lie, and work goes on elsewhere; empty."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "weights"


def test_a_file_is_itself_and_a_name_is_that_of_the_package(folder: Path) -> None:
    with pytest.raises(InputError, match=r"No checkpoint at 'v2_1x_voc'\..*holds no trained detector"):
        shipped.find(shipped.DEFAULT)
    folder.mkdir()
    for name in ("v2_0.5x_voc", "v2_1x_voc"):
        (folder / f"{name}.ckpt").touch()
    assert shipped.find("v2_0.5x_voc") == folder / "v2_0.5x_voc.ckpt"
    assert shipped.folder_for("v2_0.5x_voc") == Path("runs/v2_0.5x_voc")
    with pytest.raises(InputError, match=r"No checkpoint at 'v3'.*v2_0\.5x_voc, v2_1x_voc"):
        shipped.find("v3")
    with pytest.raises(InputError, match="No checkpoint"):
        shipped.find("../weights/v2_1x_voc")
    with pytest.raises(InputError, match="No checkpoint at 'aaa"):
        shipped.find("a" * 5000)  # longer than the name of a file may be
    with pytest.raises(InputError, match="No checkpoint at 'aaa"):
        read_torch_file("a" * 5000)
    Path("v2_1x_voc").touch()  # the user's own
    assert shipped.find("v2_1x_voc") == Path("v2_1x_voc")
    assert shipped.folder_for("v2_1x_voc") == Path()


def test_half_precision_finds_the_same_boxes(small_detector: Detector, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole.ckpt", tmp_path / "half.ckpt"
    small_detector.save(whole)
    small_detector.save(half, half=True)
    assert half.stat().st_size < 0.75 * whole.stat().st_size  # of a network so small, descriptions are a third
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    a, b = (Detector.load(path, "cpu", fused=False) for path in (whole, half))
    assert {weights.dtype for weights in b.network.state_dict().values()} == {torch.float32, torch.int64}
    for (name, one), other in zip(a.network.state_dict().items(), b.network.state_dict().values(), strict=True):
        if one.ndim < 2:
            assert torch.equal(one, other), name
        else:  # 11 bits, and a fixed step below 2 ** -14
            assert ((one - other).abs() <= one.abs() * 2**-11 + 2**-25).all(), name
    expected, found = (one.predict(image, score_threshold=0.2)[0] for one in (a, b))
    assert len(expected) > 5
    assert found.labels.tolist() == expected.labels.tolist()
    # Measured: 0.12 pixels and 0.0012. Trained weights lose less: these are drawn at random, and excited.
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.3)
    np.testing.assert_allclose(found.scores, expected.scores, atol=0.01)


def test_what_half_precision_cannot_hold_stays_as_it_is(small_detector: Detector, tmp_path: Path) -> None:
    weight = small_detector.network.head.hidden.weight
    with torch.no_grad():
        weight[0, 0] = 1e6
    norm = next(module for module in small_detector.network.modules() if isinstance(module, nn.BatchNorm2d))
    norm.running_var[:2] = torch.tensor([1e-9, 1e6])
    small_detector.save(tmp_path / "half.ckpt", half=True)
    held = Detector.load(tmp_path / "half.ckpt", "cpu", fused=False).network
    assert torch.equal(held.head.hidden.weight, weight)
    read = next(module for module in held.modules() if isinstance(module, nn.BatchNorm2d))
    assert torch.equal(read.running_var, norm.running_var)


def test_a_run_becomes_a_detector_that_is_used_by_name(
    small_detector: Detector, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_detector.provenance = {"config": CONFIG, "epoch": 11, "torch": "2.9", "metrics": {"AP": 0.9}}
    small_detector.save("run.ckpt")
    path = folder / f"{shipped.DEFAULT}.ckpt"
    export(ExportOptions(ckpt="run.ckpt", format="checkpoint", out=str(path), check=None))
    held = torch.load(path)
    assert held.keys() == {"detector", "state_dict"}
    assert held["detector"]["provenance"] == {
        "config": {"seed": 0, "backbone": {"name": "shufflenet_v2"}, "schedule": {"epochs": 12}},
        "epoch": 11,
        "torch": "2.9",
    }
    assert b"/mnt" not in path.read_bytes()

    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    [expected] = package.predict(image, ckpt=path, device="cpu")
    for found in (package.predict(image, device="cpu"), package.load(device="cpu").predict(image)):
        assert found[0].to_json() == expected.to_json()
    scored = _load(EvalOptions(ckpt=shipped.DEFAULT))
    assert scored is not None
    assert scored.class_names == small_detector.class_names
    with caplog.at_level("INFO"):
        export(ExportOptions(format="checkpoint"))
    assert Path(f"runs/{shipped.DEFAULT}/{shipped.DEFAULT}.half.ckpt").is_file()
    assert "Nothing is compared" in caplog.text


def test_an_export_does_not_replace_its_checkpoint(small_detector: Detector, folder: Path) -> None:
    small_detector.save("run.ckpt")
    before = Path("run.ckpt").read_bytes()
    with pytest.raises(InputError, match=r"out=run\.ckpt: is the file that is read, and would be replaced"):
        export(ExportOptions(ckpt="run.ckpt", format="checkpoint", out="./run.ckpt", check=None))
    assert Path("run.ckpt").read_bytes() == before
    Path("run.ckpt").rename("run.bin")  # OpenVINO's second file
    with pytest.raises(InputError, match=r"out=run\.bin: is the file that is read"):
        export(ExportOptions(ckpt="run.bin", format="openvino", out="run.xml", check=None))
    assert Path("run.bin").read_bytes() == before


def test_the_remedy_for_int8_without_training_images_is_one(small_detector: Detector, folder: Path) -> None:
    small_detector.provenance = {}
    for given in ({}, {"data": {"root": "photographs"}}):
        options = ExportOptions.parse({"format": "int8", **given})
        with pytest.raises(InputError, match=r"calibration is missing: .*; give calibration=FOLDER") as error:
            calibration_images(options, small_detector)
        assert "data.root" not in str(error.value)
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    _, items = calibration_images(ExportOptions(format="int8", calibration=str(folder)), small_detector)
    assert items == [folder / "a.png"]
