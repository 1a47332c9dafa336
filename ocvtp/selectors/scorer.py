"""What gives every visual token a score, and scorers by name: of this package, and of others.

A scorer of yours is one file, which a command reads by `ocvtp --import FILE ...`, or an installed
package, by an entry point of `ocvtp.pruners`:

    @register_scorer("mine")
    @dataclass(eq=False)
    class Mine(Scorer):
        \"\"\"One linear map.\"\"\"

        bias: bool = True

        def build(self, widths):
            self.out = nn.Linear(widths.projected, 1, bias=self.bias)

        def forward(self, tokens, num_keep=None):
            return Scores(self.out(tokens.projected.float()).squeeze(2))
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor, nn

from ocvtp.field_types import Ranges
from ocvtp.selectors.budgets import NumKeep
from ocvtp.selectors.parts import Part, Parts
from ocvtp.structures import Needs, VisualTokens

_HOME = "ocvtp.selectors.scorers"
_T = TypeVar("_T", bound="type[Scorer]")


@dataclass(frozen=True)
class Widths:
    """Widths of what a scorer reads.

    Args:
        projected: D'.
        tower: D.
        heads: attention heads of the language model, 0 where nobody says.
    """

    ranges: ClassVar[Ranges] = {"projected": (0, 2**20), "tower": (0, 2**20), "heads": (0, 2**16)}

    projected: int
    tower: int
    heads: int = 0


@dataclass(frozen=True)
class Scores:
    """What a scorer returns.

    Args:
        values: [B, N], fp32, finite everywhere. Those of padding mean nothing: whoever ranks masks
            them by `VisualTokens.real`.
        aux: what losses may read besides, by name.
    """

    values: Tensor
    aux: dict[str, Tensor] = field(default_factory=dict)


class Scorer(nn.Module, Part):
    """A score for each visual token: the higher, the rather it is kept.

    A subclass is a dataclass with `eq=False` whose fields are its sizes: numbers, texts, booleans
    and lists of these, with defaults. `build` makes its layers.

    Before a layer of the language model it is given `LayerTokens` whose `projected` are their
    hidden states.

    Attributes:
        name: key in the registry; `register_scorer` sets it.
    """

    name: ClassVar[str] = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """A module before its fields are set, as the `__init__` of a dataclass calls no other."""
        del args, kwargs
        scorer = super().__new__(cls)
        nn.Module.__init__(scorer)
        return scorer

    @abstractmethod
    def build(self, widths: Widths) -> None:
        """Make the layers; called once."""

    @abstractmethod
    def forward(self, tokens: VisualTokens, num_keep: NumKeep | None = None) -> Scores:
        """Score the tokens of B images.

        Images are scored apart: what is next to one in the batch, and its padding, change nothing.

        Args:
            tokens: with everything that `needs` names.
            num_keep: K, for scorers that are told the budget; [B] in a training on shares, where
                images differ in size.
        """

    @property
    def needs(self) -> Needs:
        """What it reads; a reader of the prompt adds `text=True`."""
        return Needs(projected=True)

    def column(self) -> Tensor | None:
        """[l + 1, D'] the column of its own that `Needs.column` asks for; None without one.

        `forward` reads it by `LayerTokens.column`, the loss `column_ce` by the whole model.
        """
        return None

    def sizes(self) -> dict[str, Any]:
        """Its fields, by name."""
        return self.settings()

    def statistics(self) -> list[tuple[int | str, Any]]:
        """What is measured on training images before the first step.

        Returns:
            `projected`, or the number of a layer of `hidden`, each with the
            `ocvtp.slots.statistics.FeatureStatistics` of these tokens.
        """
        return []


SCORERS: Parts[Scorer] = Parts("scorer", Scorer)  # type: ignore[type-abstract]


def register_scorer(name: str) -> Callable[[_T], _T]:
    """Class decorator: make a `Scorer` known under `name`.

    Args:
        name: of letters, digits, `-` and `_`.

    Raises:
        ValueError: if the name is taken or is none, or the class is no scorer, no dataclass of its
            own, or lacks a method.
    """

    def add(cls: _T) -> _T:
        if not getattr(cls, "__module__", "").startswith(_HOME):
            import_module(_HOME)  # whose names are taken
        return SCORERS.register(name, _check)(cls)  # type: ignore[return-value]

    return add


def _check(cls: type[Scorer]) -> None:
    if "__dataclass_fields__" not in vars(cls) or cls.__hash__ is None:
        raise ValueError(
            f"{cls.__name__} is no dataclass of its own, or is compared by its sizes, so that torch"
            " cannot hold it; write @dataclass(eq=False) between @register_scorer and the class."
        )


def list_scorers() -> list[str]:
    """Names of all scorers, sorted."""
    import_module(_HOME)
    return SCORERS.names()


def scorer_class(name: str) -> type[Scorer]:
    """The class registered under `name`.

    Raises:
        ValueError: if there is none; names close ones.
    """
    import_module(_HOME)
    return SCORERS.find(name)


def build_scorer(name: str, sizes: dict[str, Any], widths: Widths) -> Scorer:
    """A scorer of random weights.

    Args:
        name: see `list_scorers()`.
        sizes: as `Scorer.sizes` returns them; those left out are the scorer's own.
        widths: of what it will read.

    Raises:
        ValueError: for unknown names and sizes, and sizes that a scorer refuses.
    """
    import_module(_HOME)
    scorer = SCORERS.build(name, sizes)
    scorer.build(widths)
    return scorer
