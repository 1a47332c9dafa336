"""The OC-pruner's network and what it is trained for."""

from ocvtp.slots.network import OCPruner, OCPrunerConfig

__all__ = ["OCPruner", "OCPrunerConfig"]
