"""Pruners as people write them on a command line: `NAME:KEY=VALUE,...`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from ocvtp.field_types import shown
from ocvtp.plain_yaml import read_value
from ocvtp.pruners.base import Pruner, naming
from ocvtp.pruners.budgets import BUDGETS
from ocvtp.pruners.layer_pruner import LayerPruner
from ocvtp.pruners.registry import build_pruner, pruner_class, takes_named_setting

_BUDGET = re.compile(r"\bK\b")
_OF_K = ("num_keep", "keep_ratio")  # what a K may stand for
_NETWORKS = {"checkpoint", "network"}  # one stands for the other


def known_settings(spec: str) -> set[str]:
    """The settings that the pruner of a spec takes.

    Raises:
        ValueError: if there is no such pruner.
    """
    cls = pruner_class(spec.partition(":")[0])
    named = {"setting"} if cls.named_settings and takes_named_setting(cls) else set()
    return {f.name for f in dataclasses.fields(cls)} | named


def parse_spec(spec: str, kind: str = "pruner") -> tuple[str, dict[str, Any]]:
    """Name and settings; values are YAML, e.g. `fastv:stages=[[2,64]]`, and `1e-4` is a number.

    Args:
        spec: `NAME:KEY=VALUE,...`.
        kind: what messages call it.

    Raises:
        ValueError: if it does not parse.
    """
    name, _, text = spec.partition(":")
    settings: dict[str, Any] = {}
    for pair in filter(None, re.split(r",(?=\s*\w+=)", text)):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(
                f"{kind} {shown(spec)}: {shown(pair)} is no KEY=VALUE; write NAME:KEY=VALUE."
            )
        try:
            settings[key.strip()] = read_value(value)
        except ValueError as error:
            given = shown(spec)
            raise ValueError(
                f"{kind} {given}: {error}; write numbers, words or lists, e.g. stages=[[2,64]]."
            ) from error
    return name, settings


def names_budget(spec: str) -> bool:
    """Whether a K in the settings stands for the budget, e.g. `fastv:stages=[[2,K]]`."""
    return _BUDGET.search(spec.partition(":")[2]) is not None


def with_budget(spec: str, num_keep: int) -> str:
    """The spec, a number in place of the K in its settings."""
    name, colon, settings = spec.partition(":")
    return name + colon + _BUDGET.sub(str(num_keep), settings)


def names_setting(spec: str) -> bool:
    """Whether a spec names a published setting, e.g. `sparsevlm:setting=paper-64`."""
    name, settings = parse_spec(spec)
    return "setting" in settings and takes_named_setting(pruner_class(name))


def has_budget(spec: str) -> bool:
    """Whether a spec says itself how many tokens stay, so that a shared budget does not count.

    It does so by a budget of its own, a published setting, or `stages` of a pruner of stage
    `llm_layers` alone.
    """
    name, settings = parse_spec(spec)
    staged = "stages" in settings and issubclass(pruner_class(name), LayerPruner)
    return staged or names_setting(spec) or not settings.keys().isdisjoint(BUDGETS)


def has_own_budget(spec: str) -> bool:
    """Whether a pruner has one budget, whatever others are told: `has_budget`, without a K."""
    return has_budget(spec) and not names_budget(spec)


def says_amount(spec: str) -> bool:
    """Whether a pruner need not be told a budget: it has one, or knows what the kept must hold."""
    _, settings = parse_spec(spec)
    counts = settings.get("quality") is not None or settings.get("adaptive") is True
    return has_own_budget(spec) or counts and not names_budget(spec)


def runs_once(spec: str, are_told: bool) -> bool:
    """Whether a pruner runs at a budget of its own, and at no other.

    Args:
        spec: of it. are_told: whether there are budgets for all pruners.
    """
    return has_own_budget(spec) if are_told else says_amount(spec)


def refuse_without_amount(specs: Sequence[str]) -> None:
    """For commands that were told no budget for all pruners.

    Raises:
        ValueError: if there are none, and for the first that says none itself.
    """
    if not specs:
        raise ValueError("nothing says how many tokens stay; pass --num-keep, or --pruners.")
    if lacking := [spec for spec in specs if not says_amount(spec)]:
        raise ValueError(
            f"pruner {shown(lacking[0])} says no budget of its own; pass --num-keep, or a budget in"
            f" its settings, e.g. {lacking[0].partition(':')[0]}:num_keep=64."
        )


def refuse_unread(specs: Sequence[str], **shared: Any) -> None:
    """Refuse a setting for all pruners that counts for none of them.

    Budgets count where a spec says none itself, other settings where a pruner takes them and its
    spec does not say them.

    Args:
        specs: of all pruners.
        shared: settings for them; those that are None are not given.

    Raises:
        ValueError: for the first that no pruner takes, or that each says itself.
    """
    for name, value in shared.items():
        if value is not None and not any(_reads(spec, name) for spec in specs):
            raise ValueError(f"{name}={value!r} would not count: {_why(specs, name)}")


def _reads(spec: str, name: str) -> bool:
    """Whether a setting for all pruners counts for that of a spec."""
    if name in BUDGETS and has_budget(spec):
        return name in _OF_K and names_budget(spec)
    own = parse_spec(spec)[1].keys() & (_NETWORKS if name in _NETWORKS else {name})
    return name in known_settings(spec) and not own


def _why(specs: Sequence[str], name: str) -> str:
    """Why none of these pruners reads a setting, and what to do."""
    if name not in BUDGETS:
        takers = [spec for spec in specs if name in known_settings(spec)]
        if takers:
            return f"{', '.join(takers)} says its own; leave it out."
        those = f"{', '.join(specs)} takes no {name}" if specs else "no pruner is named"
        return f"{those}; leave it out, or name a pruner that takes one."
    return f"{', '.join(specs)} says how many tokens stay; leave it out."


def fill_in_budget(spec: str, num_keep: int | None) -> str:
    """The spec, `num_keep` in place of a K in its settings.

    Raises:
        ValueError: for a K without `num_keep`.
    """
    if not names_budget(spec):
        return spec
    if num_keep is None:
        raise ValueError(f"pruner {shown(spec)} has a K, which stands for num_keep; pass that.")
    return with_budget(spec, num_keep)


def build_spec(spec: str, **shared: Any) -> Pruner:
    """The pruner of a spec.

    Args:
        spec: `NAME:KEY=VALUE,...`; a K in the settings stands for `num_keep`.
        shared: settings for any pruner, e.g. `num_keep`: those that are None or that this one does
            not know are left out, and those of the spec go first; budgets do not count where the
            spec has one, see `has_budget`.

    Raises:
        ValueError: for a spec that does not parse, a K without `num_keep`, and what `build_pruner`
            refuses.
    """
    spec = fill_in_budget(spec, shared.get("num_keep"))
    name, settings = parse_spec(spec)
    known = known_settings(spec)
    if has_budget(spec):
        shared |= dict.fromkeys(BUDGETS)
    shared = {k: v for k, v in shared.items() if v is not None and k in known}
    with naming(name, spec):
        return build_pruner(name, **shared | settings)


def build_specs(specs: Sequence[str], **shared: Any) -> list[Pruner]:
    """The pruners of specs that run once each; see `build_spec`.

    Raises:
        ValueError: also for a setting that counts for none of them, see `refuse_unread`.
    """
    refuse_unread(specs, **shared)
    return [build_spec(spec, **shared) for spec in specs]
