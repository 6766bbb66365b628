"""Write a checkpoint for other runtimes: `python tools/export.py --help`."""

from detector.cli import main

if __name__ == "__main__":
    main("export")
