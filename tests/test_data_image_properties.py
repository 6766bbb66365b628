from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from detector.data.annotations import load_annotations
from detector.data.image_properties import image_properties, measure


def test_flat_and_half_black_images():
    white = np.full((20, 80, 3), 255, np.uint8)
    assert measure(white) == {"brightness": 1.0, "contrast": 0.0, "sharpness": 0.0, "resolution": 40.0}
    white[:, :40] = 0
    half = measure(white)
    assert (half["brightness"], half["contrast"]) == (0.5, 0.5)


def test_numbers_are_those_of_pillow_and_of_five_shifted_copies():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
    grey = np.asarray(picture.convert("L"), np.float64)  # rounds by itself: one grey level of tolerance

    found = measure(np.asarray(picture))

    assert found["brightness"] == pytest.approx(grey.mean() / 255, abs=1 / 255)
    assert found["contrast"] == pytest.approx(grey.std() / 255, rel=0.01)
    wide = np.pad(grey, 1, mode="reflect")
    laplacian = wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:] - 4 * grey
    assert found["sharpness"] == pytest.approx(laplacian.var(), rel=0.02)
    blurred = measure(np.asarray(picture.filter(ImageFilter.GaussianBlur(2))))
    assert blurred["sharpness"] < found["sharpness"] / 100


def test_images_of_a_data_set_by_id(tiny_coco: Path, caplog: pytest.LogCaptureFixture):
    index = load_annotations(tiny_coco / "annotations/val.json", tiny_coco / "images")
    found = image_properties(index)
    assert set(found) == {10, 7, 42, 99}
    assert found[7]["resolution"] == pytest.approx((40 * 60) ** 0.5)
    assert list(image_properties(index, limit=2)) == index.image_ids[:2]
    (tiny_coco / "images/b.jpg").write_bytes(b"no picture")
    assert set(image_properties(index)) == {10, 42, 99}  # one bad image does not cost the slices of the others
    assert "1 images cannot be read, and are in no slice by light: image id 7" in caplog.text
