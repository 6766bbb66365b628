"""Score a checkpoint with COCO's twelve figures.

python tools/eval.py ckpt=RUN_DIR/best.ckpt                     on the validation split it was trained with
python tools/eval.py ckpt=PATH data.root=DIR data.val.annotations=annotations/test.json out=DIR
"""

from __future__ import annotations

from omegaconf import DictConfig

from detector.training.run import evaluate
from launch import launch, plain


def main(config: DictConfig) -> None:
    evaluate(plain(config))


if __name__ == "__main__":
    launch(main, config_name="eval")
