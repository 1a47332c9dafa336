"""Train an OC-pruner: `python train.py --config configs/train/scenes.yaml`."""

import sys

from ocvtp.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
