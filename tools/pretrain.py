"""Pre-train a backbone as an image classifier.

python tools/pretrain.py backbone=v2_1x data.root=DIR       DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, the ImageNet
                                                            recipe of the ShuffleNet V2 paper
python tools/pretrain.py backbone=v2_0.5x pretrain=crops    embedded data, minutes on a CPU
python tools/pretrain.py ckpt=RUN_DIR/last.ckpt resume=true go on where a run stopped

RUN_DIR/best.pth is what tools/train.py takes as backbone.weights=PATH.
"""

from __future__ import annotations

from launch import launch, plain

from omegaconf import DictConfig

from detector.training.pretrain import PretrainOptions, pretrain


def main(config: DictConfig) -> None:
    pretrain(PretrainOptions.parse(plain(config)))


if __name__ == "__main__":
    launch(main, config_name="pretrain")
