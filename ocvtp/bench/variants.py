"""What is timed side by side: the bare model, and pruners at budgets, with work left out or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ocvtp.choices import SavingRows
from ocvtp.evaluation.conditions import Budget, Place, lacks_network, pruner_conditions
from ocvtp.evaluation.labels import UNPRUNED
from ocvtp.evaluation.runner import Subject
from ocvtp.flops import count
from ocvtp.hosts.attach import attached
from ocvtp.hosts.base import Savings
from ocvtp.hosts.prompt.read_call import look
from ocvtp.hosts.registry import find_host
from ocvtp.pruners import Compose, Pruner, trainable
from ocvtp.pruners.specs import build_spec, runs_once
from ocvtp.structures import Needs


@dataclass(frozen=True, eq=False)
class Variant:
    """One row of a cell.

    Args:
        label: the pruner as it was asked for; `unpruned` for the bare model.
        num_keep: tokens kept per image; None where the pruner has a budget of its own.
        pruner: None for the bare model.
        savings: what hosts leave out; None for the bare model, which leaves out nothing.
        changed: the one setting in which `savings` differ from attach's own, or "", `all`, `none`.
        random_weights: whether it is a network that was never trained.
    """

    label: str
    num_keep: int | None = None
    pruner: Pruner | Compose | None = None
    savings: Savings | None = None
    changed: str = ""
    random_weights: bool = False

    @property
    def key(self) -> str:
        """Names it among the others."""
        budget = "" if self.num_keep is None else f" K={self.num_keep}"
        return f"{self.label}{budget}" + (f" [{self.changed}]" if self.changed else "")

    @property
    def parts(self) -> tuple[Pruner, ...]:
        """The pruners of all stages."""
        return () if self.pruner is None else self.pruner.parts

    def facts(self) -> dict[str, Any]:
        """What it is, as JSON."""
        return {
            "key": self.key,
            "label": self.label,
            "num_keep": self.num_keep,
            "changed": self.changed,
            "random_weights": self.random_weights,
            "stages": sorted({part.stage for part in self.parts}),
            "yours": any(part.status == "yours" for part in self.parts),
        }

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Networks that the pruners hold."""
        held = (value for part in self.parts for value in vars(part).values())
        return [value for value in held if isinstance(value, torch.nn.Module)]

    @contextmanager
    def installed(self, subject: Subject, **options: Any) -> Iterator[Any]:
        """The model under this pruner; gives attach's handle, None for the bare model."""
        if self.pruner is None:
            yield None
            return
        assert self.savings is not None
        with attached(
            subject.model,
            self.pruner,
            processor=subject.processor,
            text_tower=subject.text_tower,
            savings=self.savings,
            **options,
        ) as handle:
            yield handle


def variants(
    specs: Sequence[str],
    num_keep: Sequence[int],
    num_tokens: int,
    *,
    checkpoint: str | None = None,
    network: Any = None,
    rows: SavingRows = "default",
) -> list[Variant]:
    """The bare model, and every pruner at every budget.

    Args:
        specs: see `build_spec`; a K in their settings stands for the budget.
        num_keep: budgets.
        num_tokens: of an image.
        checkpoint: exported network, for pruners that take one.
        network: what they get in place of it: one for all, or by the name of the pruner.
        rows: which settings of `Savings` there are rows for: `default` (attach's own), `all` or
            `none` of them on, or `each`: attach's own, and one more row for each setting with
            that one reversed.

    Raises:
        ValueError: for what `build_spec` refuses, and for rows that double.
    """
    found = [Variant(UNPRUNED)]
    budgets = [Budget(num_keep=count) for count in dict.fromkeys(num_keep)]
    for spec in dict.fromkeys(specs):
        for budget, pruner, is_random in _pruners(spec, budgets, num_tokens, checkpoint, network):
            if len(pruner.parts) > 1:  # the same objects at every look, see `watching`
                pruner = Compose(list(pruner.parts))
            count = None if budget is None else budget.num_keep
            found += [
                Variant(spec, count, pruner, savings, changed, is_random)
                for changed, savings in _savings(rows).items()
            ]
    return found


def lacking_network(specs: Sequence[str], checkpoint: str | None) -> set[str]:
    """Names of the pruners that take a trained network and get none."""
    if checkpoint is not None:
        return set()
    return {spec.partition(":")[0] for spec in specs if lacks_network(spec)}


@torch.no_grad()
def network_for(subject: Subject, inputs: Any, pruner: str = trainable.DEFAULT) -> Any:
    """A network of a pruner's usual sizes that fits a model, with random weights.

    Args:
        subject: the model.
        inputs: the processor's tensors, of any prompt with an image.
        pruner: name of a trainable one.
    """
    cls = trainable.of_name(pruner)
    host = find_host(subject.model)
    layer = cls.network_class.default_layer(host.num_tower_blocks)
    needs = Needs(hidden=(layer,), projected=True)
    hooks = host.install(needs)
    try:
        tokens = look(host, needs, dict(inputs)).encoded.tokens
    finally:
        for hook in hooks:
            hook.remove()
    config = cls.usual_config(tokens, layer)
    return cls.network_class.untrained(config, seed=0).to(subject.model.device)


def _pruners(
    spec: str,
    budgets: Sequence[Budget],
    num_tokens: int,
    checkpoint: str | None,
    network: Any,
) -> Iterator[tuple[Budget | None, Pruner | Compose, bool]]:
    if checkpoint is None and lacks_network(spec):
        if isinstance(network, Mapping):
            network = network[spec.partition(":")[0]]
        for budget in [None] if runs_once(spec, bool(budgets)) else budgets:
            shared = {} if budget is None else budget.settings()
            yield budget, build_spec(spec, network=network, **shared), True
        return
    checkpoints = [] if checkpoint is None else [checkpoint]
    for condition in pruner_conditions(spec, budgets, [0], checkpoints, num_tokens):
        yield condition.budget, condition.make(Place(0, list)), False


def _savings(rows: SavingRows) -> dict[str, Savings]:
    """By what is changed."""
    names = [field.name for field in fields(Savings)]
    if rows in ("all", "none"):
        return {rows: Savings(**dict.fromkeys(names, rows == "all"))}
    found = {"": Savings()}
    if rows == "each":
        for name in names:
            is_on = getattr(Savings(), name)
            changed = replace(Savings(), **{name: not is_on})
            found[f"without {name}" if is_on else f"with {name}"] = changed
    return found


def flops_of(
    model: Any, variant: Variant, sizes: Mapping[str, int], num_images: int
) -> dict[str, int] | None:
    """Of one prompt until its first token: `tower`, `projector`, `select`, `language_model`, all.

    Args:
        model: of transformers.
        variant: the row.
        sizes: `image_tokens` and `text_tokens` of a prompt.
        num_images: of a prompt.

    Returns:
        None where they depend on what is in an image, or the model's family is not known there.
    """
    try:
        found = count(
            model,
            num_visual=sizes["image_tokens"] // num_images,
            text_length=sizes["text_tokens"],
            pruner=variant.pruner,
            num_images=num_images,
            savings=variant.savings,
        )
    except ValueError:
        return None
    parts = ("tower", "projector", "select", "language_model", "total")
    return {part: int(getattr(found, part)) for part in parts}
