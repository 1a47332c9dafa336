"""Where the tokens of tiles are among the rows that the language model reads of images.

T tiles of a call (base views included), N tokens of a tile, R rows that the language model reads of
all images: tokens, and a newline after every row of an image's tiles. U views that pruners see
(images, or tiles), M tokens of a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ocvtp.ops.token_views import left_over


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
