"""How much of an image stays in a server: what the engine says, and what one request may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ocvtp.field_types import shown
from ocvtp.pruners import Pruner
from ocvtp.pruners.budgets import check_count, check_share, count_kept

_OF_A_REQUEST = ("num_keep", "keep_ratio", "max_keep")
_EXAMPLE = '{"ocvtp": {"num_keep": 64}}'


@dataclass(frozen=True)
class Budget:
    """How many tokens of an image (of every tile, under a budget `per_tile`) stay.

    Args:
        num_keep: K.
        keep_ratio: a share of the image's own tokens. Without one of both, all stay.
        max_keep: the most that stay, whatever the others say.

    Raises:
        ValueError: for numbers that are no count or share, and for two budgets.
    """

    num_keep: int | None = None
    keep_ratio: float | None = None
    max_keep: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_keep", "max_keep"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_count(name, value))
        if self.keep_ratio is not None:
            object.__setattr__(self, "keep_ratio", check_share("keep_ratio", self.keep_ratio))
        if self.num_keep is not None and self.keep_ratio is not None:
            raise ValueError(
                f"got num_keep={self.num_keep} and keep_ratio={self.keep_ratio}; pass one of them."
            )

    @classmethod
    def of_pruner(cls, pruner: Pruner, max_keep: int | None = None) -> Budget:
        """The pruner's own budget, and the most that any image keeps."""
        caps = [cap for cap in (pruner.max_keep, max_keep) if cap is not None]
        return cls(pruner.num_keep, pruner.keep_ratio, min(caps, default=None))

    def asked(self, num_tokens: int) -> int:
        """How many of an image's N tokens are asked for; where it is more than N, all stay as is.

        Args:
            num_tokens: N.
        """
        if self.num_keep is not None:
            wanted = self.num_keep
        elif self.keep_ratio is not None:
            wanted = count_kept(num_tokens, None, self.keep_ratio, None)
        else:
            wanted = num_tokens + 1
        return wanted if self.max_keep is None else min(wanted, self.max_keep)

    def of_request(self, given: Any, spec: str) -> Budget:
        """The budget of a request.

        Args:
            given: what the request says under `ocvtp`; None if it says nothing.
            spec: the engine's pruner: a request may name it, and no other.

        Raises:
            ValueError: for anything else than a budget.
        """
        if given is None:
            return self
        if not isinstance(given, Mapping):
            raise ValueError(
                f"the request has ocvtp={shown(given)}; pass a budget, e.g. {_EXAMPLE}."
            )
        changes = {key: value for key, value in given.items() if value is not None}
        if (named := changes.pop("pruner", spec)) != spec:
            raise ValueError(
                f"the request names pruner {shown(named)}, and this engine serves {spec!r}; leave"
                " the pruner out, or start another engine for it."
            )
        if others := sorted(map(str, changes.keys() - {*_OF_A_REQUEST})):
            raise ValueError(
                f"the request has ocvtp settings {', '.join(others)}; a request may set"
                f" {', '.join(_OF_A_REQUEST)}, all else is the engine's."
            )
        cap = changes.pop("max_keep", None)
        if cap is not None and self.max_keep is not None:
            cap = min(check_count("max_keep", cap), self.max_keep)
        own = Budget(**changes) if changes else self
        return replace(own, max_keep=self.max_keep if cap is None else cap)
