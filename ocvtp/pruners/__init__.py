"""Pruners: their contracts, and by importing this package all methods that come with it."""

from ocvtp.pruners import methods as methods
from ocvtp.pruners.base import AdaptivePruner, Pruner, QualityPruner
from ocvtp.pruners.chain import Chain
from ocvtp.pruners.compose import Compose
from ocvtp.pruners.layer_pruner import LayerPruner
from ocvtp.pruners.registry import build_pruner, list_pruners, pruner_class, register

__all__ = [
    "AdaptivePruner",
    "Chain",
    "Compose",
    "LayerPruner",
    "Pruner",
    "QualityPruner",
    "build_pruner",
    "list_pruners",
    "pruner_class",
    "register",
]
