"""The gate: what it measures, worked by hand, and that a broken export does not pass it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from detector.data.preprocess import Prepared, Preprocessing
from detector.export.parity import REFERENCE, Difference, Trial, compare_contestants, difference, take_turns
from detector.inference.detections import Detections, Found
from detector.inference.detector import Detector
from detector.inference.predictor import Predictor


def detections(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    """Rows of x1, y1, x2, y2, score, label."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    boxes, scores, labels = table[:, :4].astype(np.float32), table[:, 4].astype(np.float32), table[:, 5].astype(int)
    return Detections(boxes, scores, labels, ("a", "b"), (100, 100))


A = (10, 10, 50, 50, 0.9, 0)
B = (60, 60, 90, 90, 0.5, 1)


def test_equal_results_do_not_differ() -> None:
    assert difference(detections(A, B), detections(A, B)) == Difference(0, 0, 2, 2, 2, 2)
    assert difference(detections(), detections(A)) == Difference(extra=1)
    assert difference(detections(A), detections()) == Difference(0, 0, 0, 1, 1, 0)


def test_the_largest_difference_of_partners() -> None:
    found = difference(detections(A, B), detections((10, 10.5, 50, 50.25, 0.8, 0), (60, 60, 90, 90, 0.5, 1)))
    assert found.box == pytest.approx(0.5)
    assert found.score == pytest.approx(0.1, abs=1e-6)
    # IoU of the first: 39.5 / 40.25 of its height, but its score is 0.1 off.
    assert (found.partners, found.total, found.confident, found.agreeing) == (2, 2, 2, 1)


def test_order_does_not_count_and_each_detection_is_taken_once() -> None:
    near = (11, 10, 51, 50, 0.7, 0)
    assert difference(detections(A, near), detections(near, A)).box == 0
    doubled = difference(detections(A, A), detections(A))
    assert (doubled.partners, doubled.total) == (1, 2)


def test_another_class_or_place_is_no_partner() -> None:
    other_class, other_place = (*A[:5], 1), (40, 10, 80, 50, 0.9, 0)
    for wrong in (other_class, other_place):
        assert difference(detections(A), detections(wrong)).partners == 0


def test_weak_detections_do_not_decide() -> None:
    weak = (10, 10, 50, 50, 0.04, 0)
    found = difference(detections(weak), detections())
    assert (found.total, found.confident) == (1, 0)
    assert difference(detections(), detections(weak)).extra == 0


def test_counts_add_up_and_differences_are_the_worst() -> None:
    assert Difference(1, 0.5, 1, 2, 3, 4, 5).worst(Difference(2, 0.25, 10, 20, 30, 40, 50)) == Difference(
        2, 0.5, 11, 22, 33, 44, 55
    )


def records(**found: Difference) -> dict[str, Trial]:
    return {REFERENCE: Trial([detections(A)], [0.2, 0.4], Difference(0, 0, 100, 100, 100, 100))} | {
        name: Trial([detections(B)], [0.1, 0.1], value) for name, value in found.items()
    }


@pytest.mark.parametrize(
    ("precision", "ap", "agreeing", "passes"),
    [
        ("float32", 0.4995, 100, True),
        ("float32", 0.4985, 100, False),  # 0.15 points lower
        ("float32", 0.60, 100, True),  # better is no failure
        ("float32", 0.50, 99, True),
        ("float32", 0.50, 98, False),
        ("int8", 0.4905, 0, True),  # int8 boxes may move
        ("int8", 0.489, 100, False),
        ("float32", math.nan, 100, False),
        ("float32", None, 100, True),  # no objects: detections decide
        ("int8", None, 100, False),  # nothing decides
    ],
)
def test_what_passes(precision: str, ap: float | None, agreeing: int, passes: bool) -> None:
    def average_precision(found: list[Detections]) -> float | None:
        if ap is None:
            return None
        return 0.5 if found[0].labels[0] == 0 else ap

    rows = compare_contestants(
        records(export=Difference(0.001, 0.0001, 100, 100, 100, agreeing)),
        average_precision,  # type: ignore[arg-type]
        files={REFERENCE: 10, "export": 5},
        precisions={"export": precision},
        max_drop={"float32": 0.1, "int8": 1.0},
    )
    assert [row.name for row in rows] == [REFERENCE, "export"]
    assert rows[0].complaints == ()
    assert (rows[1].complaints == ()) is passes
    assert rows[1].ratio == pytest.approx(3)  # twice and four times as fast
    assert rows[1].p50_ms == pytest.approx(100)
    assert rows[1].file_bytes == 5
    assert rows[1].to_dict()["passed"] is passes
    if ap is not None and not math.isnan(ap):
        assert rows[1].drop == pytest.approx(50 - 100 * ap)
        json.dumps([row.to_dict() for row in rows], allow_nan=False)


@pytest.mark.parametrize(
    ("precision", "ap", "found", "complaint"),
    [
        ("float32", 0.5, Difference(confident=100, agreeing=100, extra=1), None),
        ("float32", 0.5, Difference(confident=100, agreeing=100, extra=2), "2 of 100 confident detections differ"),
        ("float32", 0.5, Difference(confident=100, agreeing=99, extra=1), "2 of 100 confident detections differ"),
        ("float32", 0.0, Difference(), "nothing was compared"),
        ("float32", None, Difference(), "nothing was compared"),
        ("int8", 0.0, Difference(confident=100, agreeing=100), "a loss could not be seen"),
    ],
)
def test_a_gate_that_has_nothing_to_go_by_fails(
    precision: str, ap: float | None, found: Difference, complaint: str | None
) -> None:
    rows = compare_contestants(
        records(export=found, shown=found),
        lambda _: ap,
        files={REFERENCE: 10, "export": 5, "shown": 5},
        precisions={"export": precision},
        max_drop={"float32": 0.1, "int8": 1.0},
    )
    by_name = {row.name: row.complaints for row in rows}
    assert by_name["shown"] == by_name[REFERENCE] == ()
    assert len(by_name["export"]) == (complaint is not None)
    assert complaint is None or complaint in by_name["export"][0]


class Swapped(Predictor):
    """A broken export: it takes red for blue."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.class_names, self.preprocessing = predictor.class_names, predictor.preprocessing

    def detect(self, prepared: Prepared, max_proposals: int | None = None) -> list[Found]:
        return self.predictor.detect(replace(prepared, images=prepared.images[:, ::-1].copy()))


def noise(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.kron(rng.integers(0, 256, (8, 12, 3), np.uint8), np.ones((8, 8, 1), np.uint8)) for _ in range(count)]


def test_wrong_channel_order_fails_and_the_same_graph_passes(small_detector: Detector) -> None:
    contestants = {REFERENCE: small_detector, "broken": Swapped(small_detector), "same": small_detector}
    found = take_turns(contestants, noise(4))
    rows = compare_contestants(
        found,
        lambda _: 0.0,  # a network that has learnt nothing: AP sees no difference
        files=dict.fromkeys(contestants, 1),
        precisions=dict.fromkeys(contestants.keys() - {REFERENCE}, "float32"),
        max_drop={"float32": 0.1},
    )
    by_name = {row.name: row for row in rows}
    assert by_name["same"].complaints == ()
    assert by_name["same"].difference.agreeing > 20
    assert len(by_name["broken"].complaints) == 1
    assert "confident detections differ" in by_name["broken"].complaints[0]
    assert [len(record.seconds) for record in found.values()] == [4, 4, 4]


def test_a_fixed_canvas_is_compared_on_that_canvas(small_detector: Detector) -> None:
    seen: list[tuple[int, ...]] = []

    class Spy(Predictor):
        class_names, preprocessing = ("a",), Preprocessing(short_side=64, long_side=96)

        def detect(self, prepared: Prepared, max_proposals: int | None = None) -> list[Found]:
            seen.append((*prepared.images.shape[2:], *prepared.image_sizes[0].tolist()))
            return [Found(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))]

    Spy().on_canvas((96, 128)).predict(np.zeros((640, 640, 3), np.uint8))
    assert seen == [(96, 128, 64, 64)]


@pytest.mark.slow
def test_an_onnx_file_with_swapped_channels_fails(
    small_detector: Detector, small_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from detector.inference.runtime import ExportedDetector

    good, broken = small_onnx(), tmp_path / "broken.onnx"
    model = onnx.load(good)
    # What a careless writer does: the first convolution's kernels for blue, green, red.
    weights = {entry.name: entry for entry in model.graph.initializer}
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    kernel = weights[first.input[1]]
    swapped = onnx.numpy_helper.from_array(np.ascontiguousarray(onnx.numpy_helper.to_array(kernel)[:, ::-1]))
    kernel.raw_data = swapped.raw_data
    onnx.save(model, str(broken))
    contestants: dict[str, Predictor] = {REFERENCE: small_detector}
    contestants |= {name: ExportedDetector.load(path, threads=1) for name, path in (("good", good), ("broken", broken))}
    rows = compare_contestants(
        take_turns(contestants, noise(6)),
        lambda _: 0.0,
        files=dict.fromkeys(contestants, 1),
        precisions=dict.fromkeys(contestants.keys() - {REFERENCE}, "float32"),
        max_drop={"float32": 0.1},
    )
    assert {row.name: bool(row.complaints) for row in rows} == {REFERENCE: False, "good": False, "broken": True}
