"""What gives every visual token a score, and scorers by name: of this package, and of others.

A scorer of yours is one file, which a command reads by `ocvtp --import FILE ...`:

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

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor, nn

from ocvtp import plugins
from ocvtp.structures import Needs, VisualTokens

BUILT_IN = ("pointwise", "qk_mean", "local_global", "prompted", "vip", "slots")
"""Those of this package, each in the file of its name in `ocvtp/selectors/scorers`."""
GROUP = "ocvtp.scorers"
"""Of entry points."""
_REGISTRY: dict[str, type[Scorer]] = {}
_T = TypeVar("_T", bound="type[Scorer]")


@dataclass(frozen=True)
class Widths:
    """Widths of what a scorer reads.

    Args:
        projected: D'.
        tower: D.
        heads: attention heads of the language model, 0 where rows of attention are head means.
    """

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


class Scorer(nn.Module, ABC):
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
    def forward(self, tokens: VisualTokens, num_keep: int | None = None) -> Scores:
        """Score the tokens of B images.

        Images are scored apart: what is next to one in the batch, and its padding, change nothing.

        Args:
            tokens: with everything that `needs` names.
            num_keep: K, for scorers that are told the budget.
        """

    @property
    def needs(self) -> Needs:
        """What it reads; a reader of the prompt adds `text=True`."""
        return Needs(projected=True)

    def sizes(self) -> dict[str, Any]:
        """Its fields, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}  # type: ignore[arg-type]

    def statistics(self) -> list[tuple[int | str, Any]]:
        """What is measured on training images before the first step.

        Returns:
            `projected`, or the number of a layer of `hidden`, each with the
            `ocvtp.slots.statistics.FeatureStatistics` of these tokens.
        """
        return []


def register_scorer(name: str) -> Callable[[_T], _T]:
    """Class decorator: make a `Scorer` known under `name`.

    Args:
        name: of letters, digits, `-` and `_`.

    Raises:
        ValueError: if the name is taken or is none, or the class is no scorer, no dataclass of its
            own, or lacks a method.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"scorer name {name!r} is none; pass letters, digits, - and _.")

    def add(cls: _T) -> _T:
        if not (isinstance(cls, type) and issubclass(cls, Scorer)):
            raise ValueError(f"{cls!r} is no Scorer; derive it from ocvtp.selectors.scorer.Scorer.")
        if name in _REGISTRY or (name in BUILT_IN and cls.__module__ != _module(name)):
            raise ValueError(f"scorer {name!r} is registered already; choose another name.")
        if absent := sorted(cls.__abstractmethods__):
            raise ValueError(f"scorer {name!r} lacks {', '.join(absent)}; define what is missing.")
        if not is_dataclass(cls) or "__dataclass_fields__" not in vars(cls):
            raise ValueError(
                f"scorer {name!r} is no dataclass; write @dataclass(eq=False) between"
                " @register_scorer and the class."
            )
        if cls.__hash__ is None:
            raise ValueError(
                f"scorer {name!r} is compared by its sizes, so torch cannot hold it; write"
                " @dataclass(eq=False)."
            )
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def list_scorers() -> list[str]:
    """Names of all scorers, sorted."""
    plugins.load_installed(GROUP)
    return sorted({*BUILT_IN, *_REGISTRY})


def scorer_class(name: str) -> type[Scorer]:
    """The class registered under `name`.

    Raises:
        ValueError: if there is none; names close ones.
    """
    if name in BUILT_IN:
        import_module(_module(name))
    else:
        plugins.load_installed(GROUP)
    if name not in _REGISTRY:
        close = get_close_matches(name, list_scorers(), n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise ValueError(
            f"unknown scorer {name!r}; {hint}Known: {', '.join(list_scorers())}; one of your own is"
            " read by `ocvtp --import FILE COMMAND ...`."
        )
    return _REGISTRY[name]


def build_scorer(name: str, sizes: dict[str, Any], widths: Widths) -> Scorer:
    """A scorer of random weights.

    Args:
        name: see `list_scorers()`.
        sizes: as `Scorer.sizes` returns them; those left out are the scorer's own.
        widths: of what it will read.

    Raises:
        ValueError: for unknown names and sizes, and sizes that a scorer refuses.
    """
    cls = scorer_class(name)
    known = [f.name for f in fields(cls) if f.init]  # type: ignore[arg-type]
    for size in sizes:
        if size not in known:
            close = get_close_matches(size, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            takes = f"It takes {', '.join(known)}." if known else "It takes none."
            raise ValueError(f"scorer {name!r} has no size {size!r}{hint} {takes}")
    scorer = cls(**sizes)
    scorer.build(widths)
    return scorer


def _module(name: str) -> str:
    return f"{__package__}.scorers.{name}"
