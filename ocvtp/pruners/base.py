"""The contract of a pruner."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from inspect import cleandoc
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ocvtp.field_types import shown
from ocvtp.lazy import bound
from ocvtp.ops.merging import keep_all, keep_short_images
from ocvtp.ops.selection import together
from ocvtp.pruners.budgets import Budget as Amount
from ocvtp.pruners.budgets import check_quality, count_kept
from ocvtp.structures import Needs, Selection, Stage, VisualTokens

Status = Literal["official", "unofficial", "control", "yours"]
Budget = Literal["exact", "adaptive", "quality", "average"]
NamedSettings = Mapping[str, Mapping[str, Any]]


def named(error: ValueError, name: str, given: str | None = None) -> ValueError:
    """An error of one pruner, as one that says which it is; there may be several.

    Args:
        error: of it. name: of the pruner. given: how it was asked for; None for the name.

    Returns:
        the error itself, where it names the pruner; else another, of which it is the cause.
    """
    if re.search(rf"\b{re.escape(name)}\b", str(error)):
        return error
    found = ValueError(f"pruner {shown(given or name)}: {error}")
    found.__cause__ = error
    return found


@contextmanager
def naming(name: str, given: str | None = None) -> Iterator[None]:
    """Errors of one pruner in the block say which it is, see `named`."""
    try:
        yield
    except ValueError as error:
        found = named(error, name, given)
        raise found from found.__cause__


@dataclass(kw_only=True, eq=False)
class Pruner(ABC):
    """Keeps `num_keep` visual tokens of every image.

    A subclass declares what it is and what it needs, and implements `_select`. The host supplies
    exactly what `needs` names and never asks which method it serves.

    Args:
        num_keep: tokens kept per image, tiles included.
        keep_ratio: the same as a share of the image's own tokens; give one of the two.
        max_keep: the most tokens of an image, which stays whole if it has no more; alone, or as a
            cap on `keep_ratio`.
    """

    num_keep: int | None = None
    keep_ratio: float | None = None
    max_keep: int | None = None

    name: ClassVar[str] = ""
    """Key in the registry; `register` sets it."""
    title: ClassVar[str] = ""
    """The method's name and what it does, in one line; of a class that does not say so itself, the
    first line of its docstring."""
    reads: ClassVar[str] = "not said"
    """What the host must supply, in a few words for tables; `-` if features and grid are enough. A
    class that does not say so itself has not said it, whatever it is made from."""
    stage: ClassVar[Stage] = "llm_input"
    status: ClassVar[Status] = "yours"
    """`official` follows public code, `unofficial` is reconstructed, `control` is a yardstick; a
    class that does not say so itself is `yours`, whatever it is made from."""
    paper: ClassVar[str | None] = None
    budgets: ClassVar[tuple[Budget, ...]] = ("exact",)
    """`adaptive` after `exact` if the method can also choose how many tokens an image keeps, and
    `quality` if it can be told what they must hold; `average` if the budget is one over the layers
    of the language model."""
    named_settings: ClassVar[NamedSettings] = {}
    """Published settings, which `build_pruner` takes as `setting=NAME`: name -> arguments, the
    budget among them (none where the paper's own holds without one)."""
    settings_note: ClassVar[str] = ""
    """What is known of those that a paper's tables have and `named_settings` has not, for whoever
    asks for one."""
    merging: ClassVar[bool] = False
    """True if kept tokens are mixtures (`Selection.merge`)."""
    batch_invariant: ClassVar[bool] = True
    """False if what is kept of an image depends on its place in the batch."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        if "status" not in own:
            cls.status = "yours"
        if "title" not in own:
            cls.title = cleandoc(cls.__doc__ or cls.__name__).partition("\n")[0]
        if "reads" not in own:
            cls.reads = "not said"

    def __post_init__(self) -> None:
        self._check_budget()

    @property
    def parts(self) -> tuple[Pruner, ...]:
        """Itself; of a method that acts at several stages, one pruner for each."""
        return (self,)

    @property
    def exact(self) -> bool:
        """Whether every image keeps just `num_keep` tokens (all of them if it has fewer)."""
        return True

    @property
    def needs(self) -> Needs:
        """What the host must supply besides features and grid."""
        return Needs()

    @property
    def tower_needs(self) -> Needs:
        """What the host must supply before the language model runs: `needs`, for most."""
        return self.needs

    @property
    def prompt_positions(self) -> Literal["contiguous", "original"] | None:
        """Positions of the tokens that are left that it was trained with, see `ocvtp.attach`."""
        return None

    @property
    def trained_in(self) -> Mapping[str, Any]:
        """What is known of the model that it was trained in, if it was in one.

        Of `model`, its name; `width`, D'; `num_layers`, those of its language model; and
        `content_hash`, see `ocvtp.hosts.origin.content_hash`.
        """
        return {}

    def select(self, tokens: VisualTokens) -> Selection:
        """Choose the tokens to keep: pure, batched, deterministic, without host syncs.

        Args:
            tokens: with everything that `needs` names.

        Returns:
            exactly K ascending indices per image; fewer, marked by `valid`, where an image has
            fewer tokens (it stays as it is, alone or in a batch) or the method is adaptive.

        Raises:
            ValueError: if something in `needs` is missing.
        """
        if missing := tokens.missing(self.needs):
            raise ValueError(
                f"pruner {self.name!r} needs {', '.join(missing)}, which the given visual tokens do"
                " not hold; put it there, or pass it through a host that supplies it."
            )
        if self.spares(tokens.num_tokens):
            return keep_all(tokens)
        num_keep = self.budget(tokens.num_tokens)
        selection = together([self._select(part, num_keep) for part in self._parts_of(tokens)])
        if tokens.valid is not None and self.merging and self.exact:
            return keep_short_images(
                selection, tokens, self.spares(selection.keep_indices.shape[1])
            )
        return selection

    @abstractmethod
    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        """The method itself; `num_keep` is K, 1 <= K <= N."""

    def _takes_turns(self, num_tokens: int, num_keep: int) -> bool:
        """Whether a CPU chooses from one image after the other; other devices never do.

        What every step of the method reads then stays in the cache.
        """
        del num_tokens, num_keep
        return False

    def _parts_of(self, tokens: VisualTokens) -> list[VisualTokens]:
        """The images that are chosen from at once; a compiled graph takes all."""
        on_cpu = tokens.features.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (on_cpu and tokens.batch_size > 1 and self.batch_invariant):
            return [tokens]
        if not self._takes_turns(tokens.num_tokens, self.budget(tokens.num_tokens)):
            return [tokens]
        return [tokens.map(partial(_image, number=b)) for b in range(tokens.batch_size)]

    def budget(self, num_tokens: int) -> int:
        """K for an image of N tokens: all of them where `num_keep` or `max_keep` is more."""
        return count_kept(num_tokens, self.num_keep, self.keep_ratio, self.max_keep)

    @property
    def has_budget(self) -> bool:
        """Whether it was told how many tokens stay."""
        return (self.num_keep, self.keep_ratio, self.max_keep) != (None, None, None)

    @property
    def amounts(self) -> tuple[Amount, ...]:
        """Its budget; of a chain, those of its steps."""
        return (Amount(self.num_keep, self.keep_ratio, self.max_keep),)

    @property
    def counts_by(self) -> str | None:
        """The name of the setting that is a number of tokens; None for a share alone."""
        return next((n for n in ("num_keep", "max_keep") if getattr(self, n) is not None), None)

    def exceeds(self, num_tokens: int) -> bool:
        """Whether `num_keep` is more than an image of N tokens has."""
        return self.num_keep is not None and self.num_keep > num_tokens

    def spares(self, num_tokens: int) -> bool:
        """Whether an image of N tokens stays as it is, because it has fewer than it may keep.

        It may have as many, where the budget is a cap alone.
        """
        return self.exact and (self.exceeds(num_tokens) or self._is_within_cap(num_tokens))

    def _is_within_cap(self, num_tokens: int) -> bool:
        """Whether a budget that is a cap alone has room for N tokens."""
        alone = self.num_keep is None and self.keep_ratio is None
        return alone and self.max_keep is not None and num_tokens <= self.max_keep

    @property
    def keeps_share(self) -> bool:
        """Whether K depends on N."""
        return self.num_keep is None and self.keep_ratio is not None

    def of_size(self, num_tokens: int) -> Pruner:
        """The same pruner for images of `num_tokens` real tokens; K is then a number."""
        if not self.keeps_share:
            return self
        changed = copy(self)
        changed.num_keep, changed.keep_ratio = self.budget(num_tokens), None
        changed.max_keep = None
        return changed

    @property
    def fixed_by(self) -> str | None:
        """Why no call can say how many tokens stay, as of the pruner; None where one can."""
        stages = getattr(self, "stages", None)
        return None if stages is None else f"was built with stages={stages!r}"

    def with_budget(self, budget: Amount) -> Pruner:
        """The same pruner with another budget, e.g. that of one call.

        One that counts for itself keeps at most so many.

        Raises:
            ValueError: if the method, or how it was built, fixes how many tokens stay.
        """
        if (fixed := self.fixed_by) is not None:
            raise ValueError(
                f"pruner {self._called!r} {fixed}, so that {budget.said} cannot be said later; use"
                " one that was built with num_keep, keep_ratio or max_keep."
            )
        changed = copy(self)
        for name, value in vars(budget.checked(repr(self._called))).items():
            setattr(changed, name, value)
        changed.parts  # noqa: B018 - checks what hangs on the budget
        return changed

    def masks(self, tokens: VisualTokens) -> Tensor | None:
        """Soft masks [B, S, N] worth drawing, if the method makes any."""
        del tokens
        return None

    def __call__(self, model: Any, **options: Any) -> AbstractContextManager[Any]:
        """`with pruner(model): model.generate(...)`: prune inside the block, see `ocvtp.attach`."""
        context: AbstractContextManager[Any] = bound("attached")(model, self, **options)
        return context

    def _grid(self, tokens: VisualTokens) -> tuple[int, int]:
        """Rows and columns, for methods that cannot do without.

        Raises:
            ValueError: if the tokens are no whole grid, e.g. those of several tiles.
        """
        height, width = tokens.grid_hw
        if height * width != tokens.num_tokens:
            of = f"no {height} x {width}" if height * width else "of images of different sizes"
            raise ValueError(
                f"pruner {self.name!r} reads the grid of the tokens, but {tokens.num_tokens} tokens"
                f" are {of}; use a pruner (or an option) that does not."
            )
        return height, width

    def _filled(self, tokens: VisualTokens) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The part of the grid that each image fills: where it begins, and how large it is.

        Padding is rows and columns at the edges of the grid that an image lacks; what it keeps of
        its own must not hang on them.

        Returns:
            first row and column [B, 1] with a real token; number of rows and columns [B, 1].

        Raises:
            ValueError: see `_grid`.
        """
        real = tokens.real.unflatten(1, self._grid(tokens))
        top, height = _extent(real.any(dim=2))
        left, width = _extent(real.any(dim=1))
        return (top, left), (height, width)

    def _check_budget(self) -> None:
        if not self.has_budget:
            raise ValueError(
                f"{self._called} got num_keep=None and keep_ratio=None; pass exactly one of them,"
                " or max_keep."
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        """Refuse what is no count or share; keep the others as plain numbers."""
        amount = self.amounts[0].checked(self._called)
        self.num_keep, self.keep_ratio = amount.num_keep, amount.keep_ratio
        self.max_keep = amount.max_keep

    @property
    def _called(self) -> str:
        return self.name or type(self).__name__


@dataclass(kw_only=True, eq=False)
class AdaptivePruner(Pruner):
    """A pruner whose paper lets every image keep as many tokens as it needs.

    With a budget it keeps exactly so many; without one, or with `adaptive=True`, it counts as the
    paper does, and a budget is then the most that an image may keep.

    Args:
        adaptive: whether the method counts.
    """

    adaptive: bool = False

    budgets: ClassVar[tuple[Budget, ...]] = ("exact", "adaptive")

    def __post_init__(self) -> None:
        if self.has_budget:
            self._check_budget()
        else:
            self.adaptive = True

    @property
    def exact(self) -> bool:
        return not self.adaptive


@dataclass(kw_only=True, eq=False)
class QualityPruner(Pruner):
    """A pruner that knows what a token is worth, as a share of the whole image.

    What is shared out is in the docstring of each: attention, or what is restored.

    Args:
        quality: every image keeps the fewest tokens, in the method's own order, that hold this
            share; a budget is then the most that it may keep. None to keep what the budget says.
    """

    quality: float | None = None

    budgets: ClassVar[tuple[Budget, ...]] = ("exact", "quality")

    def __post_init__(self) -> None:
        if self.quality is None:
            super().__post_init__()
            return
        self.quality = check_quality(self.quality)
        if self.has_budget:
            self._check_budget()

    @property
    def exact(self) -> bool:
        # torch.compile takes a property of super() for true
        return self.quality is None and not getattr(self, "adaptive", False)


def _extent(there: Tensor) -> tuple[Tensor, Tensor]:
    """Of lines [B, L]: the number of the first that is there, and how many to the last; [B, 1]."""
    number = torch.arange(there.shape[1], device=there.device)
    first = torch.where(there, number, there.shape[1] - 1).amin(dim=1, keepdim=True)
    last = torch.where(there, number, 0).amax(dim=1, keepdim=True)
    return first, (last + 1 - first).clamp(min=1)


def _image(values: Tensor, number: int) -> Tensor:
    return values[number : number + 1]
