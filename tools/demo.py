"""The whole journey in one command: boxes on photographs, data, training, evaluation, prediction. `make demo` calls it.

python tools/demo.py                    options of tools/train.py may follow, for example backbone=v2_1x
python tools/demo.py photographs        the first step alone: a detector of the package on two photographs, in seconds
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from detector.errors import InputError, require
from detector.inference import shipped

TOOLS = Path(__file__).resolve().parent
RUN_DIR = Path("runs/demo/latest")
PHOTOGRAPHS = Path("runs/demo/photographs")
# Of scikit-image's wheel: Eileen Collins, by NASA, in the public domain; and a cat by Stefan van der Walt, CC0.
NAMES = ("astronaut", "chelsea")
IMAGES = 8


def step(*arguments: str) -> float:
    """Run one tool as a user would type it; returns seconds. Leaves with its exit code where it fails."""
    print(f"\n$ python {' '.join(arguments)}", flush=True)
    start = time.perf_counter()
    outcome = subprocess.run([sys.executable, str(TOOLS / Path(arguments[0]).name), *arguments[1:]])
    if outcome.returncode:
        sys.exit(outcome.returncode)
    return time.perf_counter() - start


def photographs() -> None:
    """What a detector of the package finds on two photographs, each as a PNG, and both side by side."""
    import detector

    try:
        data = require("skimage.data", package="[demo]", what="The step with photographs")
    except InputError as error:
        print(f"\nLeft out: {error}")
        return
    print(f"\n>>> detector.predict(photograph)    # skimage.data.{', '.join(NAMES)}", flush=True)
    images = [getattr(data, name)() for name in NAMES]
    PHOTOGRAPHS.mkdir(parents=True, exist_ok=True)
    shown = []
    for name, image, found in zip(NAMES, images, detector.predict(images), strict=True):
        print(
            f"{name}: {', '.join(f'{one} {score:.2f}' for one, score in zip(found.names, found.scores, strict=True))}"
        )
        shown.append(found.draw(image))
        shown[-1].save(PHOTOGRAPHS / f"{name}.png")
    height = min(one.height for one in shown)
    shown = [one.resize((round(one.width * height / one.height), height)) for one in shown]
    both = Image.new("RGB", (sum(one.width for one in shown), height))
    for place, one in enumerate(shown):
        both.paste(one, (sum(before.width for before in shown[:place]), 0))
    both.save(PHOTOGRAPHS / "both.png")
    print(f"{PHOTOGRAPHS}/*.png", flush=True)


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
    if shipped.names():
        photographs()
    if sys.argv[1:] == ["photographs"]:
        return
    if wrong := [word for word in sys.argv[1:] if word.startswith(("run_dir=", "data.", "data="))]:
        sys.exit(
            f"error: {wrong[0]}: the demo trains on the embedded data, into {RUN_DIR}. Use tools/train.py for that."
        )
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
        "Beside it, photographs/*.png: what a detector of the package finds, if one is there\n"
        "\nYour own data, in COCO's, Pascal VOC's or YOLO's layout:\n"
        "  .venv/bin/python tools/train.py recipe=finetune data.root=DIR\n"
        "Your own photographs, by v2_1x_voc of this package (what was trained here knows drawn shapes alone):\n"
        "  .venv/bin/python tools/predict.py source=FOLDER"
    )


if __name__ == "__main__":
    main()
