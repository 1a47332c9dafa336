"""The OC-pruner as a scorer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ocvtp.field_types import LAYERS, Ranges
from ocvtp.selectors.budgets import NumKeep
from ocvtp.selectors.scorer import Scorer, Scores, Widths, register_scorer
from ocvtp.slots.attention import Truncation
from ocvtp.slots.config import NetworkSizes, OCPrunerConfig
from ocvtp.slots.matching import token_shares
from ocvtp.slots.network import OCPruner
from ocvtp.structures import Needs, VisualTokens


@register_scorer("slots")
@dataclass(eq=False)
class Slots(Scorer):
    """A token's score is its largest share in a slot, of as many slots as tokens are kept.

    Paper: https://arxiv.org/abs/2511.20439, where each slot keeps one token.

    Args:
        layer: it reads `hidden_states[layer]` of the tower.
        num_slots: S where no budget is told.
        hidden_dim: see `ocvtp.slots.config.NetworkSizes`, as all that follow.
    """

    ranges: ClassVar[Ranges] = {**NetworkSizes.ranges, "layer": LAYERS, "num_slots": (1, 2**20)}

    layer: int = 9
    num_slots: int = 64
    hidden_dim: int = 2048
    slot_dim: int = 512
    ffn_dim: int = 2048
    num_iterations: int = 3
    dropout: float = 0.01
    truncation: Truncation = "bilevel"
    noise_rows: int = 1024
    noise_seed: int = 0
    frozen_queries: bool = False
    standardize: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(hidden=(self.layer,))

    def build(self, widths: Widths) -> None:
        own = {name: getattr(self, name) for name in _SIZES}
        config = OCPrunerConfig(feature_dim=widths.tower, layer=self.layer, tower=None, **own)
        self.network = OCPruner(config)

    def forward(self, tokens: VisualTokens, num_keep: NumKeep | None = None) -> Scores:
        """See `Scorer.forward`; `aux` holds `slots` [B, S, C] and `attention` [B, S, N]."""
        features = tokens.hidden[self.layer].to(self.network.queries.mean.dtype)
        if tokens.valid is not None:
            features = features.masked_fill(~tokens.valid[:, :, None], 0.0)
        if isinstance(num_keep, Tensor):
            raise ValueError(
                "scorer 'slots' makes as many slots as tokens are kept, the same number for all"
                " images of a batch, and these differ in size; pass budgets in whole tokens in"
                " place of shares."
            )
        num_slots = num_keep or self.num_slots
        slots, attention = self.network.assign(features, num_slots, valid=tokens.valid)
        values = token_shares(attention).amax(dim=1)
        return Scores(values.float(), {"slots": slots, "attention": attention})

    def statistics(self) -> list[tuple[int | str, object]]:
        return [*self.network.statistics()]


def read_oc_pruner(source: str | Path, **options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An exported OC-pruner as this scorer.

    Args:
        source: folder, or model id of the hub.
        options: see `PrunerNetwork.from_pretrained`.

    Returns:
        settings of `ocvtp.selectors.network.SelectorConfig`, and the scorer's weights by name.

    Raises:
        ValueError: as `from_pretrained`.
    """
    network = OCPruner.from_pretrained(source, **options)
    config, own = network.config, ("decoder.", "targets.")
    budgets = sorted(config.num_slots)
    sizes = {name: getattr(config, name) for name in _SIZES} | {"layer": config.layer}
    if budgets:
        sizes["num_slots"] = budgets[len(budgets) // 2]
    shared = ("tower", "grid_hw", "layout", "preprocessing", "num_slots", "objective", "training")
    settings = {name: getattr(config, name) for name in shared} | {
        "scorer": Slots.name,
        "sizes": sizes,
        "widths": asdict(Widths(projected=0, tower=config.feature_dim)),  # it reads the tower alone
    }
    weights = network.state_dict().items()
    return settings, {f"network.{k}": v for k, v in weights if not k.startswith(own)}


OC_PRUNER = OCPruner.format
_SIZES = tuple(f.name for f in fields(NetworkSizes) if f.name != "choice")
