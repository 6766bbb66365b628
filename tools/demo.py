"""The whole journey in one command: data, training, evaluation, prediction. `make demo` calls it.

python tools/demo.py                    any override of tools/train.py may follow, for example backbone=v2_0.5x
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
RUN_DIR = Path("runs/demo/latest")
IMAGES = 8


def step(*arguments: str) -> float:
    """Run one tool as a user would type it; returns seconds. Leaves with its exit code where it fails."""
    print(f"\n$ python {' '.join(arguments)}", flush=True)
    start = time.perf_counter()
    outcome = subprocess.run([sys.executable, str(TOOLS / Path(arguments[0]).name), *arguments[1:]])
    if outcome.returncode:
        sys.exit(outcome.returncode)
    return time.perf_counter() - start


def held_out_images(source: Path, target: Path) -> None:
    """Copies of a few validation images: what `source=FOLDER` is shown with."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in sorted(source.glob("val_*"))[:IMAGES]:
        shutil.copy(path, target)


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    shutil.rmtree(RUN_DIR, ignore_errors=True)
    seconds = step("tools/train.py", "recipe=demo", f"run_dir={RUN_DIR}", "overwrite=true", *sys.argv[1:])
    step("tools/eval.py", f"ckpt={RUN_DIR}/best.ckpt", f"out={RUN_DIR}/eval")
    held_out_images(Path("data/shapes/images"), RUN_DIR / "held_out")
    step("tools/predict.py", f"ckpt={RUN_DIR}/best.ckpt", f"source={RUN_DIR}/held_out", f"out={RUN_DIR}/predictions")
    print(
        f"\nTraining took {seconds / 60:.1f} minutes. Everything lies in {RUN_DIR}:\n"
        "  best.ckpt, last.ckpt       the detector\n"
        "  eval/report.html           why it errs: open it in a browser\n"
        "  eval/metrics.json          the table above; eval/detections.json in COCO's results format\n"
        "  predictions/*.png          held-out images with boxes\n"
        "  curves.png, metrics.csv    how training went; train_batch.png: what it saw\n"
        "\nYour own data, a folder with images/ and annotations/{train,val}.json:\n"
        "  .venv/bin/python tools/train.py recipe=finetune data.root=DIR\n"
        "Your own images:\n"
        f"  .venv/bin/python tools/predict.py ckpt={RUN_DIR}/best.ckpt source=FOLDER"
    )


if __name__ == "__main__":
    main()
