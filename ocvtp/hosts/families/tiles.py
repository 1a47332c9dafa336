"""Where the tokens of tiles are among the rows that the language model reads of images.

T tiles of a call (base views included), N tokens of a tile, R rows that the language model reads of
all images: tokens, and a newline after every row of an image's tiles. U views that pruners see
(images, or tiles), M tokens of a view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ocvtp.choices import Separators
from ocvtp.ops.token_views import left_over

Pack = Callable[[Sequence[Tensor], Tensor], list[Tensor]]
"""A model's packing of each image's tiles [tiles, N, C], with a newline [C], as rows [n, C]."""


@dataclass(frozen=True)
class Views:
    """The tokens that pruners see, U views of M.

    Args:
        index: [U, M] numbers of the tokens, counted over all tiles; on padding, of some token.
        valid: [U, M] bool, False on padding; None where there is none.
        places: [U, M] the row of every token, -1 on padding.
        tiles: [U] the tile whose CLS speaks for each view.
        starts: [U] the first row of the image that each is of.
    """

    index: Tensor
    valid: Tensor | None
    places: Tensor
    tiles: Tensor
    starts: Tensor


@dataclass(frozen=True)
class TokenMap:
    """Where the tokens of the tiles are among the rows that the language model reads.

    Args:
        source: [R] number of the token, counted over all tiles (tile * N + token); -1 for newlines.
        line: [R] number of the row of the image, counted over all images, that a token of the
            tiles is in or that a newline ends; -1 for tokens of base views, which have no ends
            (an image that is not cut into tiles is one row).
        lengths: rows of each image, I in all.
        num_tiles: of each image, the base view included.
        num_tokens: N.
        mixed: whether some of the rows are means of tokens; then `source` only tells which are
            newlines, until `by_rows`.
    """

    source: Tensor
    line: Tensor
    lengths: list[int]
    num_tiles: list[int]
    num_tokens: int
    mixed: bool = False

    @classmethod
    def of(cls, pack: Pack, num_tiles: list[int], num_tokens: int) -> TokenMap:
        """Send numbers and their squares in place of tokens through a model's own packing."""
        numbers = torch.arange(sum(num_tiles) * num_tokens, dtype=torch.float64)  # exact to 2^26
        tiles = torch.stack([numbers, numbers**2], dim=1).view(-1, num_tokens, 2)
        packed = pack(tiles.split(num_tiles), numbers.new_tensor([-1.0, 1.0]))
        number, square = torch.cat(packed).unbind(dim=1)
        # The square of a mean of different numbers is not the mean of their squares, even if whole.
        mixed = not (number.equal(number.round()) and square.equal(number**2))
        lengths = [len(image) for image in packed]
        is_end = number < 0
        is_base = torch.zeros_like(is_end)
        for image, tiled in zip(is_base.split(lengths), num_tiles, strict=True):
            image[: num_tokens if tiled > 1 else 0] = True
        line = (is_end.cumsum(dim=0) - is_end.long()).masked_fill(is_base, -1)
        return cls(number.long(), line, lengths, num_tiles, num_tokens, mixed)

    def by_rows(self) -> TokenMap:
        """Images as single tiles, whose tokens are the rows that are read, without newlines."""
        images = [image >= 0 for image in self.source.split(self.lengths)]
        most = max(int(image.sum()) for image in images)
        source = [
            torch.where(image, i * most + image.cumsum(dim=0) - 1, -1)
            for i, image in enumerate(images)
        ]
        return replace(self, source=torch.cat(source), num_tiles=[1] * len(images), num_tokens=most)

    def places(self) -> Tensor:
        """[T, N] the row of every token; -1 for those that unpadding removes."""
        places = torch.full((sum(self.num_tiles) * self.num_tokens,), -1)
        rows = (self.source >= 0).nonzero()[:, 0]
        places[self.source[rows]] = rows
        return places.view(-1, self.num_tokens)

    def base_tiles(self) -> Tensor:
        """[I] the number of each image's base view."""
        counts = torch.tensor(self.num_tiles)
        return counts.cumsum(dim=0) - counts

    def starts(self) -> Tensor:
        """[I] the first row of each image."""
        lengths = torch.tensor(self.lengths)
        return lengths.cumsum(dim=0) - lengths

    def seen(self, per_tile: bool, there: Tensor | None = None) -> Views:
        """`views`, and the rows of their tokens."""
        index, tiles, starts = self.views(per_tile, there)
        valid = index >= 0
        places = self.places().flatten()[index].masked_fill(~valid, -1)
        index = torch.where(valid, index, tiles[:, None] * self.num_tokens)
        return Views(index, None if bool(valid.all()) else valid, places, tiles, starts)

    def ends(self, separators: Separators, kept: Tensor) -> Tensor:
        """Rows of the newlines that stay, if the rows `kept` do.

        Args:
            separators: those of `rows` that kept a token, `all`, or `none`.
            kept: [R'] row numbers.
        """
        newlines = (self.source < 0).nonzero()[:, 0]
        if separators == "none":
            return newlines[:0]
        if separators == "all":
            return newlines
        lines = self.line[kept.to(self.line.device)]
        return newlines[torch.isin(self.line[newlines], lines)]

    def views(self, per_tile: bool, there: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What pruners see.

        Args:
            per_tile: whether they see every tile as an image of its own.
            there: [T, N] bool, which tokens the tower left; None for all.

        Returns:
            [U, M] numbers of the tokens, in the order in which the language model reads them, -1
            where there is none; [U] the tile whose CLS speaks for each view; [U] first row of the
            image that each is of.
        """
        source = self.source
        if there is not None:
            source = torch.where((source >= 0) & there.flatten()[source], source, -1)
        if per_tile:
            places = replace(self, source=source).places()
            tiles = (places >= 0).any(dim=1).nonzero()[:, 0]  # unpadding may remove a whole one
            numbers = torch.arange(places.numel()).view_as(places).masked_fill(places < 0, -1)
            starts = self.starts().repeat_interleave(torch.tensor(self.num_tiles))
            numbers = numbers[tiles]
            if there is not None:
                left, _ = left_over(numbers >= 0)
                numbers = numbers.gather(1, left)
            return numbers, tiles, starts[tiles]
        images = [image[image >= 0] for image in source.split(self.lengths)]
        index = nn.utils.rnn.pad_sequence(images, batch_first=True, padding_value=-1)
        return index, self.base_tiles(), self.starts()


def newline_of(rows: Sequence[Tensor], token_map: TokenMap) -> Tensor | None:
    """[D'] the first newline among what the language model would read of images."""
    assert [len(image) for image in rows] == token_map.lengths
    for image, source in zip(rows, token_map.source.split(token_map.lengths), strict=True):
        if bool((source < 0).any()):
            return image[int((source < 0).nonzero()[0])].clone()
    return None


def with_ends(
    positions: Tensor, rows: Tensor, ends: Tensor, newline: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Kept rows [n, D'] and the newlines [D'] after them, in the order of their row numbers.

    Args:
        positions: [n] the numbers of the kept rows. rows: they.
        ends: [m] the numbers of the newlines. newline: what each is; None where there is none.
    """
    positions, order = torch.cat([positions, ends.to(positions.device)]).sort()
    if newline is not None:
        rows = torch.cat([rows, newline.to(rows).expand(len(ends), -1)])
    return positions, rows[order.to(rows.device)]
