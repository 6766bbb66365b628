"""What was found, as files: read back by somebody else's reader, each complete or absent."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest
from painted import NAMES, Painted, paint
from PIL import Image
from pycocotools.coco import COCO

from detector.errors import InputError
from detector.inference import sources
from detector.inference.detections import Detections
from detector.inference.predictor import PredictOptions
from detector.inference.sources import SourceImage
from detector.inference.video import Frame
from detector.inference.writers import WRITERS, Places, Results

SIZE = (64, 96)
OBJECTS = [(10, 5, 30, 25, 0, 255), (40, 30, 90, 60, 1, 204)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.png and sub/b.png with a cat and a dog, c.png with nothing, d.png broken."""
    root = tmp_path / "in"
    (root / "sub").mkdir(parents=True)
    for name, objects in (("a", OBJECTS), ("sub/b", OBJECTS[:1]), ("c", [])):
        Image.fromarray(paint(SIZE, *objects)).save(root / f"{name}.png")
    (root / "d.png").write_bytes(b"broken")
    return root


def write(source: Any, out: Path, save: list[str], **options: Any) -> list[Detections]:
    given = []
    with Results(Places(out, source, save), NAMES) as results:
        for picture, found in Painted().search(source, PredictOptions(on_error="report", **options)):
            given.append(found)
            results.add(picture, found)
    assert results.lost == {}
    return given


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_every_form_of_a_folder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = write(folder, out, list(WRITERS))
    assert files(out) == [
        "a.png", "c.png", "coco.json",
        "crops/a_0_cat.png", "crops/a_1_dog.png", "crops/sub/b_0_cat.png",
        "detections.csv", "detections.json", "detections.jsonl", "sub/b.png",
    ]  # fmt: skip
    crop = np.asarray(Image.open(out / "crops/a_1_dog.png"))
    np.testing.assert_array_equal(crop, np.broadcast_to((0, 204, 0), (30, 50, 3)))
    drawn = np.asarray(Image.open(out / "a.png"))
    assert drawn.shape == (*SIZE, 3)
    assert (drawn != paint(SIZE, *OBJECTS)).any()
    np.testing.assert_array_equal(Image.open(out / "c.png"), paint(SIZE))

    records = json.loads((out / "detections.json").read_text())
    assert records == [json.loads(line) for line in (out / "detections.jsonl").read_text().splitlines()]
    assert [record["path"] for record in records] == [str(folder / n) for n in ("a.png", "c.png", "d.png", "sub/b.png")]
    assert [record["annotated"] for record in records] == [
        str(out / "a.png"), str(out / "c.png"), None, str(out / "sub/b.png"),
    ]  # fmt: skip
    assert [record["names"] for record in records] == [["cat", "dog"], [], [], ["cat"]]
    assert "not an image" in records[2]["error"]
    assert [one.to_dict() for one in found] == [
        {key: value for key, value in record.items() if key != "annotated"} for record in records
    ]

    with (out / "detections.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["path"], row["name"], float(row["x1"]), float(row["y2"])) for row in table] == [
        (str(folder / "a.png"), "cat", 10, 25), (str(folder / "a.png"), "dog", 40, 60),
        (str(folder / "sub/b.png"), "cat", 10, 25),
    ]  # fmt: skip


def test_coco_as_pycocotools_reads_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, tmp_path / "out", ["coco"])
    data = COCO(str(tmp_path / "out/coco.json"))
    assert [category["name"] for category in data.loadCats(data.getCatIds())] == list(NAMES)
    by_name = {Path(image["file_name"]).name: image for image in data.loadImgs(data.getImgIds())}
    assert set(by_name) == {"a.png", "b.png", "c.png"}
    boxes = data.loadAnns(data.getAnnIds(imgIds=by_name["a.png"]["id"]))
    assert [(one["bbox"], one["category_id"], one["area"]) for one in boxes] == [
        ([10, 5, 20, 20], 1, 400), ([40, 30, 50, 30], 2, 1500),
    ]  # fmt: skip
    results = data.loadRes(data.dataset["annotations"])  # they are results, too
    assert len(results.getAnnIds()) == 3


def test_a_video_becomes_a_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    from detector.inference.video import write_video

    for name in ("one", "two"):
        with write_video(tmp_path / f"{name}.mp4", 10) as add:
            for index in range(8):
                add(paint(SIZE, (8 * index, 30, 8 * index + 20, 60, 0, 250)))
    Image.fromarray(paint(SIZE)).save(tmp_path / "still.png")
    out = tmp_path / "out"
    source = [str(tmp_path / name) for name in ("one.mp4", "still.png", "two.mp4", "one.mp4")]
    found = write(source, out, ["images", "crops", "json"], every=2)
    assert [one.frame for one in found] == [0, 2, 4, 6, None, 0, 2, 4, 6, 0, 2, 4, 6]
    assert [name for name in files(out) if not name.startswith("crops")] == [
        "detections.json", "one.mp4", "one_2.mp4", "still.png", "two.mp4",
    ]  # fmt: skip
    assert "crops/one_000006_0_cat.png" in files(out)
    with av.open(str(out / "one.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 5  # every second of ten a second: as fast as it was
    assert len(frames) == 4
    inside = [frame[45, 8 * 2 * index + 10] for index, frame in enumerate(frames)]
    np.testing.assert_allclose(inside, [(250, 0, 0)] * 4, atol=30)
    records = json.loads((out / "detections.json").read_text())
    assert {record["annotated"] for record in records[:4]} == {str(out / "one.mp4")}
    assert {record["annotated"] for record in records[-4:]} == {str(out / "one_2.mp4")}


class Stop(Exception):
    """Something goes wrong while writing."""


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "coco", "images"])
def test_nothing_half_written(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("av")
    picture, found = next(Painted().search(paint(SIZE, *OBJECTS), PredictOptions()))
    frame = Detections(found.boxes, found.scores, found.labels, NAMES, SIZE, "a.mp4", 0, 0.0)

    def start_and_fail() -> None:
        with Results(Places(tmp_path / "out", "a.mp4", [kind]), NAMES) as results:
            results.add(picture, frame)
            raise Stop

    with pytest.raises(Stop):
        start_and_fail()
    assert files(tmp_path) == []


def snapshot(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def test_originals_stay_and_earlier_copies_do_not(folder: Path) -> None:
    """Beside the original, beside somebody else's image of that name, in a folder with others, and of a copy."""
    (folder / "e.jpg").write_bytes((folder / "c.png").read_bytes())
    (folder / "e.png").write_bytes(b"somebody else's")
    (folder / "sub" / "a.png").write_bytes((folder / "c.png").read_bytes())
    originals = snapshot(folder)
    copies = ["a_2.png", "a_2_2.png", "e_2.png", "sub/a_2.png", "sub/c.png"]
    for _ in range(2):
        write(folder / "a.png", folder, ["images"])
        write(folder / "a_2.png", folder, ["images"])  # itself a copy, but what is searched stays
        write([folder / "e.jpg"], folder, ["images"])
        write([folder / "a.png", folder / "c.png"], folder / "sub", ["images"])
        assert files(folder) == sorted([*originals, *copies])
        assert {name: (folder / name).read_bytes() for name in originals} == originals
    assert (np.asarray(Image.open(folder / "a_2.png")) != paint(SIZE, *OBJECTS)).any()


def test_the_results_name_the_copy_that_was_written(folder: Path) -> None:
    write(folder / "a.png", folder, ["images", "jsonl"])
    assert json.loads((folder / "detections.jsonl").read_text())["annotated"] == str(folder / "a_2.png")


def test_an_original_video_stays(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    from detector.inference.video import write_video

    with write_video(tmp_path / "drive.mp4", 10) as add:
        for _ in range(3):
            add(paint(SIZE, *OBJECTS))
    original = (tmp_path / "drive.mp4").read_bytes()
    for _ in range(2):
        write(tmp_path / "drive.mp4", tmp_path, ["images"])
        assert files(tmp_path) == ["drive.mp4", "drive_2.mp4"]
        assert (tmp_path / "drive.mp4").read_bytes() == original
    with av.open(str(tmp_path / "drive_2.mp4")) as container:
        assert len(list(container.decode(video=0))) == 3


def test_original_crops_stay(folder: Path, tmp_path: Path) -> None:
    crop = tmp_path / "out" / "crops" / "a_1_dog.png"
    crop.parent.mkdir(parents=True)
    crop.write_bytes(b"somebody else's")
    (tmp_path / "out" / "a.png").write_bytes(b"in nobody's way: there are no copies")
    for _ in range(2):
        write(folder / "a.png", tmp_path / "out", ["crops"])
        assert files(crop.parent) == ["a_0_cat.png", "a_1_dog.png", "a_1_dog_2.png"]
        assert crop.read_bytes() == b"somebody else's"


def test_somebody_else_s_files_of_results_stay(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The annotations of the folder itself, COCO results, tables of other tools, lines that a camera would go on."""
    theirs = {
        "coco.json": '{"info": {"description": "my photographs"}, "images": []}',
        "detections.json": '[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]',
        "detections.jsonl": '{"path": "a.png", "boxes": []}\n',
        "detections.csv": "path,label\na.png,1\n",
    }
    for name, text in theirs.items():
        (folder / name).write_text(text)
    kinds = ["json", "jsonl", "csv", "coco"]
    for _ in range(2):  # its own, of the first time, are replaced
        write(folder, folder, kinds)
        assert {name: (folder / name).read_text() for name in theirs} == theirs
    own = ["coco_2.json", "detections_2.csv", "detections_2.json", "detections_2.jsonl"]
    assert [name for name in files(folder) if "_2." in name] == own
    assert not [name for name in files(folder) if "_3." in name]
    assert len(json.loads((folder / "detections_2.json").read_text())) == 4
    assert "coco.json: was not written by an earlier run, and stays; this one writes coco_2.json" in caplog.text
    with Results(Places(folder, "webcam:0", ["jsonl", "csv"]), NAMES, live=True) as results:
        results.add(SourceImage(np.zeros((1, 1, 3), np.uint8)), named("webcam:0", 0))
    assert {name: (folder / name).read_text() for name in theirs} == theirs
    assert len((folder / "detections_2.jsonl").read_text().splitlines()) == 5


def test_crops_of_one_run_do_not_replace_each_other(tmp_path: Path) -> None:
    """A frame of drive.mp4, and a photograph that is named as its crops are."""
    sizes = []
    for _ in range(2):  # the second run replaces those of the first
        with Results(Places(tmp_path, ["drive.mp4", "drive_000001.jpg"], ["crops"]), NAMES) as results:
            for path, frame, size in (("drive.mp4", 1, 10), ("drive_000001.jpg", None, 20)):
                box = np.array([[0, 0, size, size]], np.float32), np.ones(1, np.float32), np.zeros(1, np.int64)
                results.add(SourceImage(paint(SIZE)), Detections(*box, NAMES, SIZE, path, frame))
        assert results.lost == {}
        assert files(tmp_path) == ["crops/drive_000001_0_cat.png", "crops/drive_000001_0_cat_2.png"]
        sizes = [np.asarray(Image.open(tmp_path / name)).shape[:2] for name in files(tmp_path)]
    assert sizes == [(10, 10), (20, 20)]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_what_a_killed_run_left_is_not_gone_on_with(folder: Path, tmp_path: Path, kind: str) -> None:
    write(folder, tmp_path / "out", [kind])
    written = (tmp_path / "out" / f"detections.{kind}").read_bytes()
    left = tmp_path / "out" / f".detections.{os.getpid()}.partial.{kind}"  # in a container processes share a number
    left.write_bytes(b"lines of another run\n")
    write(folder, tmp_path / "out", [kind])
    assert (tmp_path / "out" / f"detections.{kind}").read_bytes() == written
    assert not left.exists()


def test_files_of_results_without_anything_are_replaced(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write([], out, ["json", "jsonl", "csv", "coco"])
    before = files(out)
    write(folder, out, ["json", "jsonl", "csv", "coco"])
    assert files(out) == before
    assert len(json.loads((out / "detections.json").read_text())) == 4


@pytest.mark.parametrize("save", [["images"], ["crops", "json"]])
def test_results_among_what_is_searched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: list[str]
) -> None:
    monkeypatch.chdir(folder)
    (tmp_path / "link").symlink_to(folder)
    before = snapshot(tmp_path)
    for source, out in (
        (folder, folder), (".", folder), ("*.png", Path()), ([["sub/b.png"], "../in"], Path()),
        (folder, tmp_path / "link"), ("sub", Path("sub/../sub")),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"out=.*: is the folder that is searched.* out=.*predictions\.$"):
            write(source, out, save)
    assert snapshot(tmp_path) == before
    Places(folder, str(folder), ["json", "jsonl", "csv", "coco"])  # tables among images are no harm


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> None:
    """webcam:0 shows three frames."""

    def frames(name: str, *, every: int) -> Iterator[Frame]:
        for index in range(3):
            yield Frame(paint(SIZE, *OBJECTS), index, index / 10, 10.0)

    monkeypatch.setattr(sources, "read_camera", frames)


@pytest.mark.usefixtures("camera")
def test_lines_of_a_camera_can_be_followed(tmp_path: Path) -> None:
    lines, table = tmp_path / "out" / "detections.jsonl", tmp_path / "out" / "detections.csv"
    for before in (0, 3):  # a second run adds to what the first has found
        places = Places(tmp_path / "out", "webcam:0", ["jsonl", "csv"])
        with Results(places, NAMES, live=True) as results:
            for index, (picture, found) in enumerate(Painted().search("webcam:0", PredictOptions())):
                results.add(picture, found)
                records = [json.loads(line) for line in lines.read_text().splitlines()]
                assert [record["frame"] for record in records] == [0, 1, 2][:before] + list(range(index + 1))
                with table.open(newline="") as file:
                    rows = list(csv.DictReader(file))
                assert [row["frame"] for row in rows] == [str(r["frame"]) for r in records for _ in r["names"]]
    assert [(record["path"], record["names"]) for record in records] == [("webcam:0", ["cat", "dog"])] * 6
    assert files(tmp_path) == ["out/detections.csv", "out/detections.jsonl"]


@pytest.mark.usefixtures("camera")
def test_what_a_camera_has_shown_stays(tmp_path: Path) -> None:
    pytest.importorskip("av")
    write("webcam:0", tmp_path, ["images", "crops"])
    before = snapshot(tmp_path)
    assert "crops/webcam_0_000002_1_dog.png" in before
    write("webcam:0", tmp_path, ["images", "crops"])
    after = snapshot(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(after) == 2 * len(before)
    assert "webcam_0_2.mp4" in after


def named(path: str, frame: int | None = None) -> Detections:
    return Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64), NAMES, SIZE, path, frame)


def test_places(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = [str(tmp_path / "in"), f"{tmp_path}/q/**/*.jpg", "x/y.png", "https://host/p/a%20b.jpg?c=1", "webcam:0"]
    places = Places(Path("out"), source, ["images"])
    for path, place in (
        (f"{tmp_path}/in/sub/a.png", "sub/a"),
        (f"{tmp_path}/in/sub/a.jpg", "sub/a_2"),
        (f"{tmp_path}/q/r/s.jpg", "r/s"),
        ("x/y.png", "y"),
        ("other/y.tar.png", "y.tar"),
        ("https://host/p/a%20b.jpg?c=1", "a_20b"),
        ("https://host/", "host"),
        (f"{tmp_path}/in", "source"),  # a folder without images
        ("https://host/..", "image"),
        ("https://[abc/x.jpg", "image_2"),  # no address
        ("webcam:0", "webcam_0"),
    ):
        assert places(named(path)) == Path("out") / place
    leading_out = Places(Path("out"), [f"{tmp_path}/in", f"{tmp_path}/in/../q/*.jpg", "one.jpg"], ["images"])
    for path, place in (("in/a.jpg", "a"), ("in/../q/b.jpg", "b"), ("in/../one.jpg", "one")):
        assert leading_out(named(f"{tmp_path}/{path}")) == Path("out") / place
    assert [places(named("v.mp4", frame)) for frame in (0, 1, 5, 0, 1)] == [
        Path("out/v"), Path("out/v"), Path("out/v"), Path("out/v_2"), Path("out/v_2"),
    ]  # fmt: skip


def test_names_that_are_no_utf8_or_as_long_as_can_be_cost_nobody_anything(tmp_path: Path) -> None:
    odd, longest = os.fsdecode(b"caf\xe9.png"), "n" * 251 + ".png"
    for name in (odd, longest, "plain.png"):
        with (tmp_path / name).open("wb") as file:
            Image.fromarray(paint(SIZE, *OBJECTS)).save(file, format="png")
    sources, out = [str(tmp_path / name) for name in (odd, longest, "plain.png")], tmp_path / "out"
    write([*sources, "aGVsbG8/" * 600], out, list(WRITERS))
    records = json.loads((out / "detections.json").read_bytes().decode("utf-8"))
    assert [record["path"] for record in records[:3]] == sources
    assert [len(record["names"]) for record in records] == [2, 2, 2, 0]
    assert "4800 characters" in records[3]["error"]
    assert len(records[3]["error"]) < 250
    assert all(Path(record["annotated"]).is_file() for record in records[:3])
    assert len(list((out / "crops").iterdir())) == 6
    assert [json.loads(line) for line in (out / "detections.jsonl").read_text("utf-8").splitlines()] == records
    with (out / "detections.csv").open(encoding="utf-8", newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    assert paths[0].endswith(r"caf\udce9.png")
    assert len(paths) == 6
    assert json.loads((out / "coco.json").read_text("utf-8"))["images"][0]["file_name"] == sources[0]


class Full:
    """A disk on which what is written to some files fails, as a full one does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *parts: str) -> None:
        self.parts, save = parts, Image.Image.save

        def save_or_fail(image: Image.Image, path: Path, **options: Any) -> None:
            self.check(path)
            save(image, path, **options)

        def write_or_fail(path: Path, text: str, **options: Any) -> int:
            self.check(path)
            return path.write_bytes(text.encode(options["encoding"], options["errors"]))

        monkeypatch.setattr(Image.Image, "save", save_or_fail)
        monkeypatch.setattr(Path, "write_text", write_or_fail)

    def check(self, path: Path) -> None:
        if any(part in str(path) for part in self.parts):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_cannot_be_written_costs_nothing_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    Full(monkeypatch, "c.", "coco", "b_0_cat")
    with Results(Places(out, folder, list(WRITERS)), NAMES) as results:
        for picture, found in Painted().search(folder, PredictOptions(on_error="report")):
            results.add(picture, found)
    full = "No space left on device"
    assert results.lost == {str(folder / "c.png"): full, str(folder / "sub/b.png"): full, "save=coco": full}
    assert files(out) == [
        "a.png", "crops/a_0_cat.png", "crops/a_1_dog.png",
        "detections.csv", "detections.json", "detections.jsonl", "sub/b.png",
    ]  # fmt: skip
    records = json.loads((out / "detections.json").read_text())
    # All were searched; the copy that is not there is not named.
    assert [record["annotated"] for record in records] == [str(out / "a.png"), None, None, str(out / "sub/b.png")]
    assert [record["names"] for record in records] == [["cat", "dog"], [], [], ["cat"]]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    if which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no small file system can be mounted")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("live", [True, False])
def test_a_line_that_does_not_fit_leaves_no_half(small_disk: Path, live: bool) -> None:
    (small_disk / "before.txt").write_text("whole")
    with Results(Places(small_disk, "webcam:0", ["jsonl"]), NAMES, live) as results:
        for index in range(60):
            results.add(SourceImage(np.zeros((1, 1, 3), np.uint8)), named(f"{index:02000}"))
    lines = (small_disk / "detections.jsonl").read_text().splitlines()
    assert 20 < len(lines) < 59
    assert [int(json.loads(line)["path"]) for line in lines] == list(range(len(lines)))
    assert [int(name) for name in results.lost] == list(range(len(lines), 60))
    assert set(results.lost.values()) == {"No space left on device"}
    assert (small_disk / "before.txt").read_text() == "whole"


@pytest.mark.slow
@pytest.mark.parametrize("frames", [2, 60])  # the end, when the next image has its turn, or frames before it do not fit
def test_a_video_that_cannot_be_written_costs_nothing_else(small_disk: Path, tmp_path: Path, frames: int) -> None:
    av = pytest.importorskip("av")
    from detector.inference.video import write_video

    rng = np.random.default_rng(0)
    for name, count, noise in (("one", frames, 256), ("two", 4, 1)):
        with write_video(tmp_path / f"{name}.mp4", 10) as add:
            for _ in range(count):
                add(rng.integers(0, noise, (320, 320, 3), np.uint8))
    source = [str(tmp_path / name) for name in ("one.mp4", "two.mp4")]
    with Results(Places(small_disk, source, ["images", "json"]), NAMES) as results:
        for picture, found in Painted().search(source, PredictOptions()):
            results.add(picture, found)
    assert results.lost == {source[0]: "No space left on device"}
    assert files(small_disk) == ["detections.json", "two.mp4"]
    with av.open(str(small_disk / "two.mp4")) as container:
        assert len(list(container.decode(video=0))) == 4
    records = json.loads((small_disk / "detections.json").read_text())
    assert len(records) == frames + 4
    assert [record["annotated"] for record in records[-4:]] == [str(small_disk / "two.mp4")] * 4


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"Cannot write to '.*file/out': Not a directory\. Choose another out=\."):
        Results(Places(tmp_path / "file" / "out", "a.png", ["images"]), NAMES)
    (tmp_path / "out" / "detections.csv").mkdir(parents=True)
    with pytest.raises(InputError, match=r"Cannot write '.*/out/detections\.csv': Is a directory"):
        Results(Places(tmp_path / "out", "webcam:0", ["jsonl", "csv"]), NAMES, live=True)


def test_class_names_that_no_file_can_say_cost_nobody_anything(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from detector.inference.video import write_video

    odd = Painted()
    odd.class_names = ("\ud83d", "\udce9\0\n/..")
    Image.fromarray(paint(SIZE, *OBJECTS)).save(tmp_path / "a.png")
    with write_video(tmp_path / "v.mp4", 5) as add:
        add(paint(SIZE, *OBJECTS))
    source, out = [str(tmp_path / name) for name in ("a.png", "v.mp4")], tmp_path / "out"
    with Results(Places(out, source, list(WRITERS)), odd.class_names) as results:
        for picture, found in odd.search(source, PredictOptions()):
            results.add(picture, found)
    assert results.lost == {}
    records = json.loads((out / "detections.json").read_text("utf-8"))
    assert [record["names"] for record in records] == [list(odd.class_names)] * 2
    assert [json.loads(line) for line in (out / "detections.jsonl").read_text("utf-8").splitlines()] == records
    assert [entry["name"] for entry in json.loads((out / "coco.json").read_text("utf-8"))["categories"]] == [
        *odd.class_names
    ]
    with (out / "detections.csv").open(encoding="utf-8", newline="") as file:
        assert next(csv.DictReader(file))["name"] == r"\ud83d"
    assert len(list((out / "crops").iterdir())) == 4
    assert (out / "a.png").is_file()
    assert (out / "v.mp4").is_file()


def test_a_video_of_a_size_that_cannot_be_encoded_costs_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with Results(Places(tmp_path, "a.mp4", ["images", "json"]), NAMES) as results:
        for frame in range(2):
            results.add(
                SourceImage(np.zeros((4, 17000, 3), np.uint8)), replace(named("a.mp4", frame), image_size=(4, 17000))
            )
    assert list(results.lost) == ["a.mp4"]
    assert results.lost["a.mp4"].startswith("no video of 17000 x 4 pixels can be written: ")
    assert files(tmp_path) == ["detections.json"]
    records = json.loads((tmp_path / "detections.json").read_text())
    assert [record["annotated"] for record in records] == [None, None]


def test_a_video_whose_frames_change_size_keeps_all_results(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a recorder that is switched from one quality to another: three programs, one after the other."""
    av = pytest.importorskip("av")
    stream = io.BytesIO()
    for height, width in ((64, 96), (128, 96), (64, 96)):
        part = io.BytesIO()
        with av.open(part, "w", format="mpeg") as container:
            track = container.add_stream("mpeg2video", rate=25)
            track.width, track.height, track.pix_fmt, track.bit_rate = width, height, "yuv420p", 4_000_000
            for _ in range(5):
                image = paint((height, width), (10, 5, 30, 25, 0, 250))
                container.mux(track.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(track.encode(None))
        stream.write(part.getvalue())
    (tmp_path / "switched.mpg").write_bytes(stream.getvalue())
    Image.fromarray(paint(SIZE, *OBJECTS)).save(tmp_path / "still.png")
    out = tmp_path / "out"
    found = write([str(tmp_path / "switched.mpg"), str(tmp_path / "still.png")], out, list(WRITERS))
    sizes = [one.image_size for one in found]
    assert set(sizes[:-1]) == {(64, 96), (128, 96)}
    assert 13 <= len(sizes) <= 16
    assert found[-1].error is None
    assert len(json.loads((out / "detections.json").read_text())) == len(found)
    with av.open(str(out / "switched.mp4")) as container:
        assert [frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)] == [(64, 96, 3)] * (
            len(found) - 1
        )
    assert len([message for message in caplog.messages if "are scaled to the 96 x 64 of the first" in message]) == 1
