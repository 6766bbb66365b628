"""Prediction with an oracle in place of the network: options, order, batches, errors; and the budget of a real one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from painted import NAMES, Painted, paint, rows
from PIL import Image
from tool_runner import tool_environment

from detector.errors import InputError
from detector.inference.detections import Found
from detector.inference.detector import Detector
from detector.inference.predictor import PredictOptions
from detector.models.rpn import Proposals

SIZE = (64, 96)  # no resize: 64 is the short side, 96 the long one


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images 0.png to 5.png, each with a cat at another place."""
    for index in range(6):
        Image.fromarray(paint(SIZE, (10 * index, 5, 10 * index + 8, 25, 0, 250))).save(tmp_path / f"{index}.png")
    return tmp_path


def test_classes_by_name_and_number() -> None:
    image = paint(SIZE, (0, 0, 20, 20, 0, 250), (30, 0, 50, 20, 1, 240), (60, 0, 80, 20, 2, 230))
    predictor = Painted()
    everything = predictor.predict(image)[0]
    assert everything.names == ["cat", "dog", "bird"]
    assert everything.boxes.tolist() == [[0, 0, 20, 20], [30, 0, 50, 20], [60, 0, 80, 20]]
    for classes, names in (
        (["dog"], ["dog"]), (["bird", 0], ["cat", "bird"]), ([1, "dog"], ["dog"]), ("bird", ["bird"]), (2, ["bird"]),
        ([np.int64(1)], ["dog"]), ([], []), (None, list(NAMES)),
    ):  # fmt: skip
        [found] = predictor.predict(image, classes=classes)
        assert found.names == names
        assert found.class_names == NAMES


def test_each_class_has_a_threshold_of_its_own() -> None:
    image = paint(SIZE, (0, 0, 20, 20, 0, 128), (30, 0, 50, 20, 1, 128), (60, 0, 80, 20, 2, 128))  # scores of 0.502
    predictor = Painted()
    for known, given, names in (
        (None, "auto", ["cat", "dog", "bird"]), ((0.6, 0.5, 0.6), "auto", ["dog"]), ((0.6, 0.5, 0.6), 0.5, list(NAMES)),
        ((0.6, 0.5, 0.6), 0.51, []), ((0.6, 0.5, 0.6), [0.5, 0.9, 0.1], ["cat", "bird"]),
        ((0.6, 0.5, 0.6), {"bird": 0.2}, ["dog", "bird"]), (None, {"dog": 0.9}, ["cat", "bird"]),
    ):  # fmt: skip
        predictor.thresholds = known
        for options in ({}, {"tile": (64, 64, 32)}):
            [found] = predictor.predict(image, score_threshold=given, **options)
            assert found.names == names, (known, given, options)
    with pytest.raises(InputError, match=r"score_threshold: 2 numbers.* 3 classes"):
        predictor.predict(image, score_threshold=(0.1, 0.2))
    with pytest.raises(InputError, match="score_threshold: there is no 'cow'"):
        predictor.predict(image, score_threshold={"cow": 0.2})


def test_names_that_are_numbers() -> None:
    """A text is a name, a number an index; where they contradict each other, neither is guessed."""
    digits = tuple("1234567890")
    for given in ([7], [np.int64(7)], 7):
        with pytest.raises(InputError, match='classes: 7 is the number of class "8" and the name of another one; give'):
            PredictOptions.of({"classes": given}).labels(digits)
    for number in (7, np.int64(7)):
        with pytest.raises(InputError, match=r'score_threshold: 7 is the number .*"7" or "8"; or one number for each'):
            PredictOptions.of({"score_threshold": {number: 0.5}}).lowest(digits, None)
    assert PredictOptions.of({"classes": ["7", "0"]}).labels(digits) == [6, 9]
    assert PredictOptions.of({"score_threshold": {"7": 0.5}}).lowest(digits, None).tolist().index(0.5) == 6
    ordered = tuple("0123456789")
    assert PredictOptions.of({"classes": [7, "7"]}).labels(ordered) == [7, 7]
    assert PredictOptions.of({"score_threshold": {7: 0.5}}).lowest(ordered, None).tolist().index(0.5) == 7
    tens = ("10", "20", "30")  # no number of a class is a name
    assert PredictOptions.of({"classes": [1, 20, "30"]}).labels(tens) == [1, 1, 2]
    assert PredictOptions.of({"score_threshold": {2: 0.5}}).lowest(NAMES, None).tolist().index(0.5) == 2


@pytest.mark.parametrize("unknown", ["cow", 3, -1, True, 1.0, None])
def test_a_class_that_there_is_not(unknown: Any) -> None:
    with pytest.raises(InputError) as error:
        Painted().stream(paint(SIZE), classes=["cat", unknown])  # told before the first image is asked for
    assert repr(unknown) in str(error.value)
    assert "0: cat, 1: dog, 2: bird" in str(error.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_size", 0), ("batch_size", 2.0), ("batch_size", True), ("score_threshold", 1.5),
        ("score_threshold", "high"), ("score_threshold", float("nan")), ("max_proposals", 0), ("max_proposals", 0.5),
        ("on_error", "ignore"), ("every", 0), ("max_pixels", 0), ("tile", (10, 10)), ("tile", (10, 10, 10)),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be(option: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{option}="):
        Painted().stream([], **{option: value})


def test_numbers_and_arrays_of_numpy_are_options_as_any() -> None:
    options = PredictOptions.of(
        {
            "batch_size": np.int64(2), "max_proposals": np.uint8(3), "flip": np.True_, "tile": np.array([64, 32, 8]),
            "score_threshold": {np.str_("cat"): np.float32(0.5), np.int64(1): np.float64(0.25)},
            "classes": np.array([0, 2]),
        }
    )  # fmt: skip
    assert options.batch_size == 2
    assert type(options.batch_size) is int
    assert (options.max_proposals, options.flip, options.tile) == (3, True, (64, 32, 8))
    assert options.score_threshold == {"cat": 0.5, 1: 0.25}
    assert options.classes == (0, 2)
    assert PredictOptions.of({"score_threshold": np.array([0.5, 0.25, 1])}).score_threshold == (0.5, 0.25, 1)
    assert PredictOptions.of({"score_threshold": [np.float32(0.5)] * 3}).score_threshold == (0.5, 0.5, 0.5)
    with pytest.raises(InputError, match=r"batch_size=\[2\]: expected a whole number, 1 or more"):
        PredictOptions.of({"batch_size": np.array([2])})


def test_an_option_that_there_is_not() -> None:
    with pytest.raises(InputError, match=r"no option treshold; there is .*score_threshold, classes"):
        Painted().stream([], treshold=0.5)


def test_a_stream_never_holds_more_than_a_batch() -> None:
    taken: list[int] = []

    def pictures() -> Iterator[np.ndarray]:
        index = 0
        while True:  # no end
            taken.append(index)
            yield paint(SIZE, (index, 0, index + 8, 8, 0, 250))
            index += 1

    predictor = Painted()
    stream = predictor.stream(pictures(), batch_size=3)
    for index in range(7):
        assert next(stream).boxes[0, 0] == index
        assert len(taken) == 3 * (index // 3 + 1)
    assert predictor.batches == [3, 3, 3]


def test_generators_and_nesting() -> None:
    images = [paint(SIZE, (9 * i, 0, 9 * i + 8, 8, 0, 250)) for i in range(5)]
    nested = [images[0], (image for image in images[1:3]), (images[3], [images[4]])]
    found = Painted().predict(nested)
    assert [one.boxes[0, 0] for one in found] == [0, 9, 18, 27, 36]
    assert Painted().predict(iter([])) == []


def test_a_broken_image_raises_after_the_results_before_it(folder: Path) -> None:
    (folder / "3.png").write_bytes(b"no picture")
    stream = Painted().stream(folder, batch_size=8)
    assert [next(stream).boxes[0, 0] for _ in range(3)] == [0, 10, 20]
    with pytest.raises(InputError, match=r"3\.png"):
        next(stream)


def test_a_broken_image_is_reported_and_the_rest_is_done(folder: Path) -> None:
    (folder / "3.png").write_bytes(b"no picture")
    source = [folder, folder / "missing.png", "https://127.0.0.1/a.png", None, paint(SIZE, (1, 2, 9, 9, 0, 250))]
    found = Painted().predict(source, on_error="report", batch_size=4)
    errors = {index: one.error for index, one in enumerate(found) if one.error is not None}
    assert list(errors) == [3, 6, 7, 8]
    for index, part in (
        (3, "3.png: not an image"),
        (6, "missing.png: no such file"),
        (7, "allow_private"),
        (8, "NoneType"),
    ):
        assert part in str(errors[index])
        assert len(found[index]) == 0
        assert found[index].image_size == (0, 0)
    assert [found[i].path for i in (3, 6, 7, 8)] == [
        str(folder / "3.png"), str(folder / "missing.png"), "https://127.0.0.1/a.png", None,
    ]  # fmt: skip
    assert [found[i].boxes[0, 0] for i in (0, 1, 2, 4, 5, 9)] == [0, 10, 20, 40, 50, 1]


def test_errors_of_the_users_generator_pass() -> None:
    def pictures() -> Iterator[np.ndarray]:
        yield paint(SIZE)
        raise InputError("mine")

    with pytest.raises(InputError, match="mine"):
        Painted().predict(pictures(), on_error="report")


def test_an_error_of_the_users_generator_comes_after_the_results_before_it() -> None:
    def images() -> Iterator[np.ndarray]:
        yield from [paint((64, 96), (10, 5, 30, 25, 0, 250))] * 5
        raise KeyError("the camera was unplugged")

    for size in (1, 2, 5, 8):
        stream = Painted().stream(images(), batch_size=size)
        assert len([next(stream) for _ in range(5)]) == 5
        with pytest.raises(KeyError, match="unplugged"):
            next(stream)


def test_a_generator_may_fill_one_array_again_and_again() -> None:
    def frames() -> Iterator[np.ndarray]:
        buffer = np.empty((64, 96, 3), np.uint8)
        for x in (5, 25, 45):
            buffer[:] = paint((64, 96), (x, 5, x + 20, 25, 0, 250))
            yield buffer

    found = Painted().predict(frames())
    assert [one.boxes.tolist() for one in found] == [[[x, 5, x + 20, 25]] for x in (5, 25, 45)]


def test_search_gives_the_image_too(folder: Path) -> None:
    for index, (picture, found) in enumerate(Painted().search(folder, PredictOptions())):
        assert picture.path == found.path == str(folder / f"{index}.png")
        np.testing.assert_array_equal(picture.image, np.asarray(Image.open(found.path)))


def test_flip_of_a_symmetrical_task_changes_nothing_but_finds_the_same() -> None:
    image = paint((128, 192), (10, 20, 50, 90, 0, 250), (100, 4, 190, 60, 1, 200), (0, 100, 30, 128, 2, 160))
    predictor = Painted()
    [straight], [flipped] = predictor.predict(image), predictor.predict(image, flip=True)
    assert predictor.batches == [1, 1, 1]
    np.testing.assert_allclose(flipped.boxes, straight.boxes, atol=1e-4)
    np.testing.assert_allclose(flipped.scores, straight.scores, atol=1e-6)
    assert flipped.names == straight.names == ["cat", "dog", "bird"]


class LeftBlind(Painted):
    """Sees the right half only."""

    def _detect_in(self, image: np.ndarray) -> Any:
        found = super()._detect_in(image)
        return found.where(found.boxes[:, 0] >= image.shape[2] / 2)


def test_flip_finds_what_one_look_misses_with_half_its_score() -> None:
    image = paint(SIZE, (4, 0, 24, 20, 0, 204), (70, 30, 90, 60, 1, 255))
    assert LeftBlind().predict(image)[0].names == ["dog"]
    [found] = LeftBlind().predict(image, flip=True)
    assert rows(found) == [(4, 0, 24, 20, "cat"), (70, 30, 90, 60, "dog")]
    np.testing.assert_allclose(found.scores, [0.5, 0.4])  # 255 and 204 of 255, each seen once


def large_scene() -> tuple[np.ndarray, list[tuple[int, int, int, int, int, int]]]:
    """512 x 768, whose whole image is shrunk 8 times: small ones on every seam, and some that no tile holds."""
    rng = np.random.default_rng(3)
    objects = [(x - 9, y - 7, x + 9, y + 8, (x + y) % 3, 220) for x in range(60, 768, 84) for y in range(28, 480, 58)]
    objects = [o for o in objects if rng.random() < 0.8 and not (200 < o[0] < 560 and 120 < o[1] < 400)]
    return (512, 768), [*objects, (240, 160, 540, 270, 0, 250), (250, 300, 520, 380, 1, 250)]  # type: ignore[return-value]


@pytest.mark.parametrize("flip", [False, True])
def test_tiles_find_small_objects_once_and_large_ones_whole(flip: bool) -> None:
    size, objects = large_scene()
    image, predictor = paint(size, *objects), Painted(smallest=4)  # type: ignore[misc]
    assert len(predictor.predict(image)[0]) < len(objects) / 2
    predictor.batches.clear()
    [found] = predictor.predict(image, tile=(96, 64, 24), batch_size=16, flip=flip)
    assert max(predictor.batches) <= 16
    assert found.image_size == size
    expected = sorted((*map(float, o[:4]), NAMES[o[4]]) for o in objects)
    assert [row[4] for row in rows(found)] == [row[4] for row in expected]
    # Small ones exactly, from the tiles; large ones to half a pixel of the shrunken whole image.
    difference = np.abs(np.array([row[:4] for row in rows(found)]) - [row[:4] for row in expected]).max(axis=1)
    small = np.array([row[2] - row[0] < 100 for row in expected])
    assert difference[small].max() <= 0.01
    assert difference[~small].max() <= 6


class Unsure(Painted):
    """Shows all of an object in the whole image, with a score of 0.2, and half of it in the left tile, with 0.35."""

    def detect_images(self, images: Any, max_proposals: int | None = None) -> list[Found]:
        shown = {100: ((10, 10, 90, 50), 0.2), 60: ((10, 10, 60, 50), 0.35)}
        boxes = [shown[image.shape[1]] if image[0, 0, 0] == 0 else None for image in images]
        return [
            Found(np.array([one[0]] if one else [], np.float32).reshape(-1, 4), np.array([one[1]] if one else []),
             np.zeros(int(one is not None), np.int64))
            for one in boxes
        ]  # fmt: skip


def test_what_is_below_the_threshold_takes_no_part_in_merging() -> None:
    image = np.zeros((60, 100, 3), np.uint8)
    image[:, 40:] = 1  # so that the right tile is another
    tile = (60, 60, 20)
    [found] = Unsure().predict(image, tile=tile, score_threshold=0.3)
    assert rows(found) == [(10, 10, 60, 50, "cat")]  # not lost to one that is left out itself
    [found] = Unsure().predict(image, tile=tile, score_threshold=0.1)
    assert rows(found) == [(10, 10, 90, 50, "cat")]


def test_a_small_image_is_not_cut() -> None:
    image = paint(SIZE, (10, 10, 30, 30, 0, 250))
    predictor = Painted()
    assert rows(predictor.predict(image, tile=(96, 64, 8))[0]) == [(10, 10, 30, 30, "cat")]
    assert predictor.batches == [1]


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (3, 40000)])
def test_extreme_images(size: tuple[int, int]) -> None:
    image = np.zeros((*size, 3), np.uint8)
    image[..., 2] = 255
    for options in ({}, {"tile": (4096, 4096, 64)}, {"flip": True}):
        [found] = Painted().predict(image, **options)
        assert found.image_size == size
        assert rows(found) == [(0, 0, size[1], size[0], "bird")]


def test_frames_carry_their_number_and_time(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from detector.inference.video import write_video

    with write_video(tmp_path / "a.mp4", 10) as add:
        for index in range(9):
            add(paint(SIZE, (8 * index, 0, 8 * index + 16, 16, 1, 250)))
    found = Painted().predict([tmp_path / "a.mp4", paint(SIZE)], every=2, batch_size=2)
    assert [one.frame for one in found] == [0, 2, 4, 6, 8, None]
    np.testing.assert_allclose([one.time for one in found[:5]], [0, 0.2, 0.4, 0.6, 0.8], atol=1e-3)  # type: ignore[misc]
    np.testing.assert_allclose([one.boxes[0, 0] for one in found[:5]], [0, 16, 32, 48, 64], atol=1)
    assert {one.path for one in found[:5]} == {str(tmp_path / "a.mp4")}
    assert found[5].time is None
    cut = tmp_path / "cut.mp4"
    cut.write_bytes((tmp_path / "a.mp4").read_bytes()[:200])
    assert "cut.mp4" in str(Painted().predict(cut, on_error="report")[0].error)


def test_frames_of_a_camera_do_not_wait_for_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from detector.inference import sources
    from detector.inference.video import Frame

    taken = []

    def camera(name: str, *, every: int) -> Iterator[Frame]:
        assert (name, every) == ("0", 3)
        for index in range(5):
            taken.append(index)
            yield Frame(paint(SIZE, (index, 0, index + 9, 9, 0, 250)), 3 * index, index / 10, 10)

    monkeypatch.setattr(sources, "read_camera", camera)
    for source in ("webcam:0", 0):
        taken.clear()
        stream = Painted().stream(source, every=3)
        found = next(stream)
        assert (found.path, found.frame, found.time, taken) == ("webcam:0", 0, 0.0, [0])
        assert [one.frame for one in stream] == [3, 6, 9, 12]


def test_a_budget_of_the_limit_is_the_same_and_a_smaller_one_a_prefix(small_detector: Detector) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    limit = small_detector.network.rpn.options.test_limits.after_nms
    [everything] = small_detector.predict(image, score_threshold=0)
    for budget in (limit, 10 * limit):
        [same] = small_detector.predict(image, score_threshold=0, max_proposals=budget)
        np.testing.assert_array_equal(same.boxes, everything.boxes)
        np.testing.assert_array_equal(same.scores, everything.scores)
    # By hand: the head on the first proposals only.
    network = small_detector.network
    images, sizes = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous(), torch.tensor([SIZE])
    seen: list[int] = []
    handle = network.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].shape[1]))
    with torch.no_grad():
        rpn_map, head_map = network.features(images)
        proposals = network.rpn.propose(*network.rpn(rpn_map), sizes)
        first = Proposals(proposals.boxes[:, :5], proposals.valid[:, :5], proposals.scores[:, :5])
        output = network.head(network.head.thin(head_map), first.boxes)
        [(boxes, scores, _)] = network.head.detect(output, first, sizes).per_image()
    [few] = small_detector.predict(image, score_threshold=0, max_proposals=5)
    handle.remove()
    assert seen == [5, 5]
    np.testing.assert_allclose(few.scores, scores, rtol=1e-6)
    np.testing.assert_allclose(few.boxes, boxes, atol=1e-3)
    assert 0 < len(few) < len(everything)


def test_a_predictor_of_a_fixed_budget_says_so() -> None:
    with pytest.raises(InputError, match=r"max_proposals=5: .* fixed when it was exported"):
        Painted().predict(paint(SIZE), max_proposals=5)


def test_nothing_of_it_needs_torch() -> None:
    """In an interpreter that cannot import torch: files, bytes, tiles, flips, and the forms of the results."""
    code = """
import sys
sys.modules["torch"] = sys.modules["torchvision"] = sys.modules["av"] = None
import io, numpy as np
from PIL import Image
from painted import Painted, paint
from detector.inference import remote, sources, tiles, video, writers
image = paint((64, 96), (10, 10, 30, 30, 0, 250))
buffer = io.BytesIO()
Image.fromarray(image).save(buffer, "png")
buffer.seek(0)
for found in Painted().predict([image, buffer, Image.fromarray(image)], flip=True, tile=(50, 50, 10)):
    assert found.names == ["cat"], found
    assert found.to_json() and found.crop(image)[0].shape == (20, 20, 3)
assert "a.mp4: no such file" in Painted().predict("a.mp4", on_error="report")[0].error
"""
    command = [sys.executable, "-W", "error", "-c", code]
    subprocess.run(command, check=True, cwd=Path(__file__).parent, env=tool_environment(), timeout=60)
