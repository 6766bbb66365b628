"""Names, images and disks as they come: eval, compare and doctor end with their results, or with one clear line."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_case import ground_truth, write_case

from detector.cli import main
from detector.inference.detector import Detector

LONG = "n" * 250


def case(folder: Path, *, image: str = "11.png", name: str = "cat", files: str = "") -> dict[str, Path]:
    """The case of the report, with the name of an image and of a class, and what begins the names of its files."""
    write_case(folder)
    content = ground_truth()
    content["images"][0]["file_name"] = image
    content["categories"][0]["name"] = name
    os.rename(folder / "images/11.png", folder / "images" / image)
    paths = {"annotations": folder / f"{files}gt.json", "results": folder / f"{files}dt.json"}
    os.rename(folder / "dt.json", paths["results"])
    paths["annotations"].write_text(json.dumps(content))
    return paths


def run(monkeypatch: pytest.MonkeyPatch, command: str, **values: Any) -> int:
    """The command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", [command, *(f"{key}={value}" for key, value in values.items())])
    try:
        main(command)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def commands(folder: Path, paths: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Every command that scores or examines the case, and the files that it writes in out/."""
    annotations, results = paths["annotations"], paths["results"]
    return {
        "eval": {"results": results, "annotations": annotations, "images": folder / "images", "report.doctor": 0},
        "compare": {"a": results, "b": results, "annotations": annotations, "draws": 10},
        "doctor": {
            "data.root": folder, "data.train.annotations": annotations.name, "data.val.annotations": annotations.name,
            "input.short_side": 64, "input.long_side": 96,
        },
    }  # fmt: skip


WRITTEN = {
    "eval": ["metrics.json", "diagnosis.json", "report.html"],
    "compare": ["compare.json"],
    "doctor": ["doctor.json"],
}


@pytest.mark.parametrize("command", WRITTEN)
@pytest.mark.parametrize(
    "names",
    [
        {"image": "caf\udce9.png"},
        {"image": LONG + ".png"},
        {"image": "a\nb\u202e.png"},
        {"name": "a\ud800b"},
        {"name": "\udfff" * 300},
        {"name": "\x1b[31m\0\n"},
        {"files": "r\udce9"},
        {"files": LONG[:240]},
    ],
    ids=lambda names: ascii(names)[:30],
)
def test_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, names: dict[str, str]) -> None:
    paths = case(tmp_path / "case", **names)
    code = run(monkeypatch, command, out=tmp_path / "out", **commands(tmp_path / "case", paths)[command])
    assert code == (1 if command == "doctor" else 0)  # both splits have the same images
    texts = {name: (tmp_path / "out" / name).read_bytes().decode("utf-8") for name in WRITTEN[command]}
    for name, text in texts.items():
        if name.endswith(".json"):
            json.loads(text)
    if command == "eval":
        assert names.get("name", "cat") in json.loads(texts["metrics.json"])["per_class"]
        assert json.loads(texts["diagnosis.json"])["worst"]
    if command == "doctor":
        found = {one["check"]: one["severity"] for one in json.loads(texts["doctor.json"])["findings"]}
        assert [check for check, severity in found.items() if severity == "error"] == ["leak"]


def test_a_class_called_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = case(tmp_path / "case", name="background")  # a cat until now, of which there are four
    rows = json.loads(paths["results"].read_text())
    paths["results"].write_text(json.dumps(rows[:6]))
    assert run(monkeypatch, "eval", out=tmp_path / "out", **commands(tmp_path / "case", paths)["eval"]) == 0
    page = (tmp_path / "out/report.html").read_text().partition('id="data">')[2].partition("</script>")[0]
    objects = {row[0]: row[3] for row in json.loads(page)["classes"]["rows"]}
    assert objects["background"] == 4


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.unlink(), lambda path: path.write_bytes(b"x"), lambda path: Image.new("L", (9, 9)).save(path)],
    ids=["missing", "damaged", "another size"],
)
def test_an_image_that_cannot_be_read_does_not_cost_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], Any]
) -> None:
    paths = case(tmp_path / "case")
    damage(tmp_path / "case/images/7.png")
    assert run(monkeypatch, "eval", out=tmp_path / "out", **commands(tmp_path / "case", paths)["eval"]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert page.count("error sum") == 3
    assert page.count("; image id 7: ") == 1
    slices = json.loads((tmp_path / "out/diagnosis.json").read_text())["slices"]["brightness"]
    assert sum(row["images"] for row in slices) >= 2


def test_a_folder_of_images_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = commands(tmp_path / "case", case(tmp_path / "case"))["eval"] | {"images": tmp_path / "nowhere"}
    assert run(monkeypatch, "eval", out=tmp_path / "out", **values) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("command", "name"), [(command, name) for command, names in WRITTEN.items() for name in names])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO, errno.EACCES], ids=os.strerror)
def test_a_disk_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, name: str,
    code: int,
) -> None:  # fmt: skip
    """One line with the file and a remedy, exit code 2; what was written before is whole, what was not is absent."""
    values = commands(tmp_path / "case", case(tmp_path / "case"))[command]

    def failing(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Path, content: Any, *rest: Any, **more: Any) -> Any:
            if path.name.startswith(f".{Path(name).stem}."):
                write(path, content[: len(content) // 2], *rest, **more)
                raise OSError(code, os.strerror(code))
            return write(path, content, *rest, **more)

        return wrapped

    for method in ("write_text", "write_bytes"):
        monkeypatch.setattr(Path, method, failing(getattr(Path, method)))
    assert run(monkeypatch, command, out=tmp_path / "out", **values) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert str(tmp_path / "out" / name) in lines[0]
    assert "place" in lines[0]
    expected = WRITTEN[command][: WRITTEN[command].index(name)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(expected)
    if name != "metrics.json" and command == "eval":
        assert json.loads((tmp_path / "out/metrics.json").read_text())["AP"] > 0


@pytest.mark.parametrize("command", WRITTEN)
@pytest.mark.parametrize("out", ["file/out", "x" * 300, "file"])
def test_places_that_cannot_hold_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, out: str
) -> None:
    (tmp_path / "file").write_text("")
    values = commands(tmp_path / "case", case(tmp_path / "case"))[command]
    assert run(monkeypatch, command, out=tmp_path / out, **values) == 2
    assert f"Cannot write to '{tmp_path / out}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "values", "what"),
    [
        ("benchmark", {"what": "peers"}, "detector.lab.benchmark.benchmark_peers"),
        ("benchmark", {"what": "backbones"}, "detector.lab.benchmark.benchmark_backbones"),
        ("benchmark", {"what": "predict"}, "detector.lab.benchmark.benchmark_predict"),
        ("benchmark", {"what": "speed"}, "detector.lab.benchmark.benchmark_speed"),
        ("guidelines", {}, "detector.lab.guidelines.measure"),
        ("import_weights", {"source": "x.pth"}, "detector.apps.import_weights.load_weights"),
        ("export", {"ckpt": "x.ckpt"}, "detector.apps.export.validation_images"),
    ],
)  # fmt: skip
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str,
    values: dict[str, Any], what: str,
) -> None:  # fmt: skip
    def work(*_: Any) -> None:
        raise AssertionError("it works before it looks whether it can write")

    monkeypatch.setattr(what, work)
    monkeypatch.setattr(Detector, "load", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    for name in ("file", "x.ckpt"):
        Path(name).write_text("")
    (tmp_path / "folder.onnx").mkdir()
    outs = ["file/a.onnx"]
    if command == "import_weights" or values.get("what") in ("peers", "predict"):  # a file, not a folder
        outs.append("folder.onnx")
    for out in outs:
        assert run(monkeypatch, command, out=tmp_path / out, **values) == 2
        assert f"Cannot write to '{tmp_path / out}': " in capsys.readouterr().err


@pytest.mark.parametrize("command", WRITTEN)
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"), (b"", "utf-16-le"),
        (b"", "utf-16-be"), (b"\xff\xfe\0\0", "utf-32-le"),
    ],
)  # fmt: skip
def test_json_in_any_of_its_encodings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, mark: bytes, encoding: str
) -> None:
    paths = case(tmp_path / "case", name="Kätzchen 猫")
    values = commands(tmp_path / "case", paths)[command]
    found = []
    for out in ("plain", "encoded"):
        assert run(monkeypatch, command, out=tmp_path / out, **values) == (1 if command == "doctor" else 0)
        name = WRITTEN[command][0]
        found.append(json.loads((tmp_path / out / name).read_text()))
        for path in paths.values():
            content = json.dumps(json.loads(path.read_text()), ensure_ascii=False) if out == "plain" else ""
            path.write_bytes(mark + content.encode(encoding))
    assert found[0] == found[1]
    assert "Kätzchen 猫" in json.dumps(found[0], ensure_ascii=False)


@pytest.mark.parametrize("command", ["eval", "compare"])
@pytest.mark.parametrize("which", ["annotations", "results"])
def test_json_with_bytes_of_no_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, which: str
) -> None:
    paths = case(tmp_path / "case", name="Kaetzchen")
    rows = paths["results"].read_bytes().replace(b'"score"', b'"note": "Kaetzchen", "score"')
    paths["results"].write_bytes(rows)
    paths[which].write_bytes(paths[which].read_bytes().replace(b"Kaetzchen", "Kätzchen".encode("latin-1")))
    values = commands(tmp_path / "case", paths)[command]
    assert run(monkeypatch, command, out=tmp_path / "out", **values) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert str(paths[which]) in error
    assert "UTF-8" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("boxes", [{0: [10, 10, 0, 40]}, {0: [10, 10, 40, -1], 3: [500, 5, 40, 60]}])
def test_objects_that_can_never_be_found_are_told_in_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, boxes: dict[int, list[float]]
) -> None:
    """Metrics count them, as pycocotools does; the log, the report and the doctor say so, with the same number."""
    paths = case(tmp_path / "case")
    content = json.loads(paths["annotations"].read_text())
    for place, box in boxes.items():
        content["annotations"][place]["bbox"] = box
    paths["annotations"].write_text(json.dumps(content))
    perfect = [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"], "score": 0.9}
        for place, one in enumerate(content["annotations"])
        if place not in boxes and not one["iscrowd"]
    ]
    paths["results"].write_text(json.dumps(perfect))
    values = commands(tmp_path / "case", paths)
    caplog.set_level("INFO")
    metrics = {}
    for protocol in ("coco", "pycocotools"):
        assert run(monkeypatch, "eval", out=tmp_path / "out", metrics=protocol, **values["eval"]) == 0
        metrics[protocol] = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["coco"] == metrics["pycocotools"]
    assert metrics["coco"]["AP"] < 1
    words = f"{len(boxes)} boxes without area inside their image: training leaves them out, metrics count them, and"
    assert words in "\n".join(record.message for record in caplog.records if "apps" in record.name)
    assert words in (tmp_path / "out/report.html").read_text()
    run(monkeypatch, "doctor", out=tmp_path / "out", **values["doctor"])
    [finding] = [
        one
        for one in json.loads((tmp_path / "out/doctor.json").read_text())["findings"]
        if one["check"] == "degenerate_boxes"
    ]
    assert finding["count"] == 2 * len(boxes)  # two splits of one file
    assert words.partition(" ")[2] in finding["message"]
