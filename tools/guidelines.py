"""The paper's guidelines on this machine: `python tools/guidelines.py --help`."""

from detector.cli import main

if __name__ == "__main__":
    main("guidelines")
