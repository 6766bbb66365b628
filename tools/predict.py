"""Find objects in pictures, videos and streams: annotated copies and one JSON file, or other forms.

python tools/predict.py ckpt=RUN_DIR/best.ckpt source=street.jpg
python tools/predict.py ckpt=RUN_DIR/best.ckpt source=FOLDER out=DIR score_threshold=0.5 'classes=[car,person]'
python tools/predict.py ckpt=RUN_DIR/best.ckpt source=drive.mp4 every=5 'save=[images,jsonl]'
python tools/predict.py ckpt=RUN_DIR/best.ckpt source=webcam:0    # Ctrl-C or SIGTERM ends it

Files that it has not written itself are never replaced: the copy of street.png in its own folder is street_2.png. Of a
camera or a stream, predictions/detections.jsonl grows line by line. What cannot be read is listed at the end, with exit
code 1; the rest is done.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from launch import launch, plain

from omegaconf import DictConfig

import detector
from detector.data.progress import progress
from detector.errors import InputError
from detector.inference.predictor import PredictOptions
from detector.inference.sources import count_pictures, is_live, leave_out
from detector.inference.writers import LIVE_WRITERS, WRITERS, Places


def main(config: DictConfig) -> None:
    settings = plain(config)
    source, out = as_source(settings["source"]), Path(str(settings["out"]))
    endless = is_endless(source)
    save = chosen(settings["save"], endless)
    names = ("score_threshold", "classes", "max_proposals", "tile", "flip", "batch_size", "every", "max_pixels")
    options = PredictOptions.of(
        {name: settings[name] for name in names} | {"allow_private": settings["allow_private"], "on_error": "report"}
    )
    place_of = Places(out, source, save)
    source = leave_out(source, out)
    predictor = detector.load(settings["ckpt"], settings["device"], threads=settings["threads"])
    results = predictor.search(source, options)
    broken: list[str] = []
    pictures = objects = 0
    stop = Stop()
    with ExitStack() as stack:
        kinds = LIVE_WRITERS if endless else WRITERS
        writers = [stack.enter_context(kinds[name](out, save, predictor.class_names)) for name in save]
        with stop.ends() if endless else nullcontext():
            for picture, found in progress(results, "predict", count_pictures(source, options.every)):
                with stop.waits():
                    place = place_of(found)
                    for add in writers:
                        add(picture, found, place)
                    if found.error is None:
                        pictures, objects = pictures + 1, objects + len(found)
                    else:
                        broken.append(found.error)
        if broken and not pictures:
            more = f" ({len(broken) - 1} more could not be read either.)" if len(broken) > 1 else ""
            raise InputError(broken[0] + more)
    print(f"{objects} objects in {pictures} pictures: {out}", file=sys.stderr)
    if broken:
        print(f"{len(broken)} could not be read:", *broken, sep="\n  ", file=sys.stderr)
        sys.exit(1)


class Stop:
    """Ctrl-C and SIGTERM (docker stop, systemd): how a camera ends. What was found until then is kept."""

    def __init__(self) -> None:
        self.asked = self.waiting = False

    @contextmanager
    def ends(self) -> Iterator[None]:
        """The block ends, without an error, when it is asked to."""
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with suppress(KeyboardInterrupt):
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def waits(self) -> Iterator[None]:
        """The block is finished first: a picture is in all results or in none."""
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False
        if self.asked:
            raise KeyboardInterrupt

    def _ask(self, *_: object) -> None:
        self.asked = True
        if not self.waiting:
            raise KeyboardInterrupt


def as_source(value: Any) -> Any:
    """The source as the library takes it. A number is the name of a file or folder: a folder may be called 2024."""
    return [as_source(part) for part in value] if isinstance(value, list) else str(value)


def is_endless(source: Any) -> bool:
    return any(map(is_endless, source)) if isinstance(source, list) else is_live(source)


def chosen(save: Any, endless: bool) -> list[str]:
    """The kinds of results to write, each once, in the order of WRITERS."""
    if save is None:
        save = ["images", "jsonl" if endless else "json"]
    given = [str(one) for one in (save if isinstance(save, list) else [save])]
    if unknown := [one for one in given if one not in WRITERS]:
        raise InputError(f"save: there is no {', '.join(unknown)}; expected some of {', '.join(WRITERS)}.")
    if endless and (late := [one for one in given if one not in LIVE_WRITERS]):
        raise InputError(
            f"save: {', '.join(late)} is written at the end, which a camera or a stream does not have; "
            f"jsonl grows line by line: save=[images,jsonl]."
        )
    return [name for name in WRITERS if name in given]


if __name__ == "__main__":
    launch(main, config_name="predict")
