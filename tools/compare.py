"""Compare two detectors: `python tools/compare.py --help`."""

from detector.cli import main

if __name__ == "__main__":
    main("compare")
