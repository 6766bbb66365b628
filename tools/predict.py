"""Find objects in images, videos and streams: `python tools/predict.py --help`."""

from detector.cli import main

if __name__ == "__main__":
    main("predict")
