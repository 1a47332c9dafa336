"""Packed rows: several samples one after the other in one row, without padding between them.

Where a call brings no mask, transformers tells samples apart by positions that do not go up by one,
or by the ends that its flash attention wants. Both stay true of the short rows.

L columns of the caller's rows, L' of the short ones, C coordinates of a token, S samples of all
rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ocvtp.hosts.prompt.columns import gather_columns
from ocvtp.transformers_names import cache_in

_ENDS = ("cu_seq_lens_q", "cu_seq_lens_k")
_LONGEST = ("max_length_q", "max_length_k")


@dataclass(frozen=True)
class Packed:
    """Rows whose samples do not see each other.

    Args:
        samples: [B, L] the number of the sample that each column is of, counted through all rows.
        numbers: [B, L] the positions that tell them apart; None where only their ends do.
    """

    samples: Tensor
    numbers: Tensor | None

    @property
    def has_several(self) -> bool:
        """Whether some row holds more than one sample."""
        return bool((self.samples[:, -1] > self.samples[:, 0]).any())

    def renumber(self, index: Tensor, padding: Tensor) -> Tensor:
        """[B, L'] positions of what is left, which go up by one inside of each sample.

        Padding, which is on the right, gets zeros: each column is a sample of its own.

        Raises:
            ValueError: if a sample would continue where the one before it ends.
        """
        assert self.numbers is not None
        columns = torch.arange(index.shape[1], device=index.device).expand_as(index)
        samples = gather_columns(self.samples, index, padding, -1)
        first = _first_columns(samples)
        starts = self.numbers - torch.arange(self.samples.shape[1], device=index.device)
        starts = starts + _first_columns(self.samples)  # the first position of each one's sample
        numbers = starts.gather(1, index) + columns - first
        joined = (numbers.diff(dim=1) == 1) & (samples.diff(dim=1) != 0) & ~padding[:, 1:]
        if bool(joined.any()):
            raise ValueError(
                "position_ids of packed samples begin where those of the shortened sample before"
                " end, so that they would be taken for one; let the positions of every sample begin"
                " with 0."
            )
        return numbers.masked_fill(padding, 0)

    def by_sample(self, values: Tensor, fill: int = 0) -> Tensor:
        """[B, L] -> [S, L of the longest sample]; the others are padded with `fill`."""
        sizes = self.samples.flatten().bincount().tolist()
        parts = list(values.flatten().split(sizes))
        return pad_sequence(parts, batch_first=True, padding_value=fill)


def find_samples(inputs: dict[str, Any], ids: Tensor, plain_ones_tell: bool) -> Packed | None:
    """How a call tells samples of one row apart; None if it does not.

    Args:
        inputs: of forward().
        ids: [B, L].
        plain_ones_tell: see `Host.plain_positions_tell`; the first of 1 + C planes always does.
    """
    if inputs.get("attention_mask") is not None or cache_in(inputs) is not None:
        return None
    numbers, ends = inputs.get("position_ids"), inputs.get(_ENDS[0])
    if numbers is not None and numbers.ndim == 3:
        numbers = numbers[0] if len(numbers) == 4 else None
    elif not plain_ones_tell:
        numbers = None
    starts = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    starts[:, 0] = True
    if numbers is not None:
        numbers = numbers.to(ids.device).expand_as(ids)
        starts[:, 1:] |= numbers.diff(dim=1) != 1
    if ends is not None:
        starts.view(-1)[ends[:-1].to(ids.device)] = True
    if numbers is None and ends is None:
        return None
    samples = (starts.flatten().cumsum(dim=0) - 1).view_as(ids)
    return Packed(samples, numbers)


def shorten_ends(inputs: dict[str, Any], keep: Tensor, padding: Tensor) -> dict[str, Any]:
    """The arguments of flash attention that say where samples end, of the short rows.

    Args:
        inputs: of forward().
        keep: [B, L] bool, what stays.
        padding: [B, L'] bool.

    Raises:
        ValueError: if rows would have to be padded.
    """
    found: dict[str, Any] = {}
    if not any(inputs.get(name) is not None for name in _ENDS):
        return found
    if bool(padding.any()):
        raise ValueError(
            f"{_ENDS[0]} tells samples apart that are one after the other in all rows, but the"
            " pruner left some rows longer than others; pass one row."
        )
    before = torch.nn.functional.pad(keep.flatten().cumsum(dim=0), (1, 0))  # kept ones
    for name, longest in zip(_ENDS, _LONGEST, strict=True):
        if (ends := inputs.get(name)) is not None:
            short = before.to(ends.device)[ends.long()]
            found[name] = short.to(ends.dtype)
            if (given := inputs.get(longest)) is not None:
                size = short.diff().max()
                found[longest] = size.to(given) if isinstance(given, Tensor) else int(size)
    return found


def _first_columns(samples: Tensor) -> Tensor:
    """[B, L] the column in which the sample of each column begins."""
    columns = torch.arange(samples.shape[1], device=samples.device).expand_as(samples)
    begins = torch.ones_like(samples, dtype=torch.bool)
    begins[:, 1:] = samples.diff(dim=1) != 0
    return columns.masked_fill(~begins, 0).cummax(dim=1).values
