"""What every trainable pruner is made of: its network, what that is trained for, its files."""

from typing import TYPE_CHECKING

from ocvtp.lazy import lazy_names

if TYPE_CHECKING:
    from ocvtp.learning.network import NetworkConfig, PrunerNetwork, Sizes
    from ocvtp.learning.objective import Objective, Outcome

__all__ = ["NetworkConfig", "Objective", "Outcome", "PrunerNetwork", "Sizes"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "NetworkConfig": "network",
        "PrunerNetwork": "network",
        "Sizes": "network",
        "Objective": "objective",
        "Outcome": "objective",
    },
)
