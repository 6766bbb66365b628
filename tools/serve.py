"""A page to try a detector in, and an HTTP interface: pictures in, boxes out.

python tools/serve.py ckpt=RUN_DIR/best.ckpt              then open http://127.0.0.1:8000
python tools/serve.py ckpt=RUN_DIR/best.ckpt port=9000
curl -F image=@street.jpg http://127.0.0.1:8000/predict   the same from the command line

Ctrl-C or SIGTERM ends it, with exit code 0, when what is under way is answered; while it still loads, at once.
"""

from __future__ import annotations

import os
import signal

from launch import DictConfig, launch, plain

import detector
from detector.apps.serve import serve
from detector.apps.serve.limits import Limits


def main(config: DictConfig) -> None:
    # Until it serves there is nothing to answer. Process 1 of a container has no default action, and would go on.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    settings = plain(config)
    limits = Limits(**settings.pop("limits"))  # before the seconds that a detector takes to load
    predictor = detector.load(settings.pop("ckpt"), settings.pop("device"), threads=settings.pop("threads"))
    serve(predictor, limits=limits, **settings)


if __name__ == "__main__":
    launch(main, config_name="serve")
