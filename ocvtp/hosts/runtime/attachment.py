"""What an attached model carries: its pruner, and all that was decided when it was attached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from ocvtp.choices import Positions
from ocvtp.hosts.base import Host, Savings
from ocvtp.hosts.prompt.read_call import Encode, encode_now, look
from ocvtp.hosts.prompt.read_prompt import Reader
from ocvtp.hosts.prompt.select import Select, select
from ocvtp.hosts.prompt.shorten import Prompt, Shortened, shorten
from ocvtp.hosts.runtime.call_budgets import CallBudgets, inside_block, of_block
from ocvtp.hosts.runtime.forward_output import Logits
from ocvtp.hosts.runtime.installed_hooks import InstalledHooks
from ocvtp.pruners import Compose, Pruner
from ocvtp.pruners.budgets import Budget
from ocvtp.pruners.layer_pruner import LayerPruner
from ocvtp.structures import Needs, Stage
from ocvtp.transformers_names import cache_name

_ON_MODEL = "_ocvtp_attachment"
IN_TOWER: tuple[Stage, ...] = ("pixels", "encoder")


@dataclass
class Attachment:
    """A pruner in a model; the arguments are those of `ocvtp.attach`, made ready.

    Args:
        host: of the model.
        given: the caller's pruner. pruner: the same with the budget that it was attached with.
        parts: of that, by their stages.
        needs: of all that reads the tower.
        reader: of prompts; None if nothing reads them.
        encode: what runs the tower. select: what runs the pruner.
        keeps_all: whether nothing is pruned, so that nothing may be left out.
        cache_name: what this version of transformers calls the KV cache.
    """

    host: Host
    given: Pruner | Compose
    pruner: Pruner | Compose
    parts: Mapping[Stage, Pruner]
    needs: Needs
    positions: Positions
    on_prune: Callable[[Prompt], None] | None
    reader: Reader | None = None
    encode: Encode = encode_now
    select: Select = select
    logits: Logits = "short"
    keeps_all: bool = False
    cache_name: str = field(default_factory=cache_name)
    hooks: InstalledHooks = field(init=False)
    savings: Savings = field(init=False)
    """Those that have an effect."""

    @property
    def layers(self) -> LayerPruner | None:
        """What drops tokens inside the language model."""
        return _layers_in(self.parts)

    def put(self) -> None:
        """Put everything into the model, or nothing if that fails."""
        vars(self.host.model)[_ON_MODEL] = self
        try:
            self.hooks.renew()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Leave the model as it was; may be called more than once."""
        self.hooks.remove()
        attributes = vars(self.host.model)
        if attributes.get(_ON_MODEL) is self:  # not removed before
            del attributes[_ON_MODEL]

    def with_budget(self, budget: Budget | None) -> Mapping[Stage, Pruner]:
        """The parts of the pruner by their stages, with another budget.

        Raises:
            ValueError: if it cannot have another one.
        """
        if budget is None:
            return self.parts
        if in_tower := [self.parts[stage].name for stage in IN_TOWER if stage in self.parts]:
            raise ValueError(
                f"pruner {in_tower[0]!r} acts before or inside the vision tower, which is made"
                f" ready for its budget when it is attached, so that {budget.said} cannot be that"
                " of a call; attach it with that budget, or use a pruner of stage llm_input or"
                " llm_layers (see `ocvtp list`)."
            )
        return by_stage(self.pruner.with_budget(budget))

    def inside_block(self, budget: Budget) -> AbstractContextManager[None]:
        """Inside the block, calls of this thread have another budget.

        Raises:
            ValueError: if the pruner cannot have it.
        """
        budgets = CallBudgets.of(budget)
        self.with_budget(budgets.budgets[0])
        return inside_block(self, budgets)

    def shorten(
        self, inputs: dict[str, Any], whole: bool = False, budgets: CallBudgets | None = None
    ) -> Shortened:
        """The short inputs and the prompt, reported.

        Args:
            inputs: of the call.
            whole: see `look`.
            budgets: what the call says; None for that of a block around it, or of the pruner.
        """
        budgets = of_block(self) if budgets is None else budgets
        own, of_rows, ids = self.parts, None, inputs.get("input_ids")
        if budgets is not None and ids is not None:
            rows = budgets.of_rows(len(ids))
            made = {budget: self.with_budget(budget) for budget in dict.fromkeys(rows)}
            own = made[rows[0]]
            of_rows = [made[budget] for budget in rows] if len(made) > 1 else None
        self.hooks.renew()
        seen = look(self.host, self.needs, inputs, self.reader, self.encode, whole)
        settings = (self.positions, _layers_in(own), self.select, of_rows)
        short = shorten(self.host, own.get("llm_input"), inputs, seen, *settings)
        if self.on_prune is not None:
            self.on_prune(short.prompt)
        return short


def by_stage(pruner: Pruner | Compose) -> dict[Stage, Pruner]:
    """The parts of a pruner, at most one of each stage."""
    return {part.stage: part for part in pruner.parts}


def _layers_in(parts: Mapping[Stage, Pruner]) -> LayerPruner | None:
    found = parts.get("llm_layers")
    assert found is None or isinstance(found, LayerPruner)
    return found


def attachment_of(model: Any) -> Attachment | None:
    """What a model carries; None without a pruner."""
    found: Attachment | None = vars(model).get(_ON_MODEL)
    return found
