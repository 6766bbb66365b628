"""A page to try a detector in, and an HTTP interface: pictures in, boxes out.

python tools/serve.py ckpt=RUN_DIR/best.ckpt              then open http://127.0.0.1:8000
python tools/serve.py ckpt=RUN_DIR/best.ckpt port=9000
curl -F image=@street.jpg http://127.0.0.1:8000/predict   the same from the command line
"""

from __future__ import annotations

from omegaconf import DictConfig

import detector
from detector.serve import serve
from detector.serve.limits import Limits
from launch import launch, plain


def main(config: DictConfig) -> None:
    settings = plain(config)
    limits = Limits(**settings.pop("limits"))  # before the seconds that a detector takes to load
    predictor = detector.load(settings.pop("ckpt"), settings.pop("device"))
    serve(predictor, limits=limits, **settings)


if __name__ == "__main__":
    launch(main, config_name="serve")
