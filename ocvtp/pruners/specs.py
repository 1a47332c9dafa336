"""Pruners as people write them on a command line: `NAME:KEY=VALUE,...`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from ocvtp.field_types import shown
from ocvtp.plain_yaml import read_value
from ocvtp.pruners.base import Pruner, naming
from ocvtp.pruners.budgets import BUDGETS, Budget
from ocvtp.pruners.layer_pruner import LayerPruner
from ocvtp.pruners.registry import build_pruner, pruner_class, takes_named_setting

_BUDGET = re.compile(r"\bK\b")


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


def refuse_second_budget(specs: Sequence[str], budget: Budget) -> None:
    """For what runs each pruner at one budget: that of all counts for those that say none.

    Raises:
        ValueError: if every spec says one, so that it would count for nothing.
    """
    if specs and budget.settings() and all(map(has_own_budget, specs)):
        raise ValueError(
            f"pruner {shown(specs[0])} says how many tokens stay, and {budget.said} says it again;"
            " leave one of them out."
        )


def _refuse_unread(specs: Sequence[str], shared: dict[str, Any]) -> None:
    """A setting for all that counts for none: no pruner takes it, or each spec says it itself."""
    for name, value in shared.items():
        takers = [spec for spec in specs if name in known_settings(spec)]
        own = [spec for spec in takers if name in BUDGETS and has_budget(spec)]
        counts = any(spec not in own and name not in parse_spec(spec)[1] for spec in takers)
        if value is None or counts or (name == "num_keep" and any(map(names_budget, specs))):
            continue
        names, does = ", ".join(takers or specs), "says its own" if takers else "takes none"
        raise ValueError(f"{name}={value!r} would not count: {names} {does}; leave it out.")


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
        ValueError: also for a setting that counts for none of them, see `refuse_second_budget`.
    """
    refuse_second_budget(specs, Budget(*map(shared.get, BUDGETS)))
    _refuse_unread(specs, shared)
    return [build_spec(spec, **shared) for spec in specs]
