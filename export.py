"""Export a trained OC-pruner: `python export.py --checkpoint CKPT --output DIR`."""

import sys

from ocvtp.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
