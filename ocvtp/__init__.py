"""ocvtp: train, export, plug in and measure visual-token pruners.

Use: `with ocvtp.build_pruner("ocvtp", num_keep=64, checkpoint="checkpoints/NAME")(model):` and call
`model.generate(**processor(...))` inside the block.
"""

from typing import TYPE_CHECKING

from ocvtp.lazy import bind, lazy_names
from ocvtp.moved import find_moved

if TYPE_CHECKING:
    from ocvtp.hosts.attach import attach
    from ocvtp.pruners import Chain, Compose, Pruner, build_pruner, list_pruners
    from ocvtp.slots import OCPruner
    from ocvtp.structures import Needs, Selection, VisualTokens

__version__ = "0.2.0"

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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Chain": "pruners",
        "Compose": "pruners",
        "Needs": "structures",
        "OCPruner": "slots",
        "Pruner": "pruners",
        "Selection": "structures",
        "VisualTokens": "structures",
        "attach": "hosts",
        "build_pruner": "pruners",
        "list_pruners": "pruners",
    },
    parts=("encoders", "hosts", "pruners", "slots", "structures"),
)

bind("attached", home="ocvtp.hosts.attach")  # what `with pruner(model):` calls
find_moved()
