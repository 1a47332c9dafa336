"""What attention deposits at each place of a fixed grid, whatever an image shows there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ocvtp.hosts.asking import Asked, attention_rows
from ocvtp.hosts.base import Host
from ocvtp.selectors.losses import Loss
from ocvtp.structures import VisualTokens


class Deposition(nn.Module):
    """The mean attention of layers at each position, over training questions.

    Args:
        host: of the frozen model.
        losses: of the run; where none has `deposition`, nothing is measured.

    Raises:
        ValueError: for a model whose images differ in the number of their tokens.
    """

    def __init__(self, host: Host, losses: Sequence[Loss]) -> None:
        super().__init__()
        reading = [loss for loss in losses if loss.deposition]
        layers = tuple(sorted({layer for loss in reading for layer in loss.layers}))
        rows: Any = next((loss.rows for loss in reading), "text")
        self._host, self._rows, self._layers = host, rows, layers
        if layers and host.image_tokens is None:
            raise ValueError(
                "a loss has deposition: true, which divides attention by its mean at each position,"
                f" and images of {host.model.config.model_type!r} differ in their positions; leave"
                " it out, or pass a model whose images are all of one grid."
            )
        for layer in layers:  # NaN tells that nothing was measured
            self.register_buffer(_name(layer), torch.full((host.image_tokens or 0,), float("nan")))
        self._sums, self._count = dict[int, Tensor](), 0

    @property
    def is_missing(self) -> bool:
        """Whether it is yet to be measured."""
        return any(bool(mean.isnan().any()) for mean in self.means().values())

    def means(self) -> dict[int, Tensor]:
        """Layer -> [N]."""
        return {layer: self.get_buffer(_name(layer)) for layer in self._layers}

    def add(self, asked: Asked) -> None:
        """Take in some questions."""
        found = attention_rows(self._host, asked, self._layers, self._rows)
        for layer, rows in found.items():
            self.check(asked.tokens)
            self._sums[layer] = self._sums.get(layer, 0) + rows.double().sum(dim=0)
        self._count += len(asked.mask)

    def measure(self) -> None:
        """The mean of what was taken in."""
        for layer, total in self._sums.items():
            self.get_buffer(_name(layer)).copy_(total / self._count)
        self._sums, self._count = {}, 0

    def check(self, tokens: VisualTokens) -> None:
        """Refuse tokens of another grid.

        Raises:
            ValueError: for these.
        """
        for mean in self.means().values():
            if tokens.valid is not None or tokens.num_tokens != len(mean):
                raise ValueError(
                    f"a loss has deposition: true, which knows {len(mean)} positions, and images"
                    f" came as up to {tokens.num_tokens} tokens; leave it out where images differ."
                )


def _name(layer: int) -> str:
    return f"layer{layer}"
