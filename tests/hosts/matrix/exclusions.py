"""What a host, or a version of transformers, cannot do; each shows that it is so."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version

import pytest

from matrix import stages
from matrix.checks import GREEDY
from matrix.families import BATCH, Family
from ocvtp import attach, build_pruner


@dataclass(frozen=True)
class Exclusion:
    """One feature that is not to be had.

    Args:
        title: of the feature.
        hosts: that lack it.
        before: the version of transformers that has it.
        reason: for the table.
        shows: raises if a family has it nevertheless.
    """

    title: str
    hosts: tuple[str, ...]
    before: tuple[int, int]
    reason: str
    shows: Callable[[Family], None]


def bare_model_reads_no_chunks(family: Family) -> None:
    inputs = family.make(BATCH, "left")
    with pytest.raises(RuntimeError, match="must match the size of tensor"):
        deepcopy(family.model).generate(**inputs, **GREEDY, prefill_chunk_size=7)


def tower_is_refused(family: Family) -> None:
    for name in ("vprune", "tome"):
        with pytest.raises(ValueError, match="serves llm_input, llm_layers: pass"):
            attach(family.model, build_pruner(name, keep_ratio=0.5))


EXCLUSIONS = (
    Exclusion(
        title=stages.TOWER,
        hosts=("internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
        before=(1000, 0),
        reason="refused; these towers put neighbouring patches together, all of which they need",
        shows=tower_is_refused,
    ),
    Exclusion(
        title="prefill in chunks",
        hosts=("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
        before=(5, 18),
        reason="it cannot read these models' prompts in chunks, pruned or not",
        shows=bare_model_reads_no_chunks,
    ),
)


def find_exclusion(host: str, title: str) -> Exclusion | None:
    """The one that applies here."""
    installed = tuple(map(int, version("transformers").split(".")[:2]))
    for exclusion in EXCLUSIONS:
        if host in exclusion.hosts and title == exclusion.title and installed < exclusion.before:
            return exclusion
    return None
