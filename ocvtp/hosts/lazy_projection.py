"""Rows that the language model would read of images, most of which it never will.

T tiles (or images) of a call, R rows that the language model would read of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LaterRows:
    """Rows [R, D'] that are projected when they are asked for, as `rows[positions]`.

    Args:
        features: [T, N, ...], what the projector is given.
        project: the projector; it treats each token on its own.
        num_tokens: rows that are tokens.
        source: [R] the number among all T N of the token that every row is, -1 for rows that
            are none, which nobody may ask for; None where the rows are all tokens in their order.
        made: [R, D'] if they were all projected.
    """

    features: Tensor
    project: Callable[[Tensor], Tensor]
    num_tokens: int
    source: Tensor | None = None
    made: Tensor | None = None

    def __len__(self) -> int:
        return self.num_tokens if self.source is None else len(self.source)

    def __getitem__(self, positions: Tensor) -> Tensor:
        """[..., D'] the rows at `positions` [...], projected together."""
        if self.made is not None:
            return self.made[positions]
        index = positions if self.source is None else self.source[positions]
        if index.numel() >= self.num_tokens:  # the same product as without pruning
            rows = self.project(self.features).flatten(0, 1)
            return rows[index.to(rows.device)]
        return self.project(self.features.flatten(0, 1)[index])

    @classmethod
    def of(
        cls,
        features: Tensor,
        project: Callable[[Tensor], Tensor],
        source: Tensor | None,
        rows: Sequence[Tensor] | None,
    ) -> LaterRows:
        """Rows of some tokens.

        Args:
            features: see above. project: see above.
            source: see above, on the CPU.
            rows: of each image, if they were all projected.
        """
        count = features.shape[0] * features.shape[1]
        if source is not None:
            count, source = int((source >= 0).sum()), source.to(features.device)
        made = None if rows is None else torch.cat(list(rows))
        return cls(features, project, count, source, made)

    @property
    def device(self) -> torch.device:
        """Where `positions` must be."""
        if self.made is not None:
            return self.made.device
        return self.features.device if self.source is None else self.source.device

    def unmade(self) -> LaterRows:
        """The same as if none had been projected."""
        return replace(self, made=None)


Rows = Tensor | LaterRows
"""[R, D'], to take `rows[positions]` from."""
