from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ocvtp import slots
from ocvtp.lazy import LazyFact
from ocvtp.ops.selection import ascending, fill_up
from ocvtp.pruners.base import Status
from ocvtp.pruners.registry import register
from ocvtp.pruners.trainable import TrainablePruner
from ocvtp.slots.attention import slot_winners
from ocvtp.slots.config import Choice, check_choice, layers_read
from ocvtp.structures import AttentionKey, Needs, Selection, VisualTokens


@register("ocvtp")
@dataclass(kw_only=True, eq=False)
class OCVTP(TrainablePruner["slots.OCPruner"]):
    """OC-VTP: keep the token that each slot of a trained Slot Attention attends to most.

    Paper: https://arxiv.org/abs/2511.20439, section 3.

    Slots that share a token leave room; it is filled by the attention of one block of the tower. By
    the choice `one_to_one` or `restore` (of the objective `kept`) they share none.
    With `early`, the stage is `encoder`: blocks after that layer run on the kept tokens alone.

    Args:
        num_keep: tokens kept per image; paper: 192, 128 or 64 of 576.
        checkpoint: folder or hub id of an exported OC-pruner.
        network: an OC-pruner in memory, instead of `checkpoint`. It moves to the tokens' device.
        num_slots: S; None for `num_keep` slots, as in the paper.
        fill: which attention fills up: `received` (paper) or the `cls` row.
        fill_block: of the tower, where it is read; None for the second to last (paper), with
            `early` for the one whose output the network reads.
        early: whether dropped tokens are left out of the tower's remaining blocks.
        choice: how slots choose, see `ocvtp.slots.choosing`; None for the network's own.
    Deviations: the query noise is a table saved with the weights, so that selections are
        reproducible; exactly K tokens in any batch (the official code keeps K + 1 with the CLS, at
        batch 1). `early`, which fills up by its layer, and `choice` are ours.
    """

    num_slots: int | None = None
    fill: Literal["received", "cls"] = "received"
    fill_block: int | None = None
    early: bool = False
    choice: Choice | None = None

    title: ClassVar[str] = (
        "OC-VTP: keep the token that each slot of a trained Slot Attention attends to most."
    )
    reads: ClassVar[str] = "hidden (layer of the network), attention"
    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2511.20439"
    network_class = LazyFact("ocvtp.slots.network.OCPruner")
    objective_class = LazyFact("ocvtp.slots.objectives.SlotsObjective")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fill not in ("received", "cls"):
            raise ValueError(f"fill={self.fill!r}; pass 'received' or 'cls'.")
        check_choice(self.trained.config, self._choice)
        if self.early and self._choice == "restore":
            raise ValueError("early=True cannot 'restore' a later layer; pass choice='one_to_one'.")
        if self.early:
            self.stage = "encoder"  # type: ignore[misc]

    @property
    def needs(self) -> Needs:
        fill = (self._fill_attention,) if self._choice == "winners" else ()
        return Needs(hidden=layers_read(self.trained.config, self._choice), attention=fill)

    @property
    def tower_needs(self) -> Needs:
        """What it `needs`; nothing if it acts inside of the tower."""
        return Needs() if self.early else self.needs

    @property
    def _choice(self) -> Choice:
        return self.choice or self.trained.config.choice

    @property
    def _fill_attention(self) -> AttentionKey:
        if self.fill_block is not None:
            return self.fill_block, self.fill
        layer = self.trained.config.layer
        before = layer - 1 if layer > 0 else layer  # hidden_states[-2] is what block -2 gives
        return (before if self.early else -2), self.fill

    def masks(self, tokens: VisualTokens) -> Tensor:
        """The slots' attention [B, S, N]."""
        return self._attend(tokens, self.budget(tokens.num_tokens))

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        attention = self._attend(tokens, num_keep)
        if self._choice != "winners":
            chosen = self.trained.choose(tokens, attention, num_keep, self._choice)
            return ascending(chosen, tokens.valid, tokens.num_tokens)
        scores = tokens.attention[self._fill_attention]
        return fill_up(slot_winners(attention), scores, num_keep, tokens.valid)

    def _attend(self, tokens: VisualTokens, num_keep: int) -> Tensor:
        network: slots.OCPruner = self.ready(tokens)
        features = tokens.hidden[network.config.layer].to(network.queries.mean.dtype)
        return network.assign(features, self.num_slots or num_keep, valid=tokens.valid)[1].detach()
