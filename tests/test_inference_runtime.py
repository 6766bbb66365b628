"""Predicting on an export: without torch, and with errors that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import detector as package
from detector.data.preprocess import Preprocessing
from detector.errors import InputError
from detector.export import formats
from detector.inference import runtime
from detector.inference.detections import Detections
from detector.inference.detector import Detector
from detector.inference.export_info import ExportInfo
from detector.inference.runtime import ExportedDetector, is_export

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ROOT = Path(__file__).resolve().parents[1]
# Predicts in a process where importing torch is an error, and prints what was found.
WITHOUT_TORCH = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ImportError(f"{{name}} is refused", name=name)

sys.meta_path.insert(0, Refuse())
import detector

[found] = detector.predict({image!r}, ckpt={path!r}, score_threshold=0.05, threads=1)
assert "torch" not in sys.modules
print(json.dumps(found.to_dict()))
"""


@pytest.fixture
def fixed(small_onnx: Callable[..., Path]) -> Path:
    """The small detector as ONNX for one image of 64 x 96."""
    return small_onnx(batch=1, canvas=(64, 96))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    coarse = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    Image.fromarray(coarse.repeat(8, axis=0).repeat(8, axis=1)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def run_without(refused: set[str], path: Path, picture: Path) -> subprocess.CompletedProcess[str]:
    code = WITHOUT_TORCH.format(refused=refused, image=str(picture), path=str(path))
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def check_without_torch(detector: Detector, path: Path, picture: Path) -> None:
    outcome = run_without({"torch", "torchvision", "onnx", "onnxscript"}, path, picture)
    assert outcome.returncode == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    [expected] = detector.predict(picture, score_threshold=0.05)
    assert len(expected) > 3
    assert found["names"] == expected.names
    np.testing.assert_allclose(found["boxes"], expected.boxes, atol=0.02)
    np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-4)


def test_onnx_predicts_where_torch_cannot_be_imported(small_detector: Detector, fixed: Path, picture: Path) -> None:
    check_without_torch(small_detector, fixed, picture)


@pytest.mark.slow
def test_openvino_predicts_where_torch_cannot_be_imported(
    small_detector: Detector, small_onnx: Callable[..., Path], tmp_path: Path, picture: Path
) -> None:
    pytest.importorskip("openvino")
    formats.export_openvino(small_detector, tmp_path / "a.xml", small_onnx())
    check_without_torch(small_detector, tmp_path / "a.xml", picture)


def test_a_missing_runtime_is_named_with_its_extra(fixed: Path, picture: Path) -> None:
    outcome = run_without({"onnxruntime"}, fixed, picture)
    assert "detector.errors.InputError" in outcome.stderr
    assert "onnxruntime, which is not installed: pip install 'light-head-detector[onnx]'" in outcome.stderr
    program = picture.with_suffix(".pt2")
    program.write_bytes(b"")
    outcome = run_without({"torch", "torchvision"}, program, picture)
    assert "detector.errors.InputError" in outcome.stderr
    assert "torchvision, which is not installed: pip install torch torchvision" in outcome.stderr


def test_load_chooses_by_the_kind_of_file(small_detector: Detector, fixed: Path, tmp_path: Path) -> None:
    small_detector.save(tmp_path / "a.ckpt")
    assert isinstance(package.load(fixed), ExportedDetector)
    assert isinstance(package.load(tmp_path / "a.ckpt", "cpu"), Detector)
    assert [is_export(name) for name in ("a.onnx", "a.xml", "a.pt2", "a.ckpt", "a.pt")] == [True] * 3 + [False] * 2


def rewritten(source: Path, target: Path, **properties: str | None) -> Path:
    """A copy of an ONNX file with other metadata."""
    model = onnx.load(source)
    kept = {entry.key: entry.value for entry in model.metadata_props} | properties
    del model.metadata_props[:]
    for key, value in kept.items():
        if value is not None:
            model.metadata_props.add(key=key, value=value)
    onnx.save(model, str(target))
    return target


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({"format": "other"}, "no export of this project"),
        ({"format": None}, "no export of this project"),
        ({"version": "99"}, "export version 99; this package reads 2: update it"),
        ({"version": "1"}, "export version 1; this package reads 2: export the checkpoint again"),
        ({"class_names": None}, "is damaged: its metadata"),
        ({"class_names": "["}, "is damaged: its metadata"),
        ({"preprocessing": '{"short_side": 9}'}, "is damaged: its metadata"),
        ({"input": '{"batch": 1, "height": 96, "width": null}'}, "input.height=96, input.width=None"),
        ({"input": '{"batch": 1, "height": 1e400, "width": 96}'}, "input.height=.*: expected"),
        ({"input": '{"batch": 1, "height": 4611686018427387904, "width": 96}'}, "input.height=.*: expected"),
        ({"input": '{"batch": true, "height": 96, "width": 96}'}, "input.batch=true: expected"),
    ],
)
def test_files_that_are_not_ours(fixed: Path, tmp_path: Path, properties: dict[str, str], message: str) -> None:
    path = rewritten(fixed, tmp_path / "other.onnx", **properties)
    with pytest.raises(InputError, match=message) as caught:
        ExportedDetector.load(path)
    assert "other.onnx" in str(caught.value)


@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".pt2"])
def test_damaged_and_missing_files(fixed: Path, tmp_path: Path, suffix: str) -> None:
    if suffix == ".xml":
        pytest.importorskip("openvino")
        (tmp_path / "a.bin").write_bytes(b"")
    path = tmp_path / f"a{suffix}"
    with pytest.raises(InputError, match="No exported detector"):
        ExportedDetector.load(path)
    for content in (b"", b"nonsense", fixed.read_bytes()[:5000]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"a\{suffix}'"):
            ExportedDetector.load(path)


def test_a_graph_that_loads_but_cannot_run(fixed: Path, picture: Path, tmp_path: Path) -> None:
    """As a changed byte may make it: here an index that is in no image."""
    model = onnx.load(fixed)
    [last] = [node for node in model.graph.node if "counts" in node.output]
    last.output[list(last.output).index("counts")] = "before"
    model.graph.initializer.append(onnx.helper.make_tensor("far", onnx.TensorProto.INT64, [1], [10**6]))
    model.graph.node.append(onnx.helper.make_node("Gather", ["before", "far"], ["counts"]))
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    loaded = ExportedDetector.load(path)
    with pytest.raises(InputError, match=r"changed\.onnx' could not be run .*out of data bounds.*export it again"):
        loaded.predict(picture)


@pytest.mark.slow
def test_an_openvino_graph_that_cannot_be_compiled_or_run(
    small_detector: Detector, fixed: Path, tmp_path: Path, picture: Path
) -> None:
    pytest.importorskip("openvino")
    path = tmp_path / "changed.xml"
    formats.export_openvino(small_detector, path, fixed, batch=1, canvas=(64, 96))
    content = path.read_text()
    assert 'names="labels"' in content
    path.write_text(content.replace('names="labels"', 'names="lost"'))
    loaded = ExportedDetector.load(path)
    with pytest.raises(InputError, match=r"changed\.xml' could not be run .*labels.*export it again"):
        loaded.predict(picture)
    path.write_text(content.replace('strides="1, 1"', 'strides="7, -1"'))
    with pytest.raises(InputError, match=r"changed\.xml' cannot be read as an OpenVINO model: it is damaged"):
        ExportedDetector.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"threads": 0}, "threads=0"), ({"device": "cuda"}, "no such device"), ({"device": "toaster"}, "toaster")],
)
def test_options_that_cannot_be_had(fixed: Path, options: dict[str, object], message: str) -> None:
    import onnxruntime

    if options.get("device") == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(InputError, match=message):
        ExportedDetector.load(fixed, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "index"), [("cuda", 0), ("gpu", 0), ("cuda:1", 1), ("cuda:x", None), ("cuda:", 0), ("cuda:-1", None)]
)
def test_onnx_runtime_takes_the_gpu_that_is_named(
    fixed: Path, monkeypatch: pytest.MonkeyPatch, device: str, index: int | None
) -> None:
    """Also where CUDA's libraries are missing: ONNX Runtime would take the CPU then, and say nothing."""
    import onnxruntime

    real, cuda, asked, loads = onnxruntime.InferenceSession, "CUDAExecutionProvider", list[object](), True

    def session(path: str, options: object, providers: list[object]) -> object:
        asked.extend(providers)
        opened = real(path, options, providers=["CPUExecutionProvider"])
        if loads:
            opened.get_providers = lambda: [cuda, "CPUExecutionProvider"]
        return opened

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [cuda, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    if index is None:
        with pytest.raises(InputError, match=f"device='{device}': ONNX Runtime as installed here has no such device"):
            ExportedDetector.load(fixed, device)
        assert asked == []
        return
    ExportedDetector.load(fixed, device)
    assert asked == [(cuda, {"device_id": index})]
    loads = False
    with pytest.raises(InputError, match="no such device; use device=cpu"):
        ExportedDetector.load(fixed, device)


def test_a_checkpoint_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.onnx, \.xml, \.pt2"):
        ExportedDetector.load(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((300, 400), (60, 80)),  # fits as it is: short side 60
        ((400, 300), (64, 48)),  # would be 80 x 60: shrunk to the canvas's height
        ((50, 1000), (5, 96)),  # the long side is at its limit of 96 already
    ],
)
def test_images_are_shrunk_onto_a_fixed_canvas(size: tuple[int, int], expected: tuple[int, int]) -> None:
    preprocessing = Preprocessing(short_side=60, long_side=96)
    assert preprocessing.target_size(*size, canvas=(64, 96)) == expected


def test_results_are_cut_at_the_count_and_batches_at_the_files_own() -> None:
    seen: list[int] = []

    def run(images: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
        seen.append(len(images))
        assert images.shape == (1, 64, 96, 3)
        scores = np.array([[0.9, 0.4, 0.0]], np.float32)
        boxes = np.array([[[0, 0, 10, 20], [5, 5, 9, 9], [0, 0, 0, 0]]], np.float32)
        return [boxes, scores, np.array([[1, 0, -1]]), np.array([2])]

    info = ExportInfo(("a", "b"), Preprocessing(short_side=32, long_side=64), batch=1, canvas=(64, 96))
    exported = ExportedDetector(info, run, Path("a.onnx"))
    found = exported.predict([np.zeros((64, 64, 3), np.uint8)] * 3, score_threshold=0)
    assert seen == [1, 1, 1]
    assert [detections.names for detections in found] == [["b", "a"]] * 3
    # The image went in at half its size.
    assert found[0].boxes.tolist() == [[0, 0, 20, 40], [10, 10, 18, 18]]


def test_shapes_that_come_often_get_a_graph_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "OFTEN", 2)
    monkeypatch.setattr(runtime, "SPECIALISED", 1)
    compiled = []

    def compile_for(shape: tuple[int, ...]) -> runtime.Run:
        compiled.append(shape)
        return lambda images, sizes: [images + 1]

    run = runtime.specialised(lambda images, sizes: [images], compile_for)
    a, b, sizes = np.zeros((1, 32, 64, 3)), np.zeros((1, 64, 32, 3)), np.zeros((1, 2))
    assert [float(run(a, sizes)[0].max()) for _ in range(5)] == [0, 0, 1, 1, 1]
    assert [float(run(b, sizes)[0].max()) for _ in range(5)] == [0] * 5  # no place left
    assert compiled == [(1, 32, 64, 3)]


def noise(height: int, width: int, seed: int) -> np.ndarray:
    cells = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return np.kron(cells, np.ones((8, 8, 1), np.uint8))


def assert_the_same(one: Detections, other: Detections) -> None:
    assert len(one) == len(other) > 0
    assert one.labels.tolist() == other.labels.tolist()
    np.testing.assert_allclose(other.scores, one.scores, atol=1e-4)
    np.testing.assert_allclose(other.boxes, one.boxes, atol=1e-2)


@pytest.mark.slow
def test_an_own_graph_finds_the_same(
    small_detector: Detector, small_onnx: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = pytest.importorskip("openvino")
    monkeypatch.setattr(runtime, "OFTEN", 1)
    compiled = []
    monkeypatch.setattr(
        openvino.Core,
        "compile_model",
        lambda self, model, *rest, plain=openvino.Core.compile_model: (
            compiled.append(str(model.inputs[0].partial_shape)) or plain(self, model, *rest)
        ),
    )
    formats.export_openvino(small_detector, tmp_path / "a.xml", small_onnx())
    exported = ExportedDetector.load(tmp_path / "a.xml", threads=1)
    pictures = [noise(64, 96, seed) for seed in range(2)]
    runs = [exported.predict(pictures, score_threshold=0) for _ in range(4)]
    assert len(compiled) == 2
    assert compiled[1] == "[2,64,96,3]"
    for later in runs[1:]:
        for one, other in zip(runs[0], later, strict=True):
            assert_the_same(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.xml", "a.onnx", "a.pt2"])
def test_threads_share_an_export(
    small_detector: Detector,
    small_onnx: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Every call gets the boxes of its own image, also while graphs for the two sizes are being compiled."""
    if name == "a.xml":
        pytest.importorskip("openvino")
    monkeypatch.setattr(runtime, "OFTEN", 20)
    path = tmp_path / name
    if name == "a.xml":
        formats.export_openvino(small_detector, path, small_onnx())
    elif name == "a.pt2":
        formats.export_torch(small_detector, path)
    else:
        path = small_onnx()
    exported = ExportedDetector.load(path, threads=1)
    pictures = [noise(64, 96, 0), noise(96, 64, 1)]
    alone = [exported.predict(picture, score_threshold=0)[0] for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: exported.predict(pictures[number % 2], score_threshold=0)[0], range(80)))
    for number, one in enumerate(found):
        assert_the_same(alone[number % 2], one)
