"""The OC-pruner's network and what it is trained for."""

from typing import TYPE_CHECKING

from ocvtp.lazy import lazy_names

if TYPE_CHECKING:
    from ocvtp.slots.config import OCPrunerConfig
    from ocvtp.slots.network import OCPruner

__all__ = ["OCPruner", "OCPrunerConfig"]

__getattr__, __dir__ = lazy_names(__name__, {"OCPruner": "network", "OCPrunerConfig": "config"})
