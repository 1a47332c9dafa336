"""What a server is told about pruning, and whether it can be done there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ocvtp.pruners import Pruner, build_pruner, list_pruners, pruner_class
from ocvtp.pruners.specs import parse_spec
from ocvtp.structures import AttentionKind, Needs, Stage
from ocvtp.towers.taps import resolve

KEY = "ocvtp"
"""Of the model's configuration, where the settings are."""
_STAGE: Stage = "llm_input"
_TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""The `model_type` of towers that servers build, and the tokens before the patches."""
_OF_TOWERS: tuple[AttentionKind, ...] = ("cls", "received", "given", "global")
_EXAMPLE = '{"ocvtp": {"pruner": "divprune", "num_keep": 64}}'


@dataclass(frozen=True)
class ServedTower:
    """What the vision tower of a server has.

    Args:
        num_blocks: of the whole tower.
        num_built: blocks that the server builds and runs: those before the selected layer.
        num_prefix: tokens before the patches: 1 with a CLS, else 0.
        grid_hw: rows and columns of the patches.
    """

    num_blocks: int
    num_built: int
    num_prefix: int
    grid_hw: tuple[int, int]

    @property
    def num_tokens(self) -> int:
        """N, visual tokens of an image."""
        return self.grid_hw[0] * self.grid_hw[1]

    def layer(self, number: int) -> int:
        """The non-negative number of a layer of `hidden_states` of the whole tower."""
        return resolve(number, self.num_blocks + 1, "hidden_states")

    def block(self, number: int) -> int:
        """The non-negative number of a block of the whole tower."""
        return resolve(number, self.num_blocks, "blocks")


@dataclass(frozen=True)
class Plan:
    """A pruner that a server can run, and how many tokens every image has after it.

    Args:
        pruner: that keeps K of N tokens of every image.
        tower: that it reads.
        num_keep: K.
    """

    pruner: Pruner
    tower: ServedTower
    num_keep: int


def read_plan(config: Any) -> Plan:
    """The plan that a LLaVA's configuration holds under `ocvtp`.

    Args:
        config: a `LlavaConfig` of transformers.

    Raises:
        ValueError: for settings that name no pruner, and for models and pruners that cannot be
            served.
    """
    tower = served_tower(config)
    pruner = served_pruner(getattr(config, KEY, None), tower)
    if pruner.exceeds(tower.num_tokens):
        raise ValueError(
            f"num_keep={pruner.num_keep} exceeds the {tower.num_tokens} visual tokens that every"
            f" image has; pass at most {tower.num_tokens}."
        )
    return Plan(pruner, tower, pruner.budget(tower.num_tokens))


def served_tower(config: Any) -> ServedTower:
    """What the tower of a LLaVA has, as servers build it: no block after the selected layer.

    Raises:
        ValueError: for other towers than CLIP and SigLIP, and where tokens are no grid of one
            layer.
    """
    vision, layer = config.vision_config, config.vision_feature_layer
    if vision.model_type not in _TOWERS:
        raise ValueError(
            f"this LLaVA has a {vision.model_type} tower; in a server, visual tokens can be pruned"
            f" after {' and '.join(_TOWERS)}."
        )
    if not isinstance(layer, int):
        raise ValueError(
            f"vision_feature_layer={layer}: this model selects several layers, and pruning in a"
            " server reads those of one; serve it without the pruner."
        )
    num_prefix = _TOWERS[vision.model_type]
    wanted = "default" if num_prefix else "full"
    if (strategy := config.vision_feature_select_strategy) != wanted:
        raise ValueError(
            f"vision_feature_select_strategy={strategy!r} does not hand the language model the"
            f" token grid of a {vision.model_type}; pass {wanted!r}."
        )
    num_blocks, side = vision.num_hidden_layers, vision.image_size // vision.patch_size
    built = resolve(layer, num_blocks + 1, "hidden_states")
    return ServedTower(num_blocks, built, num_prefix, (side, side))


def served_pruner(settings: Mapping[str, Any] | None, tower: ServedTower) -> Pruner:
    """The pruner of settings `{"pruner": NAME, "num_keep": K, ...}`.

    Args:
        settings: `pruner` is `NAME` or `NAME:KEY=VALUE,...`; the rest are settings of that pruner.
        tower: that it is to read.

    Raises:
        ValueError: if they name no pruner or one that cannot be served, and what `build_pruner`
            refuses.
    """
    if not isinstance(settings, Mapping) or "pruner" not in settings:
        raise ValueError(
            f"the model's configuration holds {KEY}={settings!r}, which names no pruner; pass"
            f" hf_overrides with e.g. {_EXAMPLE}."
        )
    name, own = parse_spec(str(settings["pruner"]))
    shared = {key: value for key, value in settings.items() if key != "pruner"}
    problem = _other_stage(pruner_class(name).stage)
    if problem is None:  # the budgets of other stages mean something else
        pruner = build_pruner(name, **shared | own)
        problem = _problem(pruner, tower)
    if problem is not None:
        raise ValueError(
            f"pruner {name!r} {problem}; use one of {', '.join(alternatives(tower))}, or"
            " transformers with `ocvtp.attach`."
        )
    return pruner


def alternatives(tower: ServedTower) -> list[str]:
    """Pruners that can be served with their default settings, no trained network needed."""
    names = []
    for name in list_pruners(_STAGE):
        try:
            pruner = build_pruner(name, num_keep=1)
        except ValueError:  # wants more than a budget
            continue
        if _problem(pruner, tower) is None:
            names.append(name)
    return names


def _problem(pruner: Pruner, tower: ServedTower) -> str | None:
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
    needs = pruner.needs
    if needs.text or needs.clip:
        return (
            "reads the prompt, but a server encodes an image once and keeps the result by the image"
            " alone, for prompts that come later too"
        )
    return _not_in_tower(needs, tower)


def _other_stage(stage: Stage) -> str | None:
    if stage == _STAGE:
        return None
    return f"acts at stage {stage!r}, but a server prunes between tower and language model only"


def _not_in_tower(needs: Needs, tower: ServedTower) -> str | None:
    """What `needs` names that the tower, as it is built, does not give; None if it gives all."""
    kinds = {kind for _, kind in needs.attention}
    if others := sorted(kinds - set(_OF_TOWERS)):
        return f"reads attention of kind {', '.join(others)}, which is not that of a vision tower"
    if tower.num_prefix == 0 and (needs.cls or needs.cls_queries or "cls" in kinds):
        return "reads the CLS token, which this tower has not"
    try:
        blocks = {tower.block(n) for n in (*needs.keys, *(block for block, _ in needs.attention))}
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
