"""Which columns of a prompt hold the user's own words.

R rows, L columns of a prompt, C columns without what is never compared, M words.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.base import Host
from ocvtp.hosts.prompt.chat_template import (
    ChatTemplate,
    Template,
    find_tokenizer,
    framing_tokens,
    special_tokens,
)

_NOTHING, _NO_MATCH = -1, -2  # no ids of tokens
_USER, _ASSISTANT = 1, 2


class Prompts:
    """Tells the user's words from what surrounds them.

    Padding, image placeholders and special tokens are no words. Where the processor has a chat
    template, the template's own tokens are none, nor is what the model says or a system prompt
    (where marks of more than one token tell who speaks). The template is known by its tokens, so
    they count as the template's even if a user types them. A prompt may lack the template, so one
    that happens to begin like half of its opening, or to end like half of its tail, loses that.

    Args:
        host: of the model.
        processor: or tokenizer, that makes the model's inputs; None if there is none.

    Raises:
        ValueError: if it is neither a processor nor a tokenizer, or belongs to another model.
    """

    def __init__(self, host: Host, processor: Any = None) -> None:
        self._image = image = host.image_token_id
        self._tokenizer: Any = None
        self._template: ChatTemplate | None = None
        self._framing: set[int] = set()
        if processor is None:
            self._special = _special_of_configs(host.model)
        else:
            self._tokenizer = tokenizer = find_tokenizer(processor)
            _check(processor, tokenizer, image)
            self._special = special_tokens(tokenizer)
            self._framing = framing_tokens(tokenizer)
            self._template = ChatTemplate(processor, image)
        self._special.discard(image)

    @property
    def problem(self) -> str | None:
        """Why words of a chat template are taken for the user's; None if they are not."""
        return "was not found" if self._template is None else self._template.problem

    def words(self, ids: Tensor, real: Tensor, num_images: Sequence[int]) -> Tensor:
        """[R, L] bool, True on the user's words.

        Args:
            ids: [R, L].
            real: [R, L] bool, False on padding.
            num_images: of each row.
        """
        compared = real & ~_is_in(ids, self._framing)
        compared &= ~_repeated(ids == self._image, compared)
        order = (~compared).long().argsort(dim=1, stable=True)  # what is compared comes first
        counts = compared.sum(dim=1, keepdim=True)  # [R, 1]
        order = order[:, : int(counts.max())]
        beyond = torch.arange(order.shape[1], device=ids.device) >= counts
        tokens = ids.gather(1, order).masked_fill(beyond, _NOTHING)  # [R, C]
        own = ~beyond & (tokens != self._image) & ~_is_in(tokens, self._special)
        if self._template is not None and self.problem is None:
            templates = [self._template.around(number) for number in num_images]
            own &= ~_around(tokens, counts, templates) & _by_user(tokens, templates)
        return torch.zeros_like(compared).scatter(1, order, own)

    def strings(self, ids: Tensor, words: Tensor) -> list[str]:
        """The words of each row; a space is where something was left out between them.

        Args:
            ids: [R, L]. words: [R, L] as `words` returns them.
        """
        assert self._tokenizer is not None
        pieces: list[list[int]] = []
        rows: list[int] = []
        for row, pairs in enumerate(zip(ids.tolist(), words.tolist(), strict=True)):
            for is_word, piece in groupby(zip(*pairs, strict=True), key=lambda pair: pair[1]):
                if is_word:
                    pieces.append([token for token, _ in piece])
                    rows.append(row)
        texts = self._tokenizer.batch_decode(pieces, clean_up_tokenization_spaces=False)
        said: list[list[str]] = [[] for _ in range(len(ids))]
        for row, text in zip(rows, texts, strict=True):
            said[row].append(text.strip())
        return [" ".join(filter(None, parts)) for parts in said]


def embed_words(embed: Any, ids: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of the words.

    Args:
        embed: the language model's input embeddings.
        ids: [R, L]. words: [R, L] bool.

    Returns:
        [R, M, D'], and [R, M] bool that marks words; the rest is 0.
    """
    counts = words.sum(dim=1, keepdim=True)
    order = (~words).long().argsort(dim=1, stable=True)[:, : int(counts.max())]
    valid = torch.arange(order.shape[1], device=ids.device) < counts
    embeddings: Tensor = embed(ids.gather(1, order))
    valid = valid.to(embeddings.device)
    return embeddings.masked_fill(~valid[:, :, None], 0), valid


def _check(processor: Any, tokenizer: Any, image_token_id: int) -> None:
    if tokenizer is None:
        raise ValueError(
            f"processor is a {type(processor).__name__}; pass the processor or the tokenizer that"
            " makes the model's inputs."
        )
    theirs = getattr(processor, "image_token_id", None)
    if theirs is None and len(tokenizer) <= image_token_id:
        theirs = "not in its vocabulary"
    if theirs not in (None, image_token_id):
        raise ValueError(
            f"the model's image placeholder is token {image_token_id}, that of the processor is"
            f" {theirs}; pass the processor that makes this model's inputs."
        )


def _special_of_configs(model: Any) -> set[int]:
    found: set[Any] = set()
    for config in (model.config.get_text_config(), model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            found |= set(value if isinstance(value, (list, tuple)) else [value])
    return found - {None}


def _is_in(ids: Tensor, some: set[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(some), dtype=ids.dtype, device=ids.device))


def _repeated(image: Tensor, compared: Tensor) -> Tensor:
    """[R, L] placeholders that directly follow another one, whatever is not compared between."""
    columns = torch.arange(image.shape[1], device=image.device).expand_as(image)
    last = columns.masked_fill(~compared, -1).cummax(dim=1).values
    before = last.roll(1, dims=1)  # the last compared column before each
    before[:, 0] = -1
    return image & (before >= 0) & image.gather(1, before.clamp(min=0))


def _around(tokens: Tensor, counts: Tensor, templates: Sequence[Template]) -> Tensor:
    """[R, C] tokens that match the head of their row's template, or its tail."""
    openings = torch.tensor([t.opening for t in templates], device=tokens.device)
    lengths = torch.tensor([len(t.tail) for t in templates], device=tokens.device)
    found = _leading(tokens, [t.head for t in templates], openings)
    # From the end: column c of a row of n changes places with column n - 1 - c.
    mirror = counts - 1 - torch.arange(tokens.shape[1], device=tokens.device)
    outside, mirror = mirror < 0, mirror.clamp(min=0)
    backwards = tokens.gather(1, mirror).masked_fill(outside, _NOTHING)
    ends = _leading(backwards, [t.tail[::-1] for t in templates], lengths)
    return found | ends.gather(1, mirror) & ~outside


def _leading(tokens: Tensor, heads: Sequence[Sequence[int]], sizes: Tensor) -> Tensor:
    """[R, C] where the rows begin like their heads, if that is half of `sizes` [R] or more."""
    expected = torch.full_like(tokens, _NO_MATCH)
    for row, head in zip(expected, heads, strict=True):
        part = head[: len(row)]
        row[: len(part)] = row.new_tensor(part)
    same = (tokens == expected).cumprod(dim=1).bool()
    return same & (2 * same.sum(dim=1) >= sizes)[:, None]


def _by_user(tokens: Tensor, templates: Sequence[Template]) -> Tensor:
    """[R, C] tokens of the user's turns, the marks of turns left out."""
    width = tokens.shape[1]
    in_mark = torch.zeros_like(tokens, dtype=torch.bool)
    turns = torch.zeros_like(tokens)  # who speaks after a mark, at its last column
    users = {mark for template in templates for mark in template.user}
    for mark in users.union(*(template.assistant for template in templates)):
        if (size := len(mark)) > width:
            continue
        hits = (tokens.unfold(1, size, 1) == tokens.new_tensor(mark)).all(dim=2)
        for offset in range(size):
            in_mark[:, offset : width - size + 1 + offset] |= hits
        turns[:, size - 1 :].masked_fill_(hits, _USER if mark in users else _ASSISTANT)
    columns = torch.arange(width, device=tokens.device).expand_as(tokens)
    last = columns.masked_fill(turns == 0, -1).cummax(dim=1).values
    speaker = turns.gather(1, last.clamp(min=0))
    # Before the first mark is a system prompt if the mark opens a turn of the user's.
    first = turns.gather(1, (turns > 0).long().argmax(dim=1, keepdim=True))
    before = torch.where(first == _USER, _ASSISTANT, _USER)
    return (torch.where(last < 0, before, speaker) == _USER) & ~in_mark
