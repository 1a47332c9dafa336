"""What a loss is, what it may read, and how settings name it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from ocvtp.ops.similarity import full
from ocvtp.selectors.budgets import NumKeep
from ocvtp.selectors.parts import Part, Parts
from ocvtp.selectors.relaxations import Gates
from ocvtp.selectors.schedules import Schedule, ScheduleValue, parse_schedule
from ocvtp.selectors.scorer import Scorer, Widths
from ocvtp.structures import Needs, VisualTokens

Earned = Literal["likelihood", "right"]
READS: dict[str, tuple[str, ...]] = {
    "full": ("full_logits", "owner", "targets"),
    "pruned": ("pruned_logits", "owner", "targets"),
    "states": ("full_states", "pruned_states", "owner"),
    "attention": ("teacher",),
    "objects": ("objects", "has_objects"),
    "column": ("column_logits", "owner", "targets"),
    "gates": ("gates",),
    "reward": ("reward", "groups"),
    "tower": (),
}
"""What a loss may read, by the word that says so, and where `Step` holds it.

`full` and `pruned`: logits of the frozen model with all tokens and with the gates; `states`: its
normed states in both; `attention`: what its layers attend to; `objects`: the question's; `column`:
logits with all tokens after the scorer's own column; `gates`; `reward`: of sampled sets; `tower`:
visual tokens as `Loss.needs` names them, which the scorer need not read."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """All that losses may read of one training step; None where none reads it.

    T answer tokens of all rows together, V words, B rows: one question each.

    Args:
        tokens: visual tokens, [B, N, ...].
        num_keep: K, or [B] of every row.
        share: of the training's steps that are done, 0..1.
        scores: [B, N] fp32, finite.
        aux: what else the scorer returned.
        gates: see `ocvtp.selectors.relaxations`.
        full_logits: [T, V] at the columns that predict answer tokens. pruned_logits: the same under
            the gates.
        owner: [T] int64, the row of each. targets: [T] int64, the answer tokens.
        column_logits: [T, V] the same after the scorer's own column, see `Scorer.column`.
        full_states: [T, D'] last normed states at those columns. pruned_states: the same under the
            gates.
        teacher: layer of the language model -> [B, N] its attention to each visual token, as it is,
            0 on padding.
        deposition: layer -> [N] its mean at each position of the one grid of all images, over
            training images; of layers whose losses divide by it.
        objects: [B, N] share 0..1 of each token's area that shows the question's objects.
        has_objects: [B] bool, whether it is known which these are.
        reward: [B] of the drawn set of each row. groups: [B] int64, equal for the sets of one
            question.
        most_kept: no row has a greater K, as far as that is known.
    """

    tokens: VisualTokens
    num_keep: NumKeep
    share: float
    scores: Tensor
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Gates | None = None
    full_logits: Tensor | None = None
    pruned_logits: Tensor | None = None
    owner: Tensor | None = None
    targets: Tensor | None = None
    full_states: Tensor | None = None
    pruned_states: Tensor | None = None
    column_logits: Tensor | None = None
    teacher: Mapping[int, Tensor] | None = None
    deposition: Mapping[int, Tensor] = field(default_factory=dict)
    objects: Tensor | None = None
    has_objects: Tensor | None = None
    reward: Tensor | None = None
    groups: Tensor | None = None
    most_kept: int | None = None

    @property
    def real(self) -> Tensor:
        """[B, N] bool, False on padding."""
        return self.tokens.real

    @property
    def most(self) -> int:
        """No row has a greater K, as far as that is known without waiting for the device."""
        if isinstance(self.num_keep, int):
            return self.num_keep
        return self.tokens.num_tokens if self.most_kept is None else self.most_kept


@dataclass(frozen=True)
class LossValue:
    """A loss of every row.

    Args:
        values: [B], 0 where it does not count.
        counts: [B] bool, False for rows that lack what the loss reads.
    """

    values: Tensor
    counts: Tensor

    def mean(self) -> Tensor:
        """Scalar, over the rows that count; 0 where none does."""
        return self.values.sum() / self.counts.sum().clamp(min=1)


class Loss(Part):
    """One term of what a scorer is trained for. Most hold settings alone.

    A subclass is named by `register_loss`, says in `reads` what it reads (words of `READS`), and
    defines `_values`. It keeps each argument of its constructor as the attribute of its name. One
    that learns something itself is a `torch.nn.Module` too, and makes its layers in `build`; they
    are in checkpoints, and in no artifact.

    Args:
        weight: of it in the sum of all losses, at least 0; a number or a schedule.
    """

    reads: ClassVar[frozenset[str]]
    deposition: bool = False
    """Of `attention`: whether it is divided by its mean at each position."""
    rows: str | None = None
    """Of `attention`: whose rows of it are read, of the `text` or of the `last` token."""
    earned: Earned = "likelihood"
    """Of `reward`: what a drawn set earns, see `ocvtp.selectors.losses.gates.Reward`."""

    def __init__(self, weight: ScheduleValue = 1.0) -> None:
        self.weight: Schedule = parse_schedule(weight, "weight", least=0)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the language model whose attention is read."""
        return ()

    @property
    def needs(self) -> Needs:
        """What of the vision tower is read, beside `features`."""
        return Needs()

    def build(self, scorer: Scorer, widths: Widths, grid_hw: tuple[int, int]) -> None:
        """Make what it learns itself, before the training; for most nothing.

        Args:
            scorer: that will be trained, with its layers.
            widths: of what it reads.
            grid_hw: rows and columns of an image's tokens, as far as the model has one grid.

        Raises:
            ValueError: for a scorer that it cannot train.
        """
        del scorer, widths, grid_hw

    def __call__(self, step: Step) -> LossValue:
        """The loss of every row of a batch, in fp32.

        Raises:
            ValueError: if the step lacks what the loss reads.
        """
        self._check(step)
        with torch.autocast(step.scores.device.type, enabled=False):
            value = self._values(step)
        if isinstance(value, Tensor):
            value = LossValue(value, torch.ones_like(value, dtype=torch.bool))
        rows = (step.tokens.batch_size,)
        if value.values.shape != rows or value.counts.shape != rows:
            raise ValueError(
                f"the loss {self.name!r} returned values of shape {tuple(value.values.shape)} and"
                f" counts of shape {tuple(value.counts.shape)}; return one of each for every row:"
                f" {rows}."
            )
        return LossValue(torch.where(value.counts, full(value.values), 0), value.counts)

    @abstractmethod
    def _values(self, step: Step) -> LossValue | Tensor:
        """As `__call__`, with autocast disabled; [B] alone where all rows count.

        Gradients of rows that do not count must be finite, too.
        """

    def _check(self, step: Step) -> None:
        for word in sorted(self.reads):
            absent = [name for name in READS[word] if getattr(step, name) is None]
            if absent:
                hint = "set model.relaxation" if word == "gates" else f"supply {', '.join(absent)}"
                raise ValueError(
                    f"the loss {self.name!r} reads {word!r}, which this step lacks; {hint}."
                )
        for layer in self.layers:
            if step.teacher is None or layer not in step.teacher:
                known = ", ".join(map(str, step.teacher or ())) or "none"
                raise ValueError(
                    f"the loss {self.name!r} reads the attention of layer {layer}, and the step has"
                    f" that of {known}; pass one of these as its layer."
                )
            if self.deposition and layer not in step.deposition:
                raise ValueError(
                    f"the loss {self.name!r} divides the attention of layer {layer} by its mean at"
                    " each position, which this step lacks; supply deposition."
                )
        if absent := step.tokens.missing(self.needs):
            raise ValueError(
                f"the loss {self.name!r} reads {', '.join(absent)}, which the tokens lack; ask the"
                " host for its needs."
            )


LOSSES: Parts[Loss] = Parts("loss", Loss)  # type: ignore[type-abstract]
_L = TypeVar("_L", bound=type[Loss])


def register_loss(name: str) -> Callable[[_L], _L]:
    """Class decorator: make a `Loss` known under `name`.

    Raises:
        ValueError: if the name is taken or is none, or the class is no loss, lacks a method, or
            reads what there is not.
    """

    def check(cls: type[Loss]) -> None:
        reads = getattr(cls, "reads", None)
        if not isinstance(reads, frozenset) or not reads <= READS.keys():
            raise ValueError(
                f"loss {name!r} has reads={reads!r}; set it to a frozenset of words among"
                f" {', '.join(READS)}."
            )

    return LOSSES.register(name, check)  # type: ignore[return-value]


def list_losses() -> list[str]:
    """Names of all losses, sorted."""
    return LOSSES.names()


def build_losses(settings: Mapping[str, Mapping[str, Any] | None]) -> list[Loss]:
    """Make the losses that settings name.

    Args:
        settings: by name, the arguments of each, e.g. `{"kl": {"weight": 2.0}, "ce": {}}`.

    Raises:
        ValueError: for unknown names and arguments, values out of range, no loss at all, and losses
            that read different rows of attention.
    """
    if not isinstance(settings, Mapping) or not settings:
        raise ValueError(
            f"losses={settings!r}; name at least one, with its arguments, e.g."
            f" {{kl: {{weight: 1.0}}}}. Known: {', '.join(list_losses())}."
        )
    made = []
    for name, given in settings.items():
        if not isinstance(given, Mapping | None):
            raise ValueError(
                f"losses.{name}={given!r}; pass a mapping of its arguments, e.g. {{weight: 1.0}}."
            )
        try:
            made.append(LOSSES.build(name, given or {}))
        except ValueError as error:
            raise ValueError(f"losses.{name}: {error}") from error
    if all(loss.weight.is_zero for loss in made):
        raise ValueError("all losses weigh 0; give one a weight above 0.")
    readers = {loss.rows: loss.name for loss in made if loss.layers}
    if len(readers) > 1:
        said = " and ".join(f"{name} reads rows={rows!r}" for rows, name in readers.items())
        raise ValueError(f"of the losses {said}; one run reads one kind, pass the same for all.")
    return made


def weighed(losses: Sequence[Loss], step: Step) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of all losses of a step.

    Returns:
        scalar `sum_l weight_l mean_l`, and the mean of each by its name, not weighed, without
        gradient.
    """
    total, logs = step.scores.new_zeros(()), {}
    for loss in losses:
        mean = loss(step).mean()
        total = total + loss.weight.at(step.share) * mean
        logs[loss.name] = mean.detach()
    return total, logs


def mean_of_rows(values: Tensor, owner: Tensor, rows: int) -> LossValue:
    """Means over the answer tokens of every row.

    Args:
        values: [T].
        owner: [T] int64, the row of each.
        rows: B. Those without an answer token do not count.
    """
    count = values.new_zeros(rows).index_add(0, owner, torch.ones_like(values))
    total = values.new_zeros(rows).index_add(0, owner, values)
    return LossValue(total / count.clamp(min=1), count > 0)


def mean_of_real(values: Tensor, real: Tensor) -> Tensor:
    """[B, N] to [B, 1]: the mean over real tokens; 0 without one."""
    total = values.masked_fill(~real, 0).sum(dim=1, keepdim=True)
    return total / real.sum(dim=1, keepdim=True).clamp(min=1)
