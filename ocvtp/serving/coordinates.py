"""The three coordinates of every token of a prompt with pruned images, as Qwen-VL counts them.

L tokens of the pruned prompt, K of an image, R rows of images.

Text has the coordinates that it would have in the whole prompt: what follows an image goes on after
its longer side, whatever was kept. So all is known before a tower runs but where in its image each
token is. That travels with the rows, as columns after them: it is known where they are made, and
needed where they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_COLUMNS = 4
_BASE = 256  # whole numbers up to it are exact in bfloat16


@dataclass(frozen=True)
class Place:
    """Where an image is in a prompt.

    Args:
        first: column of its first token.
        length: K.
        grid_hw: rows and columns of its tokens before it was pruned.
    """

    first: int
    length: int
    grid_hw: tuple[int, int]


def prompt_coordinates(num_tokens: int, images: Sequence[Place]) -> tuple[Tensor, int]:
    """The coordinates of a prompt, before those of its images' tokens are known.

    Args:
        num_tokens: L.
        images: of the prompt.

    Returns:
        [3, L], the tokens of an image all at its origin; and how far coordinates run ahead of the
        columns after the prompt.
    """
    places = torch.empty(num_tokens, dtype=torch.long)
    column = ahead = 0
    for image in sorted(images, key=lambda image: image.first):
        end = image.first + image.length
        places[column : image.first] = torch.arange(column, image.first) + ahead
        places[image.first : end] = image.first + ahead
        column, ahead = end, ahead + max(image.grid_hw) - image.length
    places[column:] = torch.arange(column, num_tokens) + ahead
    return places.repeat(3, 1), ahead


def with_columns(rows: Tensor, keep_indices: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Rows of images and, in further columns, where in its image each is.

    Args:
        rows: [..., D].
        keep_indices: [...] of the tokens in the image.
        grid_hw: rows and columns of its tokens.

    Returns:
        [..., D + 4].
    """
    parts = [keep_indices // grid_hw[1], keep_indices % grid_hw[1]]
    digits = [digit for part in parts for digit in (part // _BASE, part % _BASE)]
    return torch.cat([rows, torch.stack(digits, dim=-1).to(rows)], dim=-1)


def apart(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Take the columns off.

    Args:
        rows: [R, D + 4], see `with_columns`.

    Returns:
        [R, D]; and [R, 3], how far each token's coordinates are from its image's origin. An image
        is one moment, so that the first of them is 0.
    """
    digits = rows[:, -NUM_COLUMNS:].long().unflatten(1, (2, 2))
    inside = digits[:, :, 0] * _BASE + digits[:, :, 1]
    return rows[:, :-NUM_COLUMNS], torch.nn.functional.pad(inside, (1, 0))
