"""What a server is told about pruning, and whether it can be done there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from math import isqrt
from typing import Any

import torch

from ocvtp.field_types import shown
from ocvtp.hosts.base import Tiling
from ocvtp.hosts.origin import check_trained_in
from ocvtp.pruners import Pruner, build_pruner, list_pruners, pruner_class
from ocvtp.pruners.base import naming
from ocvtp.pruners.budgets import BUDGETS, Budget, check_count
from ocvtp.pruners.checks import random_tokens
from ocvtp.pruners.specs import fill_in_budget, parse_spec, refuse_unread
from ocvtp.serving.budgets import capped, check_cap, of_request
from ocvtp.serving.identity import identity_of
from ocvtp.serving.layouts import (
    InternVLLayout,
    Layout,
    LlavaLayout,
    OnevisionLayout,
    QwenLayout,
    ServedTower,
    Shape,
    TiledLayout,
)
from ocvtp.structures import OF_CLS, AttentionKind, Needs, Stage

KEY = "ocvtp"
"""Of the model's configuration, and of the processor arguments of a request: where settings are."""
LAYOUTS: dict[str, type[Layout]] = {
    "llava": LlavaLayout,
    "llava_next": TiledLayout,
    "llava_onevision": OnevisionLayout,
    "internvl": InternVLLayout,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), QwenLayout),
}
"""By the `model_type` of the models that are served."""
_STAGE: Stage = "llm_input"
_OF_TOWERS: tuple[AttentionKind, ...] = (*OF_CLS, "received", "given", "global")
_OF_THE_PLAN = ("pruner", "max_keep", "budget", "separators")
_BUDGETS = ("num_keep", "keep_ratio", "setting")
_EXAMPLE = '{"ocvtp": {"pruner": "divprune", "num_keep": 64}}'
_MOST_BUDGETS = 4096  # that are remembered


@dataclass(frozen=True)
class Plan:
    """A pruner that a server can run, and how many tokens of an image stay.

    Args:
        pruner: that keeps exactly as many tokens as it is asked for; its budget is that of every
            image whose request does not say another.
        layout: of the model.
        most: tokens of an image that any request is given; None for all.
        spec: what the pruner was called in the settings.
        identity: see `ocvtp.serving.identity`.
    """

    pruner: Pruner
    layout: Layout
    most: int | None
    spec: str
    identity: str
    under: Callable[[Budget], Pruner] = field(init=False, repr=False, compare=False)
    """The same pruner with another budget."""
    _rehearse: Callable[[int, bool], None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        remember = lru_cache(maxsize=_MOST_BUDGETS)
        object.__setattr__(self, "under", remember(partial(_under, self.pruner)))
        object.__setattr__(self, "_rehearse", remember(partial(_rehearse, self)))

    @property
    def tower(self) -> ServedTower:
        """What the pruner reads."""
        return self.layout.tower

    @property
    def budget(self) -> Budget:
        """Of every image whose request does not say another."""
        return Budget(**{name: getattr(self.pruner, name) for name in BUDGETS})

    def at(self, num_keep: int) -> Pruner:
        """The same pruner with a budget of K tokens."""
        return self.under(Budget(num_keep=num_keep))

    def of_request(self, given: Any) -> Budget:
        """The budget of a request, from what it says under `ocvtp`; see `budgets.of_request`."""
        return of_request(given, self.budget, self.most, self.spec)

    def asked(self, shape: Shape, budget: Budget) -> tuple[int, ...]:
        """How many tokens of each view of an image are asked for; more than it has leave it whole.

        Args:
            shape: of the image.
            budget: of its request.

        Raises:
            ValueError: if the pruner cannot choose so many, or not from such an image.
        """
        self.layout.check(shape, self.pruner)
        pruner, asked = self.under(budget), []
        for count in shape.views:
            if pruner.spares(count):
                asked.append(count + 1)
            else:
                asked.append(pruner.budget(count))
                self._rehearse(asked[-1], shape.is_grid)
        return tuple(asked)


def read_plan(config: Any, settings: Any = None) -> Plan:
    """The plan that a model's configuration holds under `ocvtp`.

    Args:
        config: of the model, as transformers has it.
        settings: in place of those of the configuration.

    Raises:
        ValueError: for settings that name no pruner or two budgets, and for models and pruners that
            cannot be served.
    """
    settings = getattr(config, KEY, None) if settings is None else settings
    if not isinstance(settings, Mapping) or "pruner" not in settings:
        raise ValueError(
            f"the model's configuration holds {KEY}={shown(settings)}, which names no pruner; pass"
            f" hf_overrides with e.g. {_EXAMPLE}."
        )
    layout = layout_of(config, tiling_of(settings))
    spec = str(settings["pruner"])
    num_keep = settings.get("num_keep")
    if _other_stage(pruner_class(spec.partition(":")[0]).stage) is None:
        refuse_unread([spec], num_keep=num_keep, keep_ratio=settings.get("keep_ratio"))
    name, named = parse_spec(fill_in_budget(spec, num_keep))
    own = {key: value for key, value in settings.items() if key not in _OF_THE_PLAN}
    caps = [settings.get("max_keep"), named.pop("max_keep", None)]
    most = min((check_count("max_keep", cap) for cap in caps if cap is not None), default=None)
    pruner = served_pruner(name, own | named, most, layout)
    count = layout.tower.num_tokens
    if layout.fixed and pruner.exceeds(count):
        raise ValueError(
            f"num_keep={pruner.num_keep} exceeds the {count} visual tokens that every image has;"
            f" pass at most {count}."
        )
    return Plan(pruner, layout, most, spec, identity_of(pruner, layout.tiling))


def tiling_of(settings: Mapping[str, Any]) -> Tiling:
    """How images in tiles are pruned: `budget` and `separators` of the settings.

    Raises:
        ValueError: for other values, and for newlines whose number depends on what is kept.
    """
    tiling = Tiling(settings.get("budget", "per_image"), settings.get("separators", "all"))
    if tiling.separators == "rows":
        raise ValueError(
            "separators='rows' keeps the newlines of lines that kept a token, but a server reserves"
            " the places of an image before it knows these; pass 'all' or 'none'."
        )
    return tiling


def layout_of(config: Any, tiling: Tiling | None = None) -> Layout:
    """How a model turns images into rows.

    Raises:
        ValueError: for models that are not served.
    """
    if config.model_type not in LAYOUTS:
        raise ValueError(
            f"models of type {config.model_type!r} cannot be pruned in a server; serve one of"
            f" {', '.join(LAYOUTS)}, or use transformers with `ocvtp.attach`."
        )
    return LAYOUTS[config.model_type](config, Tiling() if tiling is None else tiling)


def served_pruner(name: str, own: Mapping[str, Any], most: int | None, layout: Layout) -> Pruner:
    """A pruner that a server can run.

    Args:
        name: of the pruner.
        own: settings of it, e.g. `num_keep`.
        most: tokens of an image that may stay; its budget where `own` has none.
        layout: of the model whose tower it is to read.

    Raises:
        ValueError: if there is no such pruner, if it cannot be served or is to keep more than
            `most`, and what `build_pruner` refuses.
    """
    settings = dict(own)
    if all(settings.get(budget) is None for budget in _BUDGETS):
        settings["max_keep"] = most
    problem = _other_stage(pruner_class(name).stage)
    if problem is None:  # the budgets of other stages mean something else
        pruner = build_pruner(name, **settings)
        problem = _problem(pruner, layout)
    if problem is not None:
        raise ValueError(
            f"pruner {name!r} {problem}; use one of {', '.join(alternatives(layout))}, or"
            " transformers with `ocvtp.attach`."
        )
    text = layout.config.get_text_config()
    check_trained_in(pruner, text.hidden_size, text.num_hidden_layers)
    if most is None:
        return pruner
    budget = Budget(pruner.num_keep, pruner.keep_ratio)
    check_cap(budget, most, f"pruner {name!r}")
    return _under(pruner, capped(budget, most))


def _under(pruner: Pruner, budget: Budget) -> Pruner:
    return replace(pruner, **vars(budget))


def _rehearse(plan: Plan, num_keep: int, is_grid: bool) -> None:
    """Choose from made-up tokens, so that what cannot be done is refused before an engine does it.

    Raises:
        ValueError: what the pruner raises.
    """
    side = isqrt(num_keep) + 1
    tokens = random_tokens(plan.pruner.needs, 1, (side, side), **plan.layout.widths)
    if not is_grid:
        tokens = replace(tokens, grid_hw=(side, side + 1))
    with torch.inference_mode(), naming(plan.pruner.name):
        plan.at(num_keep).select(tokens)


def alternatives(layout: Layout) -> list[str]:
    """Pruners that can be served with their default settings, no trained network needed."""
    names = []
    for name in list_pruners(_STAGE):
        try:
            pruner = build_pruner(name, num_keep=1)
        except ValueError:  # wants more than a budget
            continue
        if _problem(pruner, layout) is None:
            names.append(name)
    return names


def _problem(pruner: Pruner, layout: Layout) -> str | None:
    """Why a server cannot run a pruner, by what it declares; None if it can."""
    for part in pruner.parts:
        if (problem := _other_stage(part.stage)) is not None:
            return problem
    if not pruner.exact:
        return (
            "decides by itself how many tokens an image keeps, but a server reserves their places"
            " before it sees them (pass num_keep and leave `adaptive` out)"
        )
    if not pruner.batch_invariant:
        return (
            "keeps what depends on an image's place in the batch, which a server's scheduler"
            " chooses again each time"
        )
    if pruner.prompt_positions == "original" and not layout.keeps_coordinates:
        return (
            "was trained to read tokens at the positions of their places (positions='original'),"
            " but a server numbers those that are left from 0"
        )
    needs = pruner.needs
    if needs.text or needs.clip:
        return (
            "reads the prompt, but a server encodes an image once and keeps the result by the image"
            " alone, for prompts that come later too"
        )
    return _not_in_tower(needs, layout.tower)


def _other_stage(stage: Stage) -> str | None:
    if stage == _STAGE:
        return None
    return f"acts at stage {stage!r}, but a server prunes between tower and language model only"


def _not_in_tower(needs: Needs, tower: ServedTower) -> str | None:
    """What `needs` names that the tower, as it is built, does not give; None if it gives all."""
    kinds = {kind for _, kind in needs.attention}
    if others := sorted(kinds - set(_OF_TOWERS)):
        return f"reads attention of kind {', '.join(others)}, which is not that of a vision tower"
    if tower.num_prefix == 0 and needs.reads_cls:
        return "reads the CLS token, which this tower has not"
    try:
        blocks = {tower.block(n) for n in needs.blocks}
        layers = {tower.layer(number) for number in needs.hidden}
    except ValueError as error:
        return f"does not fit: {str(error).rstrip('.')}"
    late = [f"block {number}" for number in sorted(blocks) if number >= tower.num_built]
    late += [f"hidden_states[{n}]" for n in sorted(layers) if n > tower.num_built]
    if not late:
        return None
    return (
        f"reads {', '.join(late)} of the vision tower, but a server builds only the first"
        f" {tower.num_built} of {tower.num_blocks} blocks, up to the selected layer (name"
        " an earlier one in its settings)"
    )
