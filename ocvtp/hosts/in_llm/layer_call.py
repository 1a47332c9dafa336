"""What one call hands to the hooks in a language model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ocvtp.hosts.in_llm.deepstack import Deepstack
from ocvtp.hosts.in_llm.drop import Pass
from ocvtp.hosts.in_llm.plan import LayerPlan
from ocvtp.towers.recordings import TowerCall


@dataclass
class LayerCall(TowerCall):
    """The part of a call that hooks in a language model know.

    Attributes:
        plan: what to drop of the prompt that the language model is about to read.
        layer_pass: the current run through the language model, if tokens are or were dropped in it.
        deepstack: rows that it is about to add to its hidden states.
        has_added: whether it took them.
    """

    plan: LayerPlan | None = field(default=None, kw_only=True)
    layer_pass: Pass | None = field(default=None, kw_only=True)
    deepstack: Deepstack | None = field(default=None, kw_only=True)
    has_added: bool = field(default=False, kw_only=True)

    @contextmanager
    def reading(self, plan: LayerPlan | None, deepstack: Deepstack | None) -> Iterator[None]:
        """Let the language model read a short prompt inside the block.

        Raises:
            RuntimeError: if it did not add the rows of deepstack.
        """
        self.plan, self.deepstack, self.has_added = plan, deepstack, False
        try:
            yield
        finally:
            self.plan = self.deepstack = None
        if deepstack is not None and not self.has_added:
            raise RuntimeError(
                "the language model ran but the hook on it did not fire, so it did not add what the"
                " vision tower has for its layers; attach the pruner before the language model is"
                " compiled or exported, and replace no modules while a call runs."
            )
