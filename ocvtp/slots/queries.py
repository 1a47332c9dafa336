"""Where the slots start: samples of one shared Gaussian; D is the slot width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_BLOCK = 256  # rows drawn from one seed, so that a table is a prefix of every longer one


def noise_table(num_rows: int, dim: int, seed: int) -> Tensor:
    """Standard normal noise [num_rows, D], the same on every machine and for every length.

    Row i depends on (seed, i, dim) alone: the first rows of a longer table are the shorter table.
    """
    if torch.get_default_device().type == "meta":  # where shapes alone are asked for
        return torch.empty(num_rows, dim)
    blocks = []
    for block in range(-(-num_rows // _BLOCK)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
        blocks.append(torch.randn(_BLOCK, dim, generator=generator))
    return torch.cat(blocks)[:num_rows] if blocks else torch.empty(0, dim)


class GaussianQueries(nn.Module):
    """Initial slots `mean + noise * exp(logstd)`: any number of them, from one shared Gaussian.

    In training mode the noise is fresh unless `frozen`. Otherwise it is the first S rows of a table
    that was drawn once from `seed` and is saved with the weights; an S beyond the table draws the
    missing rows from the same seed.

    Args:
        dim: D.
        num_rows: rows of the saved table.
        seed: of the table.
        frozen: whether the table is used in training too.
    """

    noise: Tensor

    def __init__(self, dim: int, num_rows: int = 1024, seed: int = 0, frozen: bool = False) -> None:
        super().__init__()
        self.seed = seed
        self.frozen = frozen
        self.mean = nn.Parameter(torch.empty(1, 1, dim))
        self.logstd = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.xavier_uniform_(self.mean)
        nn.init.xavier_uniform_(self.logstd)
        self.register_buffer("noise", noise_table(num_rows, dim, seed))

    def forward(
        self,
        batch_size: int,
        num_slots: int,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Initial slots.

        Args:
            batch_size: B.
            num_slots: S.
            noise: [B or 1, S, D] to use instead of the module's own.

        Returns:
            [B, S, D]
        """
        dim = self.mean.shape[-1]
        if noise is None and self.training and not self.frozen:
            noise = torch.randn(batch_size, num_slots, dim, device=self.mean.device)
        elif noise is None:
            noise = self._rows(num_slots)[None]
        elif noise.shape[0] not in (1, batch_size) or noise.shape[1:] != (num_slots, dim):
            raise ValueError(
                f"noise has shape {list(noise.shape)}; pass [{batch_size} or 1, {num_slots}, {dim}]"
                " (images, slots, slot width)."
            )
        slots = self.mean + noise * self.logstd.exp()
        return slots.expand(batch_size, -1, -1)

    def _rows(self, num_slots: int) -> Tensor:
        saved = self.noise.shape[0]
        if num_slots <= saved:
            return self.noise[:num_slots]
        extra = noise_table(num_slots, self.noise.shape[1], self.seed)[saved:]
        return torch.cat([self.noise, extra.to(self.noise)])
