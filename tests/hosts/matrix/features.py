"""All that a pruned model does: what is imported here adds itself to the table."""

from matrix import prompts, stages, wrappers
from matrix.checks import FEATURES, SLOW

__all__ = ["FEATURES", "SLOW", "prompts", "stages", "wrappers"]
