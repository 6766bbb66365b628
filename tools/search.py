"""A detector for this machine, under a latency target: `python tools/search.py --help`."""

from detector.cli import main

if __name__ == "__main__":
    main("search")
