"""Exported files, run in their own runtimes, against LightHeadRCNN.detect in torch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_export_graph import VARIANTS, changed, pictures, prepared
from torch import nn

from detector.data.preprocess import Preprocessing
from detector.errors import InputError
from detector.export import formats
from detector.export.formats import Inputs
from detector.inference.detections import Found
from detector.inference.detector import Detector
from detector.inference.export_info import FORMAT, ExportInfo
from detector.inference.runtime import INPUTS, OUTPUTS, ExportedDetector
from detector.models.build import NetworkOptions
from detector.models.calibrate import IDENTITY
from detector.models.fuse import fuse

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

WRITERS = {".onnx": formats.export_onnx, ".xml": formats.export_openvino, ".pt2": formats.export_torch}
# Largest difference of a score; of a box a hundred times that. torch's own operators are the same code; the others
# round differently, and the small network's logits are steep (`excite`).
TOLERANCE = {".onnx": 1e-4, ".xml": 1e-4, ".pt2": 1e-6}


@pytest.fixture
def small_detector(small_detector: Detector) -> Detector:
    """Calibrated: exports have that in their graphs."""
    small_detector.network.head.calibration = (0.7, -0.4)
    return small_detector


@pytest.fixture
def onnx_file(small_onnx: Callable[..., Path]) -> Path:
    """The small detector as ONNX, any batch and size."""
    return small_onnx()


def check_detector(detector: Detector, exported: ExportedDetector, canvases: list[tuple[int, int, int]]) -> int:
    """Compare at these (batch, height, width); returns how many detections there were."""
    network = fuse(detector.network)
    compared = 0
    for seed, (count, height, width) in enumerate(canvases):
        images, sizes = pictures(count, height, width, seed), torch.tensor([[height - 5, width - 9]] * count)
        expected = network.detect(images, sizes).per_image()
        found = exported.detect(prepared(images, sizes))
        for ours, theirs in zip(found, expected, strict=True):
            assert [part.dtype for part in (ours.boxes, ours.scores, ours.labels)] == [np.float32, np.float32, np.int64]
            check_same(ours, Found(*(part.numpy() for part in theirs)), TOLERANCE[exported.path.suffix])
            compared += len(ours)
    return compared


def check_same(found: Found, expected: Found, atol: float) -> None:
    """The same detections, best first, up to rounding: which may swap neighbours, and the last place of a full list."""
    assert len(found) == len(expected)
    assert (np.diff(found.scores) <= 0).all()
    for ones, others in ((found, expected), (expected, found)):
        for box, score, label in zip(ones.boxes, ones.scores, ones.labels, strict=True):
            near = (others.labels == label) & (np.abs(others.scores - score) <= atol)
            near &= np.abs(others.boxes - box).max(axis=1) <= 100 * atol
            assert near.any() or score <= ones.scores[-1] + atol, (box, score, label)


def test_onnx_runtime_equals_torch_at_any_batch_and_size(onnx_file: Path, small_detector: Detector) -> None:
    exported = ExportedDetector.load(onnx_file, threads=1)
    canvases = [(1, 64, 96), (3, 64, 96), (1, 32, 32), (2, 128, 32), (1, 160, 224), (5, 96, 96)]
    assert check_detector(small_detector, exported, canvases) > 300


def test_prediction_equals_torch_on_images_of_many_sizes(onnx_file: Path, small_detector: Detector) -> None:
    exported = ExportedDetector.load(onnx_file, threads=1)
    rng = np.random.default_rng(0)
    sources = [
        np.kron(rng.integers(0, 256, (h // 8 + 1, w // 8 + 1, 3), np.uint8), np.ones((8, 8, 1), np.uint8))[:h, :w]
        for h, w in ((48, 70), (90, 60), (64, 64), (50, 75), (33, 100), (1, 1), (300, 20))
    ]
    fused = fuse(small_detector.network)
    small_detector.network = fused
    expected = small_detector.predict(sources, score_threshold=0.05)
    assert sum(map(len, expected)) > 20
    for batch_size in (1, 3, 8):
        found = exported.predict(sources, score_threshold=0.05, batch_size=batch_size)
        for ours, theirs in zip(found, expected, strict=True):
            # Pixels of the original are up to 3.5 pixels of the input.
            parts = [Found(d.boxes / 3.5, d.scores, d.labels) for d in (ours, theirs)]
            check_same(*parts, atol=1e-4)
            assert ours.image_size == theirs.image_size
            assert ours.class_names == ("cat", "dog", "bird")


def test_onnx_has_standard_operators_only(onnx_file: Path) -> None:
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", formats.OPSET)}
    assert {node.domain for node in model.graph.node} == {""}
    assert len(model.functions) == 0
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("NonMaxSuppression") == 2
    assert operators.count("GridSample") == 1
    assert set(operators) <= {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}


def test_onnx_says_what_goes_in_and_out(onnx_file: Path) -> None:
    graph = onnx.load(onnx_file).graph
    for values, names in ((graph.input, INPUTS), (graph.output, OUTPUTS)):
        assert tuple(value.name for value in values) == names
    shapes = {
        value.name: [d.dim_value or "?" for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "images": ["?", "?", "?", 3],
        "image_sizes": ["?", 2],
        "boxes": ["?", 30, 4],
        "scores": ["?", 30],
        "labels": ["?", 30],
        "counts": ["?"],
    }
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_metadata_is_that_of_the_detector(onnx_file: Path, small_detector: Detector) -> None:
    properties = {entry.key: entry.value for entry in onnx.load(onnx_file).metadata_props}
    assert properties["format"] == FORMAT
    assert json.loads(properties["class_names"]) == ["cat", "dog", "bird"]
    stated = json.loads(properties["preprocessing"])
    assert (stated["short_side"], stated["long_side"], stated["stride"]) == (64, 96, 32)
    assert stated["colour_order"] == "RGB"
    exported = ExportedDetector.load(onnx_file)
    assert exported.class_names == small_detector.class_names
    assert exported.preprocessing == Preprocessing(short_side=64, long_side=96)
    assert exported.info.spec == small_detector.options.spec()
    assert exported.provenance["epoch"] == 3
    assert exported.provenance["export"]["torch"] == torch.__version__


def test_exporting_leaves_the_detector_as_it_is(onnx_file: Path, small_detector: Detector) -> None:
    before = {key: value.clone() for key, value in small_detector.network.state_dict().items()}
    assert not small_detector.fused
    formats.trace(small_detector, formats.suppress_in_onnx, formats.export_info(small_detector, 1, (64, 64)))
    after = small_detector.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"canvas": (60, 64)}, "60x64.*multiples of 32"),
        ({"canvas": (0, 64)}, "0x64"),
        ({"canvas": (32, 16416)}, "32x16416; height and width are 16384 at most"),
        ({"batch": 4}, "batch=4"),
    ],
)
def test_a_size_that_no_export_has(small_detector: Detector, options: Any, message: str, tmp_path: Path) -> None:
    for suffix, write in WRITERS.items():
        with pytest.raises(InputError, match=message):
            write(small_detector, tmp_path / f"a{suffix}", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(
    small_detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt2"
    path.write_bytes(b"old")

    def full(_: Any, target: str, **__: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match="No space"):
        formats.export_torch(small_detector, path, batch=1, canvas=(64, 64))
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt2"]
    assert path.read_bytes() == b"old"


def test_properties_survive_the_round_trip(small_detector: Detector) -> None:
    info = ExportInfo(
        ('a "b" <&>', "ü"), Preprocessing(short_side=32, long_side=64), 1, (64, 96), "int8", {"x": [1]}, {"y": None},
        (0.25, 0.5),
    )  # fmt: skip
    properties = info.to_properties()
    assert ExportInfo.from_properties(properties | {"other": "{"}, "a.onnx") == info
    earlier = {key: text for key, text in properties.items() if key != "thresholds"}
    assert ExportInfo.from_properties(earlier, "a.onnx") == replace(info, thresholds=None)
    for odd in ("[0.5]", "[0.5, 2]", "0.5"):
        with pytest.raises(InputError, match=r"a\.onnx.*thresholds"):
            ExportInfo.from_properties(properties | {"thresholds": odd}, "a.onnx")
    for odd in ('{"batch": 1.0, "height": 64, "width": 96}', '{"batch": 1, "height": "64", "width": 96}'):
        with pytest.raises(InputError, match=r"a\.onnx.*(input\.batch=1\.0|input\.height=64): expected a whole number"):
            ExportInfo.from_properties(properties | {"input": odd}, "a.onnx")
    with pytest.raises(InputError, match=r"a\.onnx.*infinity"):
        ExportInfo.from_properties(properties | {"version": "Infinity"}, "a.onnx")


# An export takes many seconds: variants that do not touch each other share one. Each alone is in test_export_graph.py.
# One of any size takes three times as long: those are for what computes with the size, the maps and their anchors.
ANY_SIZE: Inputs = {}
FIXED: Inputs = {"batch": 1, "canvas": (96, 128)}
TOGETHER: list[tuple[list[str], Inputs]] = [
    (["plain"], ANY_SIZE),
    (["no neck", "objectness in the score", "paper's layout"], ANY_SIZE),
    (["dense RPN, dilated"], ANY_SIZE),
    (["a box per class", "V2*", "fewer candidates than detections"], FIXED),
    (["max of samples", "kernel 15", "more proposals than candidates"], FIXED),
    (["nothing found"], FIXED),
]


@pytest.mark.slow
@pytest.mark.parametrize(("names", "inputs"), TOGETHER, ids=[", ".join(names) for names, _ in TOGETHER])
def test_every_variant_in_both_runtimes_without_torch(
    small_spec: dict[str, Any],
    excite: Callable[[nn.Module], nn.Module],
    names: list[str],
    inputs: Inputs,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    for name in names:
        small_spec = changed(small_spec, VARIANTS[name])
    detector = Detector(
        NetworkOptions.parse(small_spec),
        ("cat", "dog", "bird"),
        Preprocessing(short_side=64, long_side=96),
    )
    excite(detector.network)
    info = formats.export_onnx(detector, tmp_path / "a.onnx", **inputs)
    paths = [tmp_path / "a.onnx"]
    if importlib.util.find_spec("openvino"):
        # What export_openvino does, without tracing the network once more.
        formats.save_openvino(formats.convert_for_openvino(paths[0]), info, tmp_path / "a.xml")
        paths.append(tmp_path / "a.xml")
    for path in paths:
        exported = ExportedDetector.load(path, threads=1)
        canvases = [(3, 96, 128)] if inputs else [(1, 64, 96), (3, 128, 64), (2, 96, 96)]
        compared = check_detector(detector, exported, canvases)
        assert (compared == 0) == (names == ["nothing found"])


def test_no_variant_is_left_out() -> None:
    assert sorted(name for names, _ in TOGETHER for name in names) == sorted(VARIANTS)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".xml", ".pt2"])
def test_other_runtimes_equal_torch_at_any_batch_and_size(
    small_detector: Detector, onnx_file: Path, suffix: str, tmp_path: Path
) -> None:
    if suffix == ".xml":
        pytest.importorskip("openvino")
        formats.export_openvino(small_detector, tmp_path / "a.xml", onnx_file)
    else:
        formats.export_torch(small_detector, tmp_path / "a.pt2")
    exported = ExportedDetector.load(tmp_path / f"a{suffix}", threads=1)
    canvases = [(1, 64, 96), (3, 64, 96), (2, 128, 64), (1, 160, 224), (5, 96, 96)]
    assert check_detector(small_detector, exported, canvases) > 300
    # Below two cells a .pt2 pads further: see SMALLEST_TORCH_CANVAS.
    [strip] = exported.predict(np.full((20, 300, 3), 90, np.uint8), score_threshold=0)
    assert np.isfinite(strip.boxes).all()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize(("candidates", "inputs"), [(0, ANY_SIZE), (1, FIXED)], ids=["0", "1"])
def test_an_image_with_one_candidate_or_none(
    small_detector: Detector, suffix: str, candidates: int, inputs: Inputs, tmp_path: Path
) -> None:
    """A trained detector leaves hardly any candidate; an untrained one, hundreds."""
    if suffix == ".xml":
        pytest.importorskip("openvino")
    images, sizes = pictures(1, 96, 128, 0), torch.tensor([[96, 128]])
    small_detector.network.head.calibration = IDENTITY  # the network's own threshold is for scores as they come
    _, scores, _ = fuse(small_detector.network).detect(images, sizes).per_image()[0]
    head, threshold = small_detector.network.head, float(scores[0]) + (1e-3 if candidates == 0 else -1e-4)
    head.options = head.options.model_copy(update={"score_threshold": threshold})
    assert len(fuse(small_detector.network).detect(images, sizes).per_image()[0][1]) == candidates
    WRITERS[suffix](small_detector, tmp_path / f"a{suffix}", **inputs)
    exported = ExportedDetector.load(tmp_path / f"a{suffix}", threads=1)
    [found] = exported.detect(prepared(images, sizes))
    assert len(found.boxes) == len(found.scores) == len(found.labels) == candidates


@pytest.mark.slow
@pytest.mark.parametrize("suffix", WRITERS)
def test_fixed_batch_and_size(small_detector: Detector, suffix: str, tmp_path: Path) -> None:
    if suffix == ".xml":
        pytest.importorskip("openvino")
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](small_detector, path, batch=1, canvas=(96, 128))
    exported = ExportedDetector.load(path, threads=1)
    assert (exported.info.batch, exported.info.canvas) == (1, (96, 128))
    # Three images go through one by one.
    assert check_detector(small_detector, exported, [(1, 96, 128), (3, 96, 128)]) > 60
    [portrait] = exported.predict(np.full((600, 200, 3), 90, np.uint8), score_threshold=0)
    assert portrait.image_size == (600, 200)


@pytest.mark.slow
def test_openvino_is_two_files_that_belong_together(small_detector: Detector, onnx_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path = tmp_path / "a.xml"
    formats.export_openvino(small_detector, path, onnx_file)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "a.xml"]
    exported = ExportedDetector.load(path)
    assert exported.class_names == ("cat", "dog", "bird")
    assert exported.info.spec == small_detector.options.spec()
    weights = bytearray((tmp_path / "a.bin").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "a.bin").write_bytes(weights)
    with pytest.raises(InputError, match=r"a\.bin' is damaged"):
        ExportedDetector.load(path)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(InputError, match=r"no 'a\.bin' beside it"):
        ExportedDetector.load(path)
