"""Turn a file of pre-trained weights into one for a backbone here: `python tools/import_weights.py --help`."""

from detector.cli import main

if __name__ == "__main__":
    main("import_weights")
