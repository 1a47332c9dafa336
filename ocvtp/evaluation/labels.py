"""Labels of the rows that are no pruner's own: what results of any version call them.

Apart from `conditions`, which makes them: reading results needs neither pruners nor PyTorch.
"""

from __future__ import annotations

UNPRUNED, SHUFFLED, RANDOM, ORACLE, UNTRAINED, POOL, DOWNSAMPLE = (
    "unpruned",
    "shuffled",
    "random",
    "oracle",
    "untrained",
    "pool",
    "downsample",
)
CONTROLS = (RANDOM, "uniform", POOL, DOWNSAMPLE, "fill_only", UNTRAINED, ORACLE)
"""What runs besides all pruners, at every budget."""

ORIGINAL = " (original positions)"
"""What follows the label of a pruner whose tokens keep the positions that they had."""
