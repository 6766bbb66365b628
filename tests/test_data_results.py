"""Results: anybody's COCO results as arrays, and back; load_split around them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from detector.data.annotations import load_annotations
from detector.data.index import AnnotationIndex
from detector.data.results import Results, read_results, write_results
from detector.data.splits import DataOptions, load_split
from detector.errors import InputError


@pytest.fixture
def index(tiny_coco: Path) -> AnnotationIndex:
    return load_annotations(tiny_coco / "annotations" / "val.json", tiny_coco / "images")


def found(*boxes: tuple[float, ...]) -> SimpleNamespace:
    """xyxy, score, label of each."""
    array = np.array(boxes, np.float32).reshape(-1, 6)
    return SimpleNamespace(boxes=array[:, :4], scores=array[:, 4], labels=array[:, 5].astype(np.int64))


def test_what_is_written_is_coco_and_is_read_back(index: AnnotationIndex, tmp_path: Path) -> None:
    results = Results.of([2, 0], [found((1, 2, 4, 8, 0.5, 1)), found((0.1, 0, 9, 9, 0.25, 0), (3, 3, 4, 4, 0.1, 2))])
    write_results(tmp_path / "new" / "detections.json", results, index)
    rows = json.loads((tmp_path / "new" / "detections.json").read_text())
    assert rows[0] == {"image_id": 42, "category_id": 17, "bbox": [1, 2, 3, 6], "score": 0.5}
    assert [(row["image_id"], row["category_id"]) for row in rows[1:]] == [(10, 3), (10, 90)]
    again = read_results(tmp_path / "new" / "detections.json", index)
    for name, values in vars(results).items():
        np.testing.assert_array_equal(getattr(again, name), values)


def test_no_results(index: AnnotationIndex, tmp_path: Path) -> None:
    write_results(tmp_path / "none.json", Results.of([], []), index)
    assert len(read_results(tmp_path / "none.json", index)) == 0


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_every_encoding(index: AnnotationIndex, tmp_path: Path, encoding: str) -> None:
    rows = [{"image_id": 10, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 1}]
    (tmp_path / "results.json").write_text(json.dumps(rows), encoding=encoding)
    assert read_results(tmp_path / "results.json", index).boxes.tolist() == [[1, 2, 3, 4]]


def test_joined_is_in_the_order_of_the_images_and_select_renumbers(index: AnnotationIndex) -> None:
    parts = [Results.of([3, 1], [found((0, 0, 1, 1, 0.3, 0)), found((0, 0, 2, 2, 0.2, 0), (0, 0, 3, 3, 0.9, 1))]),
             Results.of([0], [found((0, 0, 4, 4, 0.4, 2))])]  # fmt: skip
    joined = Results.joined(parts)
    assert joined.images.tolist() == [0, 1, 1, 3]
    assert joined.boxes[:, 2].tolist() == [4, 2, 3, 1]
    part = joined.select([3, 1])
    assert part.images.tolist() == [1, 1, 0]
    assert part.boxes[:, 2].tolist() == [2, 3, 1]


def test_results_on_other_images_of_the_file_do_not_count(index: AnnotationIndex) -> None:
    rows = [{"image_id": i, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 1} for i in (10, 42, 99)]
    assert read_results(rows, index.select([3])).images.tolist() == [0]
    with pytest.raises(InputError, match=r"1 unknown image id.*11"):
        read_results([*rows, rows[0] | {"image_id": 11}], index.select([3]))


def test_keep_empty_filters_training_alone(tiny_coco: Path) -> None:
    data = DataOptions(root=str(tiny_coco), keep_empty=False)
    assert load_split(data, "train").image_ids == [10, 7, 99]
    assert load_split(data, "val").image_ids == [10, 7, 42, 99]


def test_a_root_that_is_not_set_or_looks_like_a_number() -> None:
    with pytest.raises(InputError, match=r"data\.root is not set"):
        load_split(DataOptions(), "train")
    assert DataOptions.parse({"root": 2024}).root == "2024"
