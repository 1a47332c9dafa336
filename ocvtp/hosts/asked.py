"""A question with its answer as tensors: what a frozen language model would read, token by token.

L columns of a prompt with its answer, M text tokens after an image, R' rows that a language model
adds to its hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ocvtp.choices import Positions
from ocvtp.hosts.in_llm.deepstack import Deepstack
from ocvtp.hosts.in_llm.plan import text_after
from ocvtp.hosts.prompt.columns import layout
from ocvtp.structures import VisualTokens, take


@dataclass(frozen=True)
class Asked:
    """Prompts with answers, one image in each, before a layer of the language model.

    Args:
        embeddings: [B, L, D'], what the layer reads.
        mask: [B, L] bool, False on padding.
        positions: [B, L], or [1 + C, B, L] where tokens have C coordinates; None where they are
            numbered along the columns.
        labels: [B, L] the tokens of answers, -100 elsewhere.
        columns: [B, N] of every visual token; -1 on padding, and for what was dropped.
        tokens: what was asked for of them, as a pruner there sees them.
        image: [B, L] bool, columns of the image: its tokens, and what stands between them.
        lines: [B, L] the line that a token is in, -1 for other columns; None where nothing ends
            lines. ends: [B, L] the same of what ends a line: it goes when all of the line's tokens
            do.
        deepstack: what the language model adds to its hidden states; None if it adds nothing.
        start: the layer that reads the embeddings, and the first that will run.
        whole: the same questions before the first layer, with all their tokens; None where these
            are.
    """

    embeddings: Tensor
    mask: Tensor
    positions: Tensor | None
    labels: Tensor
    columns: Tensor
    tokens: VisualTokens
    image: Tensor
    lines: Tensor | None = None
    ends: Tensor | None = None
    deepstack: Deepstack | None = None
    start: int = 0
    whole: Asked | None = None

    @property
    def last(self) -> Tensor:
        """[B] the column of the prompt's last token, before the first token of the answer."""
        width = torch.arange(self.mask.shape[1], device=self.mask.device)
        answer = self.labels >= 0
        first = width.masked_fill(~answer, self.mask.shape[1]).amin(dim=1, keepdim=True)
        return (width * (self.mask & (width < first))).argmax(dim=1)

    def text(self) -> tuple[Tensor, Tensor]:
        """[B, M] columns of the prompt's text after the image, and [B, M] bool which count.

        Where no text follows an image, it is all text of the prompt. Answers are not among it.
        """
        width = torch.arange(self.mask.shape[1], device=self.mask.device)
        end = (width * self.image).amax(dim=1, keepdim=True)
        prompt = self.mask & (self.labels < 0)
        return text_after(torch.where(self.image, 0, -1), prompt, end)

    def by_column(self, gates: Tensor) -> Tensor:
        """[B, N] gates of the visual tokens, for every column: [B, L], 1 where there is no token.

        What ends a line has the greatest gate of the line's tokens.
        """
        length = self.mask.shape[1]
        places = torch.where(self.columns < 0, length, self.columns)
        spread = gates.new_ones(len(places), length + 1).scatter(1, places, gates)[:, :length]
        if self.lines is None or self.ends is None:
            return spread
        num_lines = int(self.ends.max()) + 1
        in_line = torch.where(self.lines < 0, num_lines, self.lines)
        greatest = gates.new_zeros(len(places), num_lines + 1)
        greatest = greatest.scatter_reduce(1, in_line, spread, "amax")
        return torch.where(self.ends < 0, spread, greatest.gather(1, self.ends.clamp(min=0)))

    def weighted(self, gates: Tensor) -> Asked:
        """The same, every column times its gate [B, L], and so what a layer adds to it."""
        embeddings = (self.embeddings * gates[:, :, None]).to(self.embeddings.dtype)
        deepstack = self.deepstack
        if deepstack is not None:
            of_rows = gates_of_rows(deepstack, gates)
            rows = (deepstack.rows * of_rows[None, :, None]).to(deepstack.rows.dtype)
            deepstack = replace(deepstack, rows=rows)
        return replace(self, embeddings=embeddings, deepstack=deepstack)

    def repeat(self, times: int) -> Asked:
        """Every question so many times, one after the other."""

        def repeated(values: Tensor) -> Tensor:
            return values.repeat_interleave(times, dim=0)

        changed: dict[str, Any] = {
            f.name: repeated(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        if self.positions is not None and self.positions.ndim == 3:
            changed["positions"] = self.positions.repeat_interleave(times, dim=1)
        if self.deepstack is not None:  # every column has a row of its own
            places = repeated(self.deepstack.places)
            there = places >= 0
            changed["deepstack"] = Deepstack.at(there, self.deepstack.rows[:, places[there]])
        if self.whole is not None:
            changed["whole"] = self.whole.repeat(times)
        return replace(self, tokens=self.tokens.map(repeated), **changed)


def gates_of_rows(deepstack: Deepstack, gates: Tensor) -> Tensor:
    """[R'] gates of the rows that a language model adds, of gates of the columns [B, L]."""
    there = deepstack.places >= 0
    ones = gates.new_ones(deepstack.rows.shape[1])
    return ones.scatter(0, deepstack.places[there], gates[there])


def drop(asked: Asked, keep: Tensor, positions: Positions = "contiguous") -> Asked:
    """Questions without the visual tokens that are not kept, as after real pruning.

    Args:
        asked: the questions; gradients run through their embeddings.
        keep: [B, N] bool, which tokens stay.
        positions: `contiguous` numbers what is left from 0; `original` leaves the gaps. Where
            tokens have coordinates, they always keep them.
    """
    stays = asked.mask & (asked.by_column(keep.float()) > 0)
    index, padding = layout(stays, asked.mask, at_end=False)

    def short(values: Tensor, fill: int | bool = 0) -> Tensor:
        return values.gather(-1, index.expand(*values.shape[:-1], -1)).masked_fill(padding, fill)

    numbers = asked.positions
    if numbers is None and positions == "original":
        numbers = (asked.mask.long().cumsum(dim=1) - 1).clamp(min=0)
    if numbers is not None and numbers.ndim == 2 and positions == "contiguous":
        numbers = None
    elif numbers is not None:
        numbers = short(numbers)
        if numbers.ndim == 3:  # the first are plain numbers of the columns
            plain = ((~padding).long().cumsum(dim=1) - 1).clamp(min=0)
            numbers = torch.cat([plain[None], numbers[1:]])
    here = torch.arange(index.shape[1], device=index.device).expand_as(index)
    places = torch.full_like(asked.labels, -1).scatter(1, index, here)
    places = places.masked_fill(~stays, -1)
    columns = places.gather(1, asked.columns.clamp(min=0)).masked_fill(asked.columns < 0, -1)
    lines, ends, deepstack = asked.lines, asked.ends, asked.deepstack
    return replace(
        asked,
        embeddings=take(asked.embeddings, index),
        mask=~padding,
        positions=numbers,
        labels=short(asked.labels, -100),
        columns=columns,
        image=short(asked.image, False),
        lines=None if lines is None else short(lines, -1),
        ends=None if ends is None else short(ends, -1),
        deepstack=None
        if deepstack is None
        else replace(deepstack, places=short(deepstack.places, -1)),
    )
