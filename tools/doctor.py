"""Examine a data set before training on it: `python tools/doctor.py --help`."""

from detector.cli import main

if __name__ == "__main__":
    main("doctor")
