"""`python -m tools.demo_vlm --config cpu` is `ocvtp demo-vlm --config cpu`."""

import sys

from ocvtp.cli import main

sys.exit(main(["demo-vlm", *sys.argv[1:]]))
