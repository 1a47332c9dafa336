"""Similarities of tokens: a row at a time, or of all pairs.

A row reads all N D values of an image for as many products: memory is its limit. One matrix of all
pairs takes N / 2 times as many, but reads the values few times. So whoever needs R rows takes them
from a matrix where 14 R >= N and N <= 8192 (256 MiB an image), and else asks for them one by one
(`pairs_pay`). D and the number of images B change nothing: the cost of both grows with them alike.
An image therefore takes the same way in every batch of images of its size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ocvtp.structures import take

_BLOCK = 128  # measured: the fastest of 96 to 720 at 576 tokens of width 1024 and 4096
_ROWS_FOR_ALL = 14  # that share of the rows takes as long as all pairs: 10 and 19 on two CPUs
_MOST_TOKENS = 8192  # 256 MiB a matrix
_SHORTEST = 1e-12  # what is shorter counts as of this length: a blank token is like nothing


def full(x: Tensor) -> Tensor:
    """Half precision as fp32; the rest as it is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def unit(x: Tensor) -> Tensor:
    """[..., D] at length 1, in fp32 at least; zero vectors stay zero."""
    return functional.normalize(full(x), dim=-1)


def row(directions: Tensor, pick: Tensor) -> Tensor:
    """Cosine of one token of every image to all of its tokens.

    Args:
        directions: [B, N, D] of length 1.
        pick: [B] token numbers.

    Returns:
        [B, N].
    """
    return (directions @ take(directions, pick[:, None]).transpose(1, 2)).squeeze(2)


def pairs_pay(num_tokens: int, num_rows: int) -> bool:
    """Whether `num_rows` rows are cheaper from one matrix of all pairs than one by one."""
    return num_rows * _ROWS_FOR_ALL >= num_tokens and pairs_fit(num_tokens)


def pairs_fit(num_tokens: int) -> bool:
    """Whether a matrix of all pairs of an image's tokens may be held."""
    return num_tokens <= _MOST_TOKENS


@torch.no_grad()
def all_pairs(x: Tensor) -> Tensor:
    """Products of every two tokens of an image, each computed once.

    Args:
        x: [B, N, D].

    Returns:
        [B, N, N], symmetric to the last bit outside of blocks on the diagonal.
    """
    batch, count, _ = x.shape
    products = x.new_empty(batch, count, count)
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        products[:, start:stop, start:] = x[:, start:stop] @ x[:, start:].mT
        products[:, stop:, start:stop] = products[:, start:stop, stop:].mT
    return products


def by_image(function: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """`function(*values)` [B, ...], on a CPU of one image after the other.

    What it reads then stays in the cache, and does not depend on other images to the last bit.
    """
    if values[0].device.type != "cpu" or len(values[0]) < 2:
        return function(*values)
    first, *others = zip(*(part.split(1) for part in values), strict=True)
    made = function(*first)
    found = made.new_empty(len(values[0]), *made.shape[1:])  # never all of them and their join
    found[:1] = made
    for number, image in enumerate(others, 1):
        found[number : number + 1] = function(*image)
    return found


def cosine_pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of every two tokens of [B, N, D], of any length: [B, N, N]; and their lengths [B, N]."""
    products = by_image(lambda own: all_pairs(full(own)), x)
    lengths = products.diagonal(dim1=1, dim2=2).sqrt()
    scale = lengths.clamp(min=_SHORTEST).reciprocal()
    return products.mul_(scale[:, :, None]).mul_(scale[:, None]).nan_to_num_(), lengths


class Cosines:
    """Cosines of tokens of any length, divided by it where that costs least.

    `unit(x)` would take as much memory as x, and a quarter of the time of all pairs. What is no
    number, of tokens too long for their products, counts as 0.

    Args:
        x: [B, N, D].
        num_rows: how many rows will be asked for; they come one by one, or of one matrix of all
            pairs, see `pairs_pay`.

    Attributes:
        lengths: [B, N].
    """

    def __init__(self, x: Tensor, num_rows: int) -> None:
        self._x = x
        self._pairs: Tensor | None = None
        if pairs_pay(x.shape[1], num_rows):
            self._pairs, self.lengths = cosine_pairs(x)
        else:
            self._x = full(x)  # read again and again
            self.lengths = torch.linalg.vector_norm(self._x, dim=2)

    @property
    def _divisor(self) -> Tensor:
        return self.lengths.clamp(min=_SHORTEST)

    def __call__(self, pick: Tensor) -> Tensor:
        """Of one token [B] of every image to all of its tokens, [B, N]."""
        if self._pairs is not None:
            return take(self._pairs, pick[:, None]).squeeze(1)
        ends = self._divisor.gather(1, pick[:, None])
        return (row(self._x, pick) / self._divisor / ends).nan_to_num()

    def to(self, direction: Tensor) -> Tensor:
        """Of all tokens to one direction [B, D] of length 1 of every image, [B, N]."""
        return (self._products(direction[:, None]).squeeze(1) / self._divisor).nan_to_num()

    def to_sum(self, chosen: Tensor) -> Tensor:
        """[B, N] of each token the sum of its cosines to those that the mask [B, N] chooses."""
        if self._pairs is not None:
            return (chosen.to(self._pairs)[:, None] @ self._pairs).squeeze(1)
        shares = (chosen / self._divisor)[:, None]
        return (self._products(shares @ self._x).squeeze(1) / self._divisor).nan_to_num()

    def nearest_of(self, chosen: Tensor) -> Tensor:
        """[B, N] the largest cosine of each token to the tokens [B, K]."""
        if self._pairs is not None:
            return take(self._pairs, chosen).amax(dim=1)
        directions = take(self._x, chosen) / self._divisor.gather(1, chosen)[:, :, None]
        return (self._products(directions).amax(dim=1) / self._divisor).nan_to_num()

    def nearest_other(self, valid: Tensor | None) -> Tensor:
        """[B, N] of each token to the most similar other one; -inf for one without another.

        Where there is no matrix, every pair is computed once: block i meets itself and the blocks
        after it. Where there is one, a token's cosine to itself is -inf from then on.

        Args:
            valid: [B, N] bool; padding is nobody's neighbour.
        """
        if self._pairs is not None:
            return _nearest_in(self._pairs, valid)
        return _nearest_other(unit(self._x), valid)

    def _products(self, directions: Tensor) -> Tensor:
        """[B, K, D] with all tokens, [B, K, N]."""
        return by_image(lambda own, to: to @ full(own).mT, self._x, directions)


def _nearest_in(pairs: Tensor, valid: Tensor | None) -> Tensor:
    pairs.diagonal(dim1=1, dim2=2).fill_(float("-inf"))
    if valid is None:
        return pairs.amax(dim=2)
    real = valid[:, None] & valid[:, :, None]
    return pairs.masked_fill(~real, float("-inf")).amax(dim=2)


def _nearest_other(directions: Tensor, valid: Tensor | None) -> Tensor:
    batch, count, _ = directions.shape
    best = directions.new_full((batch, count), float("-inf"))
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        cosine = directions[:, start:stop] @ directions[:, start:].transpose(1, 2)
        cosine.diagonal(dim1=1, dim2=2).fill_(float("-inf"))
        if valid is not None:
            cosine = cosine.masked_fill(~valid[:, None, start:], float("-inf"))
            cosine = cosine.masked_fill(~valid[:, start:stop, None], float("-inf"))
        best[:, start:stop] = torch.maximum(best[:, start:stop], cosine.amax(dim=2))
        if stop < count:
            after = cosine[:, :, stop - start :].amax(dim=1)
            best[:, stop:] = torch.maximum(best[:, stop:], after)
    return best
