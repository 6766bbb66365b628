"""Find objects in pictures: annotated copies and one JSON file.

python tools/predict.py ckpt=RUN_DIR/best.ckpt source=street.jpg
python tools/predict.py ckpt=RUN_DIR/best.ckpt source=FOLDER out=DIR score_threshold=0.5
"""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from detector.api import Detector
from detector.files import replacing, write_json
from detector.predictor import expand_sources
from launch import launch

log = logging.getLogger(__name__)


def main(config: DictConfig) -> None:
    detector = Detector.load(config.ckpt, config.device)
    source, out = Path(str(config.source)), Path(str(config.out))  # a folder may be called 2024
    sources = expand_sources(source)
    root = source if source.is_dir() else source.parent
    found = []
    stream = detector.stream(sources, score_threshold=config.score_threshold, batch_size=config.batch_size)
    for detections in tqdm(stream, total=len(sources), unit="picture", disable=None):
        # The folder's own layout, so that two pictures of one name do not overwrite each other.
        place = out / Path(str(detections.path)).relative_to(root).with_suffix(".png")
        with replacing(place) as partial:
            detections.draw(threshold=config.score_threshold).save(partial)
        found.append(detections.to_dict() | {"annotated": str(place)})
    write_json(out / "detections.json", found)
    log.info("%d objects in %d pictures: %s", sum(len(d["scores"]) for d in found), len(found), out)


if __name__ == "__main__":
    launch(main, config_name="predict")
