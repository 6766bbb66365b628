"""Find objects in pictures, videos and streams: annotated copies and one JSON file, or other forms.

python tools/predict.py ckpt=RUN_DIR/best.ckpt source=street.jpg
python tools/predict.py ckpt=RUN_DIR/best.ckpt source=FOLDER out=DIR score_threshold=0.5 'classes=[car,person]'
python tools/predict.py ckpt=RUN_DIR/best.ckpt source=drive.mp4 every=5 'save=[images,jsonl]'
python tools/predict.py ckpt=RUN_DIR/best.ckpt source=webcam:0    # Ctrl-C ends it

What cannot be read is listed at the end, with exit code 1; the rest is done.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

import detector
from detector.errors import InputError
from detector.predictor import Options
from detector.sources import count_pictures, is_live
from detector.writers import WRITERS, Places
from launch import launch, plain


def main(config: DictConfig) -> None:
    settings = plain(config)
    source, out, save = as_source(settings["source"]), Path(str(settings["out"])), chosen(settings["save"])
    names = ("score_threshold", "classes", "max_proposals", "tile", "flip", "batch_size", "every", "max_pixels")
    options = Options(
        **{name: settings[name] for name in names}, allow_private=settings["allow_private"], on_error="report"
    )
    predictor = detector.load(settings["ckpt"], settings["device"])
    results = predictor.search(source, options)
    place_of = Places(out, source)
    broken: list[str] = []
    pictures = objects = 0
    with ExitStack() as stack:
        writers = [stack.enter_context(WRITERS[name](out, save, predictor.class_names)) for name in save]
        # Ctrl-C is how a camera ends; what was found until then is kept.
        with suppress(KeyboardInterrupt) if is_endless(source) else nullcontext():
            for picture, found in tqdm(results, total=count_pictures(source, options.every), unit="", disable=None):
                if found.error is None:
                    pictures, objects = pictures + 1, objects + len(found)
                else:
                    broken.append(found.error)
                place = place_of(found)
                for add in writers:
                    add(picture, found, place)
        if broken and not pictures:
            more = f" ({len(broken) - 1} more could not be read either.)" if len(broken) > 1 else ""
            raise InputError(broken[0] + more)
    print(f"{objects} objects in {pictures} pictures: {out}", file=sys.stderr)
    if broken:
        print(f"{len(broken)} could not be read:", *broken, sep="\n  ", file=sys.stderr)
        sys.exit(1)


def as_source(value: Any) -> Any:
    """The source as the library takes it. A number is the name of a file or folder: a folder may be called 2024."""
    return [as_source(part) for part in value] if isinstance(value, list) else str(value)


def is_endless(source: Any) -> bool:
    return any(map(is_endless, source)) if isinstance(source, list) else is_live(source)


def chosen(save: Any) -> list[str]:
    """The kinds of results to write, each once, in the order of WRITERS."""
    given = [str(one) for one in (save if isinstance(save, list) else [save])]
    if unknown := [one for one in given if one not in WRITERS]:
        raise InputError(f"save: there is no {', '.join(unknown)}; expected some of {', '.join(WRITERS)}.")
    return [name for name in WRITERS if name in given]


if __name__ == "__main__":
    launch(main, config_name="predict")
