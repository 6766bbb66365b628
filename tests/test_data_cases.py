"""Small inputs that failed once, from the folder of real data: they are read by one rule, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from detector.data.annotations import load_annotations
from detector.data.index import AnnotationIndex
from detector.data.results import read_results
from detector.errors import InputError
from detector.evaluation.metrics import compute_metrics


def load(shared: Path, case: str, split: str = "val") -> AnnotationIndex:
    root = shared / "cases" / case
    if not root.is_dir():
        pytest.skip(f"needs {root}")
    return load_annotations(root / "annotations" / f"{split}.json", root / "images")


@pytest.mark.parametrize(("case", "repaired"), [("area_null", 1), ("iscrowd_null", 1), ("iscrowd_text", 4)])
def test_plain_values_are_repaired(shared: Path, case: str, repaired: int) -> None:
    index = load(shared, case)
    assert [(fault.check, fault.count) for fault in index.faults] == [("repaired_values", repaired)]
    assert not index.crowd.any()
    assert index.areas.tolist() == [1400] * 4


def test_a_byte_order_mark(shared: Path) -> None:
    index = load(shared, "json_bom")
    assert len(read_results(shared / "cases/json_bom/results_bom.json", index)) > 0


def test_a_box_without_width_counts_and_is_never_found(shared: Path) -> None:
    index = load(shared, "zero_width")
    assert index.counts["degenerate"] == 1
    found = compute_metrics(read_results(shared / "cases/zero_width/perfect.json", index), index)
    assert found["AP"] == pytest.approx(0.752, abs=1e-3)


def test_an_image_in_the_place_of_its_name(shared: Path) -> None:
    with pytest.raises(InputError, match="`file_name` of image id 1 is 'data:image"):
        load(shared, "file_name_base64", "train")


def test_sizes_of_the_stored_file_with_boxes_of_the_turned_image(shared: Path) -> None:
    index = load(shared, "exif_size_of_the_file", "train")
    assert [fault.check for fault in index.faults] == ["exif_frame"]
    assert index.clipped.sum() == 0
    assert index.read(0).shape[:2] == tuple(index.sizes[0])
