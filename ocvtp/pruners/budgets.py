"""What a budget may be: counts are whole numbers of tokens, shares are floats up to 1.0.

So `64` and `1` count tokens, `0.5` and `1.0` are shares of them, in Python as in YAML and in specs.
A number of numpy, or in a tensor of no dimension, is what it holds.

How many tokens a budget leaves of an image is resolved here alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ocvtp.field_types import count_or_share, plain, share_number, whole_number

StagePairs = Sequence[tuple[int, float]]
"""`(layer, K)` pairs: before which layer how many tokens stay, or which share of them."""

BUDGETS = ("num_keep", "keep_ratio", "max_keep")
"""The settings of any pruner that say how many tokens of an image stay."""
_PLAIN = (int, float, type(None))


@dataclass(frozen=True)
class Budget:
    """How many tokens of an image are kept, as every pruner takes it.

    Args:
        num_keep: a count.
        keep_ratio: a share of the image's own tokens; one of the two.
        max_keep: the most: an image of at most so many stays whole; or a cap on the share.
    """

    num_keep: int | None = None
    keep_ratio: float | None = None
    max_keep: int | None = None

    def __post_init__(self) -> None:
        for name in BUDGETS:
            if type(value := getattr(self, name)) not in _PLAIN:
                object.__setattr__(self, name, plain(value))

    def __str__(self) -> str:
        if self.num_keep is not None:
            return str(self.num_keep)
        share = "" if self.keep_ratio is None else f"{100 * self.keep_ratio:g}%"
        cap = "" if self.max_keep is None else f"at most {self.max_keep}"
        return ", ".join(filter(None, (share, cap)))

    def count(self, num_tokens: int) -> int:
        """Tokens kept of `num_tokens`; `num_keep` as it is."""
        return self.num_keep or count_kept(num_tokens, **asdict(self))

    @property
    def said(self) -> str:
        """As it was written: `num_keep=64`."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())

    def settings(self) -> dict[str, Any]:
        """As arguments of a pruner."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    def checked(self, who: str) -> Budget:
        """The same in plain numbers.

        Args:
            who: got it, for messages.

        Raises:
            ValueError: for what is no count or share, and for those that contradict each other.
        """
        num_keep, ratio, most = self.num_keep, self.keep_ratio, self.max_keep
        if num_keep is not None and ratio is not None:
            raise ValueError(
                f"{who} got num_keep={num_keep} and keep_ratio={ratio}; pass exactly one of them."
            )
        if num_keep is not None and most is not None:
            raise ValueError(
                f"{who} got num_keep={num_keep} and max_keep={most}; pass one of them: max_keep is"
                " the most tokens of an image, alone or of a share (keep_ratio)."
            )
        return Budget(
            None if num_keep is None else check_count("num_keep", num_keep),
            None if ratio is None else check_share("keep_ratio", ratio),
            None if most is None else check_count("max_keep", most),
        )


def budgets_of(counts: Sequence[int] | None, shares: Sequence[float] | None = None) -> list[Budget]:
    """Budgets that differ, in the order in which they were named.

    Args:
        counts: of tokens kept of an image. shares: of its tokens.
    """
    found = [Budget(num_keep=count) for count in counts or ()]
    found += [Budget(keep_ratio=share) for share in shares or ()]
    return list(dict.fromkeys(found))


def count_kept(
    num_tokens: int, num_keep: int | None, keep_ratio: float | None, max_keep: int | None
) -> int:
    """K of an image of N tokens: at most N, and all of them where there is no budget.

    Args:
        num_tokens: N.
        num_keep: see `Budget`. keep_ratio: see there. max_keep: see there.
    """
    wanted = num_tokens if keep_ratio is None else max(1, round(num_tokens * keep_ratio))
    return min([wanted, num_tokens, *_counts(num_keep, max_keep)])


def average_kept(
    num_tokens: int, num_keep: int | None, keep_ratio: float | None, max_keep: int | None
) -> float:
    """The same as an average over layers, which need not be whole."""
    wanted = num_tokens if keep_ratio is None else num_tokens * keep_ratio
    return min([wanted, num_tokens, *_counts(num_keep, max_keep)])


def _counts(*counts: int | None) -> list[int]:
    return [count for count in counts if count is not None]


def check_count(name: str, value: Any, least: int = 1) -> int:
    """A number of tokens, as a plain int.

    Args:
        name: of the argument. value: as it was given. least: that it may be.

    Raises:
        ValueError: that says what it may be.
    """
    if (count := _count(value)) is None:
        hint = " keep_ratio is for shares." if name == "num_keep" else ""
        raise ValueError(f"{name}={plain(value)!r}; pass a whole number of tokens, e.g. 64.{hint}")
    if count < least:
        plural = "" if least == 1 else "s"
        raise ValueError(f"{name}={count}; pass at least {least} token{plural}.")
    return count


def check_share(name: str, value: Any) -> float:
    """The share of an image's tokens that is kept, as a plain float.

    Raises:
        ValueError: that says what it may be.
    """
    if (share := share_number(value)) is None:
        raise ValueError(
            f"{name}={plain(value)!r}; pass the share of tokens KEPT, a number above 0, at most 1."
        )
    return share


def check_quality(value: Any) -> float:
    """The share of what a method keeps tokens for that they must hold, as a plain float.

    Raises:
        ValueError: that says what it may be.
    """
    if (share := share_number(value)) is None:
        raise ValueError(
            f"quality={plain(value)!r}; pass the share that the kept tokens must hold, a number"
            " above 0, at most 1."
        )
    return share


def check_stages(stages: Any) -> tuple[tuple[int, int | float], ...]:
    """`(layer, K)` pairs in plain numbers; K is a count if it is an int, a share if a float.

    Raises:
        ValueError: for anything else, layers that do not ascend, and stages that keep more than
            those before them, where that shows without an image.
    """
    try:
        found = [(_count(layer), _kept(kept)) for layer, kept in stages]
    except (TypeError, ValueError):
        found = []
    pairs = [(layer, kept) for layer, kept in found if layer is not None and kept is not None]
    layers = [layer for layer, _ in pairs]
    if not pairs or len(pairs) < len(found) or layers != sorted(set(layers)):
        raise ValueError(
            f"stages={stages!r}; pass (layer, K) pairs with ascending layers and K above 0, e.g."
            " stages=((2, 128), (16, 64)): a whole number counts tokens, a decimal one up to 1.0 is"
            " a share of them."
        )
    for kind in (int, float):
        alike = [(layer, k) for layer, k in pairs if type(k) is kind]
        for (before, less), (layer, more) in zip(alike, alike[1:], strict=False):
            if more > less:
                raise ValueError(
                    f"stages={stages!r} keep {more} before layer {layer}, but {less} before layer"
                    f" {before}: what is dropped does not come back; pass K that do not"
                    " grow."
                )
    return tuple(pairs)


def count_stages(stages: StagePairs, num_tokens: int) -> tuple[tuple[int, int], ...]:
    """The stages of an image of N tokens, all as counts.

    A count is the most that stay: an image that has fewer there keeps what it has.

    Args:
        stages: as `check_stages` returns them.
        num_tokens: N, of which shares are.

    Raises:
        ValueError: if a share is more than the stage before leaves.
    """
    found, left = [], num_tokens
    for layer, kept in stages:
        if isinstance(kept, int):
            left = min(kept, left)
        else:
            share = max(1, round(kept * num_tokens))
            if share > left:
                raise ValueError(
                    f"stages={tuple(stages)!r} keep {kept:g} of {num_tokens} tokens, {share},"
                    f" before layer {layer}, where {left} are left; pass K that do not grow."
                )
            left = share
        found.append((layer, left))
    return tuple(found)


def _count(value: Any) -> int | None:
    """`whole_number`; most are plain already, and every call of a pruner asks."""
    return value if type(value) is int else whole_number(value)


def _kept(value: Any) -> int | float | None:
    """`count_or_share`, likewise."""
    return value if type(value) is int and value > 0 else count_or_share(value)
