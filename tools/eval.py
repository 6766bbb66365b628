"""Score a checkpoint, an export or anybody's detections: `python tools/eval.py --help`."""

from detector.cli import main

if __name__ == "__main__":
    main("eval")
