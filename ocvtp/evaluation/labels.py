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

MEANINGS = {
    RANDOM: "keeps tokens at random",
    "uniform": "keeps tokens at equal steps",
    POOL: "averages neighbouring tokens, as if the image had been smaller",
    DOWNSAMPLE: "is the whole model on a smaller image",
    "fps": "keeps tokens that are far from each other",
    "kmeans": "keeps the tokens nearest to the centres of clusters",
    "fill_only": "keeps the tokens that receive the most attention",
    UNTRAINED: "is a trained pruner's network with random weights",
    SHUFFLED: "asks about another image",
    ORACLE: "knows where the objects are",
}
"""What controls do, after their labels."""

ORIGINAL = " (original positions)"
"""What follows the label of a pruner whose tokens keep the positions that they had."""
