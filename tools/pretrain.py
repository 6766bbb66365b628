"""Pre-train a backbone as an image classifier: `python tools/pretrain.py --help`."""

from detector.cli import main

if __name__ == "__main__":
    main("pretrain")
