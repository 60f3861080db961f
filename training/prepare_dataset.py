"""The path that existing guides name: `python training/prepare_dataset.py …` is `cogvideox-factory prepare …`."""

import sys

from cogvideox_factory.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["prepare", *sys.argv[1:]]))
