"""Data sets as Pascal VOC lays them out, turned into the entries of an annotation file in COCO's format.

    FOLDER/JPEGImages/a.jpg, Annotations/a.xml, ImageSets/Main/{train,val}.txt    lists of names without a suffix
    FOLDER/a.jpg, a.xml                                                           all of it in one folder
    FOLDER/{train,valid}/a.jpg, a.xml                                             or in one folder for each split

A box names its first and its last pixel, counted from 1 (VOC2007 development kit, section 4: "the top-left pixel in the
image has coordinates (1,1)"), so that x = xmin - 1 and width = xmax - xmin + 1, as detectron2 reads it.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.parsers import expat

from detector.data.annotations import index_of
from detector.data.images import IMAGE_SUFFIXES
from detector.data.index import AnnotationIndex
from detector.data.rules import brief, fault
from detector.errors import InputError


class _Split(NamedTuple):
    """Where the names of a split (a list, or a folder of XML files), its XML files and its images are."""

    names: Path
    annotations: Path
    images: Path


def has_xml(folder: Path) -> bool:
    return folder.is_dir() and any(map(_is_xml, os.listdir(folder)))


def _is_xml(name: str) -> bool:
    return name.lower().endswith(".xml")


def read_voc(
    root: Path, given: Mapping[str, Path], names: Sequence[str], class_names: Sequence[str] | None
) -> dict[str, AnnotationIndex]:
    """Splits of a folder. All its XML files are parsed, whichever splits are asked for: they alone name the classes.

    Args:
        root: the folder.
        given: lists of a split, instead of its own.
        names: of the splits that are wanted; where the folder has not all of them, all its images come as "".
        class_names: what the classes are, where these are all that occur. Otherwise the lines of FOLDER/classes.txt, on
            the same condition; otherwise those that occur, in alphabetical order (VOC's own).

    Raises:
        InputError: a list cannot be read, or there is no XML file.
    """
    splits = _find_splits(root, given)
    for name, path in given.items():
        splits[name] = _Split(path, path, path) if has_xml(path) else splits[""]._replace(names=path)
    parsed: dict[Path, Any] = {}
    for folder in dict.fromkeys(split.annotations for split in splits.values()):
        files = sorted(folder / name for name in os.listdir(folder) if _is_xml(name)) if folder.is_dir() else []
        parsed |= {path.with_suffix(".xml"): _parse(path, os.path.relpath(path, root)) for path in files}
    if not parsed:
        raise InputError(f"{splits[''].annotations}: no XML file here; data.format=voc needs one for each image.")
    used = {item["name"] for one in parsed.values() if isinstance(one, dict) for item in one["objects"]}
    listed = listed_classes(root)
    if class_names is not None:  # in an order that is not the detector's: detections are written with these ids
        class_names = listed if listed and set(listed) == set(class_names) else sorted(class_names)
    declared = (class_names, listed, sorted(used))
    classes = next(known for known in declared if known is not None and used.issubset(known))
    wanted = names if splits.keys() >= set(names) else ("",)
    return {name: _index(root, splits[name], parsed, classes) for name in wanted}


def _find_splits(root: Path, given: Mapping[str, Path]) -> dict[str, _Split]:
    """All of a folder as ""; beside it both splits, as far as they are not given, or none."""
    annotations, lists = _folder(root, "Annotations"), root / "ImageSets" / "Main"
    # A list of training images alone: what is not on it is somebody's test split.
    listed = (lists / name for name in ("trainval.txt", "train.txt"))
    names = next((path for path in listed if path.is_file()), annotations)
    everything = _Split(names, annotations, _folder(root, "JPEGImages", "images"))
    found = {name: everything._replace(names=lists / f"{name}.txt") for name in {"train", "val"} - given.keys()}
    if not all(split.names.is_file() for split in found.values()):
        folders = {"train": root / "train", "val": root / ("val" if has_xml(root / "val") else "valid")}
        own = {name: _Split(folder, folder, folder) for name, folder in folders.items() if has_xml(folder)}
        found = own if len(own) == 2 else {}
        if len(own) == 1 and not has_xml(annotations):
            [everything] = own.values()
    return found | {"": everything}


def listed_classes(root: Path) -> list[str] | None:
    """The lines of a file that labelling tools write beside their annotations; None where there is none."""
    path = next((path for path in (root / "classes.txt", root / "labels" / "classes.txt") if path.is_file()), None)
    return None if path is None else [line for _, line in read_list(path)]


def read_list(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers.

    Raises:
        InputError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = "it is no UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise InputError(f"{path}: this list cannot be read ({why}); check the path, save it as UTF-8.") from error
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def _folder(root: Path, *names: str) -> Path:
    return next((root / name for name in names if (root / name).is_dir()), root)


def _index(root: Path, split: _Split, parsed: Mapping[Path, Any], classes: Sequence[str]) -> AnnotationIndex:
    if split.names.is_dir():
        listed = [("", path.stem) for path in parsed if path.parent == split.names]
    else:
        shown = os.path.relpath(split.names, root)
        listed = [(f"{shown}:{number}: ", name) for number, name in read_list(split.names)]
    files = os.listdir(split.images) if split.images.is_dir() else []
    images = {name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES}
    on_disk = {Path(name).stem: name for name in sorted(images, reverse=True)}
    label = {name: number for number, name in enumerate(classes, 1)}
    content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    broken: list[str] = []
    wrong: list[str] = []
    for line, stem in listed:
        path = split.annotations / f"{stem}.xml"
        one = parsed.get(path, f"{line}no file {os.path.relpath(path, root)}")
        if isinstance(one, str):
            broken.append(one)
            continue
        name = one["file_name"]
        if name not in images or Path(name).stem != stem:
            name = on_disk.get(stem, name or f"{stem}.jpg")
        content["images"].append({"id": stem, "file_name": name, "width": one["width"], "height": one["height"]})
        own = {"image_id": stem}
        content["annotations"] += [item | own | {"category_id": label[item["name"]]} for item in one["objects"]]
        wrong += one["wrong"]
    content["categories"] = [{"id": number, "name": name} for name, number in label.items()]
    return index_of(split.names, split.images, content, [*fault("broken_files", broken), *fault("entries", wrong)])


def _parse(path: Path, shown: str) -> dict[str, Any] | str:
    """What an XML file says about its image and objects; a text about what is wrong with all of it."""
    try:
        root = _elements(path.read_bytes())
    except (OSError, ValueError, LookupError, expat.ExpatError) as error:
        return f"{shown}: not an annotation in XML ({getattr(error, 'strerror', None) or error})"
    if root.tag != "annotation":
        return f"{shown}: its root is <{root.tag}>, expected <annotation>"
    objects: list[dict[str, Any]] = []
    wrong: list[str] = []
    for number, item in enumerate(root.findall("object"), 1):
        name, flag = (item.findtext(tag, "").strip() for tag in ("name", "difficult"))
        where = f"{shown}:{item.get('line')}, object {number}"
        texts = {corner: item.findtext(f"bndbox/{corner}", "").strip() for corner in ("xmin", "ymin", "xmax", "ymax")}
        numbers = [as_number(text) for text in texts.values()]
        if not name or None in numbers:
            what = ", ".join(f"{corner} {brief(text)}" for corner, text in texts.items() if as_number(text) is None)
            wrong.append(f"{where}: {what or 'name'} where {'a number' if what else 'a text'} is expected")
            continue
        x1, y1, x2, y2 = (float(value or 0) for value in numbers)
        box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
        difficult = int(flag or 0) if flag in ("", "0", "1") else flag
        objects.append({"id": where, "name": name, "bbox": box, "difficult": difficult})
    # Some tools write 0 where they do not know a side.
    sides = [as_number(root.findtext(f"size/{side}", "")) or None for side in ("width", "height")]
    width, height = (int(side) if side and side.is_integer() else side for side in sides)
    about = {"file_name": root.findtext("filename", "").strip(), "width": width, "height": height}
    return about | {"objects": objects, "wrong": wrong}


def _elements(content: bytes) -> ET.Element:
    """The elements of an XML file, each with its line as an attribute.

    Raises:
        ValueError, LookupError, expat.ExpatError: it is no XML, or has a document type: entities that contain each
            other fill the memory.
    """
    parser, builder = expat.ParserCreate(), ET.TreeBuilder()

    def refuse(*_: Any) -> None:
        raise ValueError("a document type, <!DOCTYPE>, is not read")

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = lambda tag, _: builder.start(tag, {"line": str(parser.CurrentLineNumber)})
    parser.EndElementHandler, parser.CharacterDataHandler = builder.end, builder.data
    parser.Parse(content, True)
    return builder.close()


def as_number(text: str) -> float | None:
    """A number from a text file, which may be NaN or infinite; None for another text."""
    try:
        return float(text)
    except ValueError:
        return None
