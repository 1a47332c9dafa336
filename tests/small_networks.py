"""Small networks of random weights for the pruners that take a trained one."""

from __future__ import annotations

from typing import Any

import torch

from ocvtp.learning import NetworkConfig
from ocvtp.pruners import trainable
from ocvtp.selectors.network import SelectorConfig, SelectorNetwork
from ocvtp.selectors.scorer import Widths
from ocvtp.slots import OCPruner, OCPrunerConfig
from ocvtp.surprise.network import SurpriseNetwork, SurpriseSizes

TRAINED = tuple(trainable.trainables())
"""Names of these pruners."""

SELECTORS = {"learned": "llm_input", "learned_layers": "llm_layers"}
"""Those that take a scorer, and where they act."""
SCORER_SIZES = {
    "pointwise": {"dim": 16},
    "prompted": {"dim": 16, "blocks": 1, "heads": 2},
    "slots": {"layer": 3, "hidden_dim": 16, "slot_dim": 4, "ffn_dim": 8},
    "vip": {"block": 2, "hidden": [3, 1], "dim": 8, "condition": 8, "blocks": 1, "heads": 2},
}
"""Small ones by name."""


def selector(
    stage: Any,
    feature_dim: int,
    scorer: str = "pointwise",
    projected_dim: int | None = None,
    heads: int = 0,
    **config: Any,
) -> SelectorNetwork:
    """A learned selector of random weights.

    Args:
        stage: where it acts.
        feature_dim: D. projected_dim: D', the same where nothing is said.
        scorer: its name.
        heads: of the language model's attention.
        config: more of its config.
    """
    config = {
        "layer": 3 if stage == "llm_layers" else None,
        "sizes": SCORER_SIZES.get(scorer, {}),
    } | config
    widths = Widths(projected_dim or feature_dim, feature_dim, heads)
    settings = SelectorConfig(scorer=scorer, stage=stage, widths=widths, **config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SelectorNetwork(settings).eval()


def network_setting(
    name: str,
    feature_dim: int,
    grid_hw: tuple[int, int] = (4, 4),
    projected_dim: int | None = None,
    **config: Any,
) -> dict[str, Any]:
    """The setting `network` of a pruner; none, of one that takes none.

    Args:
        name: of the pruner.
        feature_dim: D.
        grid_hw: that the network is made for.
        projected_dim: D', the same as D where nothing is said.
        config: more of its config; it reads layer 3 where nothing is said.
    """
    given: dict[str, Any] = {"feature_dim": feature_dim, "grid_hw": grid_hw, "layer": 3} | config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "ocvtp":
            sizes = {"hidden_dim": 16, "slot_dim": 4, "ffn_dim": 8}
            return {"network": OCPruner(OCPrunerConfig(**sizes | given)).eval()}
        if name == "surprise":
            sizes = SurpriseSizes(hidden_dim=4, reach=1)
            return {"network": SurpriseNetwork(NetworkConfig(sizes=sizes, **given)).eval()}
        if name in SELECTORS:
            return {
                "network": selector(
                    SELECTORS[name], feature_dim, projected_dim=projected_dim, **config
                )
            }
    return {}
