"""Small networks of random weights for the pruners that take a trained one."""

from __future__ import annotations

from typing import Any

import torch

from ocvtp.learning import NetworkConfig
from ocvtp.pruners import trainable
from ocvtp.slots import OCPruner, OCPrunerConfig
from ocvtp.surprise.network import SurpriseNetwork, SurpriseSizes

TRAINED = tuple(trainable.trainables())
"""Names of these pruners."""


def network_setting(
    name: str, feature_dim: int, grid_hw: tuple[int, int] = (4, 4), **config: Any
) -> dict[str, Any]:
    """The setting `network` of a pruner; none, of one that takes none.

    Args:
        name: of the pruner.
        feature_dim: D.
        grid_hw: that the network is made for.
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
    return {}
