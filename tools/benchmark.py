"""Measure on this machine: `python tools/benchmark.py --help`."""

from detector.cli import main

if __name__ == "__main__":
    main("benchmark")
