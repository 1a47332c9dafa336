"""Pruners: one file per method; importing this package registers them all."""

from ocvtp.pruners import fastervlm, none, ocvtp, random, uniform
from ocvtp.pruners.base import Pruner
from ocvtp.pruners.registry import build_pruner, list_pruners, pruner_class, register

__all__ = [
    "Pruner",
    "build_pruner",
    "fastervlm",
    "list_pruners",
    "none",
    "ocvtp",
    "pruner_class",
    "random",
    "register",
    "uniform",
]
