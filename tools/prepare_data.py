"""Write a data set in another layout, or a split of one: `python tools/prepare_data.py --help`."""

from detector.cli import main

if __name__ == "__main__":
    main("prepare_data")
