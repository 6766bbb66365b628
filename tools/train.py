"""Train a detector.

python tools/train.py backbone=v2_1x                            the embedded data set, minutes on a CPU
python tools/train.py recipe=finetune data.root=DIR             your COCO-style folder, from ImageNet weights
python tools/train.py recipe=paper backbone=v2star_1x           a cell of the ShuffleNet V2 paper's table 7, on COCO
python tools/train.py ckpt=RUN_DIR/last.ckpt resume=true        go on where a run stopped
python tools/train.py trainer.devices=2 trainer.accelerator=cpu data parallel
"""

from __future__ import annotations

from launch import launch, plain

from omegaconf import DictConfig

from detector.training.run import TrainOptions, train


def main(config: DictConfig) -> None:
    train(TrainOptions.parse(plain(config)))


if __name__ == "__main__":
    launch(main, config_name="train")
