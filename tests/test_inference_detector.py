"""A detector as a user holds it: saved, loaded, and predicting on whatever an image comes as."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import detector as package
from detector.data.preprocess import Preprocessing
from detector.errors import InputError
from detector.export.parity import difference
from detector.inference.detections import Detections
from detector.inference.detector import FORMAT, VERSION, Detector
from detector.inference.operating_point import OperatingPoint
from detector.models.build import NetworkOptions
from detector.models.calibrate import calibrated
from detector.models.postprocess import FixedDetections
from detector.models.rpn import RPNOptions

SIZES = [(48, 70), (90, 60), (64, 64), (50, 75), (33, 100), (70, 48)]


@pytest.fixture
def pictures() -> list[np.ndarray]:
    """Images of coarse noise, (h, w, 3)."""
    rng = np.random.default_rng(0)
    found = []
    for height, width in SIZES:
        coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        found.append(np.ascontiguousarray(coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]))
    return found


@pytest.fixture
def folder(tmp_path: Path, pictures: list[np.ndarray]) -> Path:
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path / "pictures"


def assert_same(found: list[Detections], expected: list[Detections], *, tolerance: float = 0.0) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.labels.tolist() == b.labels.tolist()
        np.testing.assert_allclose(a.boxes, b.boxes, rtol=tolerance, atol=100 * tolerance)
        np.testing.assert_allclose(a.scores, b.scores, rtol=tolerance, atol=tolerance)
        assert a.image_size == b.image_size


def test_save_and_load_predict_the_same(small_detector: Detector, pictures: list[np.ndarray], tmp_path: Path) -> None:
    small_detector.save(tmp_path / "a.ckpt")
    loaded = Detector.load(tmp_path / "a.ckpt", "cpu", fused=False)
    assert_same(loaded.predict(pictures, score_threshold=0), small_detector.predict(pictures, score_threshold=0))
    assert loaded.class_names == ("cat", "dog", "bird")
    assert loaded.preprocessing == Preprocessing(short_side=64, long_side=96)
    assert loaded.provenance == {"epoch": 3}
    assert loaded.describe() == small_detector.describe()
    assert loaded.device == torch.device("cpu")
    loaded.save(tmp_path / "b.ckpt")
    first, second = (torch.load(tmp_path / name)["state_dict"] for name in ("a.ckpt", "b.ckpt"))
    assert all(torch.equal(first[key], second[key]) for key in first.keys() | second.keys())


def test_fused_equals_unfused(small_detector: Detector, pictures: list[np.ndarray], tmp_path: Path) -> None:
    small_detector.save(tmp_path / "a.ckpt")
    fused = Detector.load(tmp_path / "a.ckpt", "cpu")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.network.modules())
    expected = small_detector.predict(pictures, score_threshold=0.05)
    assert sum(map(len, expected)) > 20
    assert_same(fused.predict(pictures, score_threshold=0.05), expected, tolerance=1e-4)
    with pytest.raises(InputError, match="fused=False"):
        fused.save(tmp_path / "b.ckpt")
    assert not (tmp_path / "b.ckpt").exists()


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or type(value) in (str, int, float, bool)


def test_the_file_holds_plain_data_only(small_detector: Detector, tmp_path: Path) -> None:
    small_detector.save(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(content) == {"detector", "state_dict"}
    assert plain(content["detector"])
    assert {type(value) for value in content["state_dict"].values()} == {torch.Tensor}
    assert all(key.startswith("network.") for key in content["state_dict"])
    assert content["detector"]["format"] == FORMAT
    assert content["detector"]["class_names"] == ["cat", "dog", "bird"]


def test_loading_runs_no_code(tmp_path: Path, small_detector: Detector) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    about = small_detector.describe()
    torch.save({"detector": about | {"provenance": Trap()}, "state_dict": {}}, tmp_path / "trap.ckpt")
    with pytest.raises(InputError, match=r"trap\.ckpt"):
        Detector.load(tmp_path / "trap.ckpt")
    assert not (tmp_path / "sprung").exists()


def test_an_option_that_an_older_checkpoint_lacks_keeps_its_old_meaning(
    small_detector: Detector, tmp_path: Path
) -> None:
    """Checkpoints that know nothing of rpn.inside_only were trained on all anchors; the default is the paper's."""
    small_detector.save(tmp_path / "old.ckpt")
    content = torch.load(tmp_path / "old.ckpt", weights_only=True)
    recorded = content["detector"]["spec"]["rpn"]
    del recorded["inside_only"]
    content["detector"]["provenance"]["config"] = {"rpn": dict(recorded)}
    torch.save(content, tmp_path / "old.ckpt")
    detector = Detector.load(tmp_path / "old.ckpt", fused=False)
    assert detector.options.rpn.inside_only is False
    assert detector.provenance["config"]["rpn"]["inside_only"] is False
    assert RPNOptions().inside_only is True


def test_a_failed_save_leaves_the_old_file(
    small_detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    small_detector.save(path)
    before = path.read_bytes()

    def full(_: Any, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        small_detector.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_saved_file_can_be_read_by_whom_the_umask_allows(small_detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    small_detector.save(tmp_path / "new" / "a.ckpt")
    assert (tmp_path / "new" / "a.ckpt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def spoil(content: dict[str, Any], how: str) -> Any:
    about, state = content["detector"], content["state_dict"]
    if how == "newer":
        about["version"] = VERSION + 1
    elif how == "no version":
        del about["version"]
    elif how == "other format":
        about["format"] = "another"
    elif how == "no spec":
        del about["spec"]
    elif how == "unknown part":
        about["spec"]["neck"] = {"name": "giraffe"}
    elif how == "unknown input":
        about["preprocessing"] = {"side": 3}
    elif how == "half an input":
        del about["preprocessing"]["long_side"]
    elif how == "another class count":
        about["class_names"] = ["cat"]
    elif how == "a class without a name":
        about["class_names"][0] = 3
    elif how == "provenance":
        about["provenance"] = 0.5
    elif how == "missing weight":
        del state[next(iter(state))]
    elif how == "no weights":
        content["state_dict"] = None
    elif how == "bare weights":
        return state
    elif how == "a list":
        return [1, 2]
    return content


@pytest.mark.parametrize(
    "how",
    [
        "newer",
        "no version",
        "other format",
        "no spec",
        "unknown part",
        "unknown input",
        "half an input",
        "another class count",
        "a class without a name",
        "provenance",
        "missing weight",
        "no weights",
        "bare weights",
        "a list",
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(small_detector: Detector, tmp_path: Path, how: str) -> None:
    path = tmp_path / "bad.ckpt"
    small_detector.save(path)
    torch.save(spoil(torch.load(path), how), path)
    with pytest.raises(InputError, match=r"bad\.ckpt") as error:
        Detector.load(path)
    assert len(str(error.value)) < 700
    if how == "newer":
        assert "update" in str(error.value)


def test_boxes_that_are_not_finite_are_not_given_out(small_detector: Detector) -> None:
    with torch.no_grad():
        small_detector.network.head.box_deltas.bias[:] = float("nan")
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with pytest.raises(InputError, match="not finite"):
        small_detector.predict(image, score_threshold=0)


def test_classes_without_a_name_are_not_given_out(small_detector: Detector, pictures: list[np.ndarray]) -> None:
    """As of an export whose metadata somebody has edited."""
    labels = {label for found in small_detector.predict(pictures, score_threshold=0) for label in found.labels.tolist()}
    small_detector.class_names = small_detector.class_names[: max(labels)]
    with pytest.raises(InputError, match=f"class {max(labels)}, and only {max(labels)} classes have names"):
        small_detector.predict(pictures, score_threshold=0)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02.", b"PK\x03\x04 not a zip", bytes(range(256)) * 4])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.ckpt").write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.ckpt"):
        Detector.load(tmp_path / "bad.ckpt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_never_show_a_traceback(small_detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "bad.ckpt"
    small_detector.save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    contents = [whole[: int(rng.integers(len(whole)))] for _ in range(10)] + [rng.bytes(100) for _ in range(200)]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.ckpt"):
            Detector.load(path)


def test_a_missing_checkpoint_and_a_missing_device_are_named(small_detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.ckpt"):
        Detector.load(tmp_path / "nowhere.ckpt")
    with pytest.raises(InputError, match=str(tmp_path)):
        Detector.load(tmp_path)
    with pytest.raises(InputError, match="toaster"):
        small_detector.to("toaster")


def test_a_detector_needs_classes(small_spec: dict) -> None:
    with pytest.raises(InputError, match="class name"):
        Detector(NetworkOptions.parse(small_spec), [], Preprocessing(short_side=64, long_side=96))


def test_every_kind_of_source_agrees(small_detector: Detector, pictures: list[np.ndarray], folder: Path) -> None:
    def predict(source: Any, **options: Any) -> list[Detections]:
        return small_detector.predict(source, score_threshold=0.05, **options)

    paths = sorted(folder.iterdir())
    expected = predict(pictures)
    assert len(expected) == len(pictures)
    assert min(map(len, expected)) > 0
    assert_same(predict(folder), expected)
    assert_same(predict(str(folder)), expected)
    assert_same(predict([folder]), expected)
    assert_same(predict(paths), expected)
    assert_same(predict(tuple(map(str, paths))), expected)
    assert_same(predict([Image.fromarray(picture) for picture in pictures]), expected)
    assert_same(predict([picture[..., ::-1] for picture in pictures], bgr=True), expected)
    assert_same(predict([torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]), expected)
    assert_same(predict([torch.from_numpy(picture / 255.0).permute(2, 0, 1) for picture in pictures]), expected)
    assert_same(predict([paths[0], pictures[1], Image.fromarray(pictures[2])]), expected[:3], tolerance=1e-4)
    for single in (paths[0], str(paths[0]), pictures[0], Image.fromarray(pictures[0])):
        assert isinstance(predict(single), list)
        assert_same(predict(single), expected[:1], tolerance=1e-4)
    assert [found.path for found in predict(folder)] == list(map(str, paths))
    assert predict(pictures[0])[0].path is None
    assert predict([]) == []


def test_channel_order_matters(small_detector: Detector, pictures: list[np.ndarray]) -> None:
    [right] = small_detector.predict(pictures[0], score_threshold=0)
    [wrong] = small_detector.predict(pictures[0], score_threshold=0, bgr=True)
    assert right.scores.tolist() != wrong.scores.tolist()


def test_results_are_sorted_and_inside_the_image(small_detector: Detector, pictures: list[np.ndarray]) -> None:
    for found, picture in zip(small_detector.predict(pictures, score_threshold=0), pictures, strict=True):
        height, width = picture.shape[:2]
        assert found.image_size == (height, width)
        assert (np.diff(found.scores) <= 0).all()
        assert (found.boxes >= 0).all()
        assert (found.boxes <= [width, height, width, height]).all()
        assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
        assert found.class_names == ("cat", "dog", "bird")
        assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int64)


def test_bfloat16_finds_nearly_the_same(small_detector: Detector, pictures: list[np.ndarray], tmp_path: Path) -> None:
    small_detector.save(tmp_path / "a.ckpt")
    exact = package.load(tmp_path / "a.ckpt", "cpu").predict(pictures, score_threshold=0.2)
    rounded = package.load(tmp_path / "a.ckpt", "cpu", precision="bf16")
    assert rounded.network.head.hidden.weight.dtype == torch.bfloat16
    found = rounded.predict(pictures, score_threshold=0.1)
    gaps = [difference(x, y) for x, y in zip(exact, found, strict=True)]
    # Of a network drawn at random, whose logits are excited; rounding moves what is near a tie.
    assert sum(gap.partners for gap in gaps) > 0.9 * sum(gap.total for gap in gaps) > 20
    assert 0 < np.median([gap.score for gap in gaps]) < 0.1
    assert found[0].boxes.dtype == found[0].scores.dtype == np.float32
    with pytest.raises(InputError, match="precision='int4': expected float32 or bf16"):
        package.load(tmp_path / "a.ckpt", precision="int4")
    with pytest.raises(InputError, match="precision=bf16: that of an export was fixed"):
        package.predict(pictures, ckpt="a.onnx", precision="bf16")


def test_what_scores_are_worth_goes_with_the_checkpoint(
    small_detector: Detector, pictures: list[np.ndarray], tmp_path: Path
) -> None:
    raw = small_detector.predict(pictures, score_threshold=0)
    small_detector.operating_point = OperatingPoint(calibration=(0.5, -0.2), thresholds=(0.1, 0.2, 0.3))
    small_detector.save(tmp_path / "a.ckpt")
    for fused in (False, True):
        loaded = Detector.load(tmp_path / "a.ckpt", "cpu", fused=fused)
        assert loaded.operating_point == small_detector.operating_point
        for a, b in zip(loaded.predict(pictures, score_threshold=0), raw, strict=True):
            np.testing.assert_allclose(a.scores, calibrated(b.scores.astype(float), 0.5, -0.2), rtol=1e-3)
        shown = loaded.predict(pictures)
        assert 0 < sum(map(len, shown)) < sum(map(len, raw))
        assert all((found.scores >= np.float32([0.1, 0.2, 0.3])[found.labels]).all() for found in shown)
    for odd in ({"thresholds": [0.5]}, {"calibration": [0, 0]}, {"calibration": [1.0]}, {"thresholds": [2, 0, 0]}, 7):
        checkpoint = torch.load(tmp_path / "a.ckpt")
        checkpoint["detector"]["operating_point"] = odd
        torch.save(checkpoint, tmp_path / "b.ckpt")
        with pytest.raises(InputError, match="own description"):
            Detector.load(tmp_path / "b.ckpt")


def test_score_threshold_only_leaves_out(small_detector: Detector, pictures: list[np.ndarray]) -> None:
    everything = small_detector.predict(pictures, score_threshold=0)
    assert_same(small_detector.predict(pictures, score_threshold=0.4), [found.above(0.4) for found in everything])
    assert 0 < sum(len(found.above(0.4)) for found in everything) < sum(map(len, everything))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batch_size_and_batch_mates_change_nothing(
    small_detector: Detector, pictures: list[np.ndarray], batch_size: int
) -> None:
    alone = [small_detector.predict(picture, score_threshold=0.01)[0] for picture in pictures]
    found = small_detector.predict(pictures, score_threshold=0.01, batch_size=batch_size)
    assert_same(found, alone, tolerance=1e-4)
    backwards = small_detector.predict(pictures[::-1], score_threshold=0.01, batch_size=batch_size)
    assert_same(backwards[::-1], alone, tolerance=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (700, 2), (3000, 20)])
def test_extreme_images_are_predicted(small_detector: Detector, size: tuple[int, int]) -> None:
    [found] = small_detector.predict(np.full((*size, 3), 90, np.uint8), score_threshold=0)
    assert found.image_size == size
    assert np.isfinite(found.boxes).all()
    assert (found.boxes[:, 2:] <= [size[1], size[0]]).all()


def test_a_batch_size_of_nothing_is_refused(small_detector: Detector) -> None:
    with pytest.raises(InputError, match="batch_size=0"):
        small_detector.predict([], batch_size=0)


def test_stream_reads_one_batch_at_a_time(small_detector: Detector, folder: Path) -> None:
    (folder / "9.png").write_bytes(b"not a picture")
    stream = small_detector.stream(folder, batch_size=2)
    first = [next(stream) for _ in range(6)]
    assert [Path(str(found.path)).name for found in first] == [f"{i}.png" for i in range(6)]
    with pytest.raises(InputError, match=r"9\.png"):
        next(stream)


class KnownBoxes(nn.Module):
    """A network that finds the bright rectangle of each image, in pixels of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.sizes: list[tuple[int, int]] = []

    def detect(self, images: torch.Tensor, image_sizes: torch.Tensor, _: int | None) -> FixedDetections:
        boxes = []
        for image, size in zip(images, image_sizes.tolist(), strict=True):
            self.sizes.append(tuple(size))
            rows, columns = (image.float().mean(0) > 200).nonzero().unbind(1)
            box = torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)).float()
            boxes.append(box)
        one = torch.ones(len(boxes), 1)
        return FixedDetections(torch.stack(boxes)[:, None], 0.9 * one, one.long(), one[:, 0].long())


@pytest.mark.parametrize("size", [(60, 80), (300, 200), (64, 64), (45, 210), (640, 480)])
def test_boxes_are_in_pixels_of_the_original_image(small_detector: Detector, size: tuple[int, int]) -> None:
    small_detector.network = KnownBoxes()  # type: ignore[assignment]
    height, width = size
    box = np.array([width * 0.25, height * 0.5, width * 0.75, height]).round()
    picture = np.zeros((height, width, 3), np.uint8)
    picture[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = 255
    [found] = small_detector.predict(picture)
    target = Preprocessing(short_side=64, long_side=96).target_size(height, width)
    assert small_detector.network.sizes == [target]
    # Half a pixel of the network's input.
    np.testing.assert_allclose(found.boxes[0], box, atol=0.75 * max(height / target[0], width / target[1]))
    assert found.names == ["dog"]


def test_prediction_is_in_evaluation_mode_without_gradients(
    small_detector: Detector, pictures: list[np.ndarray]
) -> None:
    expected = small_detector.predict(pictures, score_threshold=0)
    small_detector.network.train()
    before = {key: value.clone() for key, value in small_detector.network.state_dict().items()}
    assert_same(small_detector.predict(pictures, score_threshold=0), expected)
    assert all(torch.equal(value, before[key]) for key, value in small_detector.network.state_dict().items())


def test_module_level_load_and_predict(small_detector: Detector, folder: Path, tmp_path: Path) -> None:
    small_detector.save(tmp_path / "a.ckpt")
    expected = package.load(tmp_path / "a.ckpt", "cpu").predict(folder, score_threshold=0.1)
    assert_same(package.predict(folder, ckpt=tmp_path / "a.ckpt", device="cpu", score_threshold=0.1), expected)
