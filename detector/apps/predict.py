"""Find objects in images, videos and streams: annotated copies and one JSON file, or other forms.

python tools/predict.py source=street.jpg                         # a detector that comes with the package
python tools/predict.py ckpt=RUN_DIR/best.ckpt source=street.jpg
python tools/predict.py ckpt=RUN_DIR/best.ckpt source=FOLDER out=DIR score_threshold=0.5 'classes=[car,person]'
python tools/predict.py ckpt=RUN_DIR/best.ckpt source=drive.mp4 every=5 'save=[images,jsonl]'
python tools/predict.py ckpt=RUN_DIR/best.ckpt source=webcam:0    # Ctrl-C or SIGTERM ends it

Files that it has not written itself are never replaced: the copy of street.png in its own folder is street_2.png, and
beside somebody else's coco.json its own is coco_2.json. Of a camera or a stream, predictions/detections.jsonl grows
line by line. What cannot be read, or written, is listed at the end, with exit code 1; the rest is done.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from detector.data.progress import progress
from detector.errors import InputError
from detector.inference.loading import load
from detector.inference.predictor import PredictOptions, SearchOptions
from detector.inference.shipped import DEFAULT
from detector.inference.sources import count_images, is_live, leave_out
from detector.inference.writers import LIVE_WRITERS, WRITERS, Places, Results
from detector.options import Threads

log = logging.getLogger(__name__)
Kind = Literal["images", "crops", "json", "jsonl", "csv", "coco"]
_NAMED = 5  # of what could not be written for one reason


class PredictCommandOptions(SearchOptions):
    """What to search, with what, and which results to write."""

    source: str | list[str | list[str]]
    """Image, folder, "*.jpg", https://..., video, rtsp://..., webcam:0, or a list [a.jpg,b.jpg]."""
    ckpt: str = DEFAULT
    """best.ckpt or last.ckpt of a run, an export, or the name of a detector of this package."""
    out: str = "predictions"
    """What `save` names goes here."""
    save: Annotated[Kind | list[Kind] | None, "some of images, crops, json, jsonl, csv, coco"] = None
    """Images (for a video: a video), crops, json, jsonl, csv, coco; null: [images,json], streams [images,jsonl]."""
    device: str | None = None
    """Null: of a checkpoint the GPU if there is one, of an export the CPU."""
    threads: Threads | None = None
    """Threads of the processor that one prediction may use; null: as many as the runtime likes."""


def predict(options: PredictCommandOptions) -> None:
    """Search the source, and write what is found. Exit code 1 where some of it cannot be read, or written.

    Raises:
        InputError: nothing of it can be read, or an option, the checkpoint or the export is wrong.
    """
    source, out = options.source, Path(options.out)
    endless = is_endless(source)
    save = chosen(options.save, endless)
    places = Places(out, source, save)
    source = leave_out(source, out)
    predictor = load(options.ckpt, options.device, threads=options.threads)
    search = {name: getattr(options, name) for name in SearchOptions.model_fields}
    searched = predictor.search(source, PredictOptions(**search, on_error="report"))
    broken: list[str] = []
    images = objects = 0
    stop = Stop()
    with Results(places, predictor.class_names, endless) as results:
        with stop.ends() if endless else nullcontext():
            for image, found in progress(searched, "predict", count_images(source, options.every)):
                with stop.waits():
                    results.add(image, found)
                    if found.error is None:
                        images, objects = images + 1, objects + len(found)
                    else:
                        broken.append(found.error)
        if broken and not images:
            more = f" ({len(broken) - 1} more could not be read either.)" if len(broken) > 1 else ""
            raise InputError(broken[0] + more)
    log.info("%d objects in %d images: %s", objects, images, out)
    if broken:
        log.error("%d could not be read:%s", len(broken), "".join(f"\n  {error}" for error in broken))
    for reason in dict.fromkeys(results.lost.values()):
        lost = [name for name, why in results.lost.items() if why == reason]
        names = ", ".join(lost[:_NAMED]) + (" ..." if len(lost) > _NAMED else "")
        log.error("%d could not be written (%s), give another out=DIR for them: %s", len(lost), reason, names)
    if broken or results.lost:
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
        """The block is finished first: an image is in all results or in none."""
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


def is_endless(source: Any) -> bool:
    """Whether a camera or a stream is among the sources."""
    return any(map(is_endless, source)) if isinstance(source, list) else is_live(source)


def chosen(save: Kind | list[Kind] | None, endless: bool) -> list[str]:
    """The kinds of results to write, each once, in the order of WRITERS."""
    if save is None:
        save = ["images", "jsonl" if endless else "json"]
    given = save if isinstance(save, list) else [save]
    if endless and (late := [one for one in given if one not in LIVE_WRITERS]):
        raise InputError(
            f"save: {', '.join(late)} is written at the end, which a camera or a stream does not have; "
            f"jsonl grows line by line: save=[images,jsonl]."
        )
    return [name for name in WRITERS if name in given]
