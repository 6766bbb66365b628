"""Score a checkpoint, or anybody's detections, and write a report that shows where they err.

python tools/eval.py ckpt=RUN_DIR/best.ckpt                     on the validation split it was trained with
python tools/eval.py ckpt=PATH data.root=DIR data.val.annotations=annotations/test.json out=DIR
python tools/eval.py results=detections.json annotations=instances.json images=DIR   COCO's formats, no model
"""

from __future__ import annotations

from launch import launch, plain

from omegaconf import DictConfig


def main(config: DictConfig) -> None:
    # Imported here: results are scored without torch and Lightning.
    if config.results:
        from detector.apps.report.reporting import evaluate_results

        evaluate_results(plain(config))
    else:
        from detector.apps.evaluate import evaluate

        evaluate(plain(config))


if __name__ == "__main__":
    launch(main, config_name="eval")
