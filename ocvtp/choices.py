"""What may be chosen by name, in functions and in flags alike.

Nothing is imported here, so that the command line can name what there is before it loads anything.
"""

from __future__ import annotations

from typing import Literal

Level = Literal["easy", "hard"]
"""How hard drawn scenes are to read."""
Split = Literal["train", "val", "test"]
"""Which drawn scenes."""

Coordinates = Literal["auto", "pixels", "unit", "thousand"]
"""In which numbers a model says where a box is: pixels of the picture that it sees, parts of its
edges from 0 to 1, or thousandths of them; `auto` is what models of its family do."""

Positions = Literal["contiguous", "original"]
"""Of tokens that are left: numbered from 0, or each as in the whole prompt."""

TileBudget = Literal["per_image", "per_tile"]
"""What `num_keep` counts where a model cuts images into tiles."""
Separators = Literal["rows", "all", "none"]
"""Which tokens that end rows of tiles stay."""

FAMILIES = {
    "llava": "llava.LlavaHost",
    "llava-next": "llava_next.LlavaNextHost",
    "llava-onevision": "llava_onevision.LlavaOnevisionHost",
    "internvl": "internvl.InternVLHost",
    "qwen2-vl": "qwen_vl.Qwen2VLHost",
    "qwen2.5-vl": "qwen_vl.Qwen25VLHost",
    "qwen3-vl": "qwen_vl.Qwen3VLHost",
}
"""Families of VLMs by name, and where their adapters are in `ocvtp.hosts.families`."""
TINY_MODELS = tuple(f"random:tiny-{family}" for family in FAMILIES)
"""VLMs of random weights that load at once, one of every family."""
FullSizeModel = Literal[
    "llava-1.5-7b", "llava-1.5-13b", "llava-mid", "llava-next-7b", "qwen2.5-vl-7b", "demo"
]
"""VLMs of random weights and of real size."""

SavingRows = Literal["default", "all", "none", "each"]
"""Which savings of hosts `ocvtp bench` measures."""

TableFormat = Literal["markdown", "latex", "csv"]
"""Of `ocvtp table`."""
Bold = Literal["best", "ci", "none"]
"""What a table sets off: the best figure of a column, all that cannot be told from it, or none."""

PlotKind = Literal["accuracy", "differences", "ttft", "stages", "tradeoff"]
"""What `ocvtp plot` draws: two of an evaluation, two of a benchmark, and one of both."""

Preferred = Literal["first", "second"]
"""Whose rows `ocvtp merge` takes where two files differ."""

TOLERANCE = 0.03
"""Of `ocvtp compare`. Changes below are not flagged: what a new process changes, where memory lies
and how fast the clock runs, is in the interval of no single run."""
