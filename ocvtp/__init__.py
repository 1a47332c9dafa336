"""ocvtp: train, export, plug in and measure visual-token pruners.

Use: `with ocvtp.build_pruner("ocvtp", num_keep=64, checkpoint="checkpoints/NAME")(model):` and call
`model.generate(**processor(...))` inside the block.
"""

from ocvtp.hosts import attach
from ocvtp.pruners import Chain, Compose, Pruner, build_pruner, list_pruners
from ocvtp.slots import OCPruner
from ocvtp.structures import Needs, Selection, VisualTokens

__version__ = "0.1.0"

__all__ = [
    "Chain",
    "Compose",
    "Needs",
    "OCPruner",
    "Pruner",
    "Selection",
    "VisualTokens",
    "attach",
    "build_pruner",
    "list_pruners",
]
