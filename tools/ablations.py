"""ShuffleNet's ablations in small: `python tools/ablations.py --help`."""

from detector.cli import main

if __name__ == "__main__":
    main("ablations")
