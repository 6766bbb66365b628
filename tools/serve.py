"""Serve a detector over HTTP: `python tools/serve.py --help`."""

from detector.cli import main

if __name__ == "__main__":
    main("serve")
