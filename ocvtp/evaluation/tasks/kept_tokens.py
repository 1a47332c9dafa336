"""Which places of images are kept, and how well what is kept stands for the rest.

A visual token is one cell of the grid; M of an image's tokens are left by the tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ocvtp.evaluation.tasks.object_cells import Sight, sight_of_host
from ocvtp.hosts.base import Host
from ocvtp.hosts.prompt.shorten import Prompt
from ocvtp.ops.ridge import ridge_error
from ocvtp.ops.similarity import full, unit
from ocvtp.ops.token_views import left_over
from ocvtp.slots.statistics import standardized
from ocvtp.structures import Needs, Selection, VisualTokens, take

PENALTY = 0.3
"""Of the ridge, a share of the mean squared length of the tokens."""


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """What was kept of a batch of images, each one grid of N tokens.

    Args:
        grid: its rows and columns.
        kept: [B, N] bool, the places with a kept token.
        features: [B, N, D] of all tokens.
        picture: H, W of the first image as the tower saw it.
        sight: how the tower sees images.
    """

    grid: tuple[int, int]
    kept: Tensor
    features: Tensor
    picture: tuple[int, ...]
    sight: Sight


def kept_of_prompt(host: Host, prompt: Prompt, num_items: int, processor: Any) -> KeptTokens:
    """What a prompt kept.

    Args:
        host: of the model. prompt: with one image a row, read by the model.
        num_items: rows that there should be.
        processor: of images, that made the model's inputs.

    Raises:
        ValueError: see `grid_of` and `kept_cells`.
    """
    grid = grid_of(host, prompt, num_items)
    return KeptTokens(
        grid,
        kept_cells(host, prompt),
        all_features(host, prompt, grid),
        tuple(host.picture(prompt.images).shape[-2:]),
        sight_of_host(host, processor),
    )


def kept_of_tower(
    tokens: VisualTokens, selection: Selection, picture: tuple[int, ...], sight: Sight
) -> KeptTokens:
    """What was selected of the tokens of a tower alone; arguments as those of `KeptTokens`."""
    images = torch.arange(tokens.batch_size)
    kept = _marked(tokens.real, images, selection.keep_indices, selection.valid)
    return KeptTokens(tokens.grid_hw, kept, tokens.features, picture, sight)


def grid_of(host: Host, prompt: Prompt, num_items: int) -> tuple[int, int]:
    """Rows and columns of the one grid that each image of the call is."""
    kind, shown = host.model.config.model_type, prompt.encoded.tokens.batch_size
    grids = host.grids(prompt.encoded)
    if len(grids) != 1:
        raise ValueError(
            f"this {kind!r} cuts images into tiles; coverage is measured where an image is one grid"
            " of tokens: pass a model that does not (LLaVA-1.5, Qwen-VL), or a processor that makes"
            " one view."
        )
    num_rows = len(prompt.input_ids)
    if not shown == num_items == num_rows:
        raise ValueError(
            f"{num_items} items, but the call has {shown} images or tiles in {num_rows} rows; pass"
            " one image a row, and its item."
        )
    return grids[0]


def kept_cells(host: Host, prompt: Prompt) -> Tensor:
    """Which cells of each image's grid kept a token.

    Returns:
        [B, N] bool.

    Raises:
        ValueError: if the call's images differ in their grids, or if the language model has not
            read the prompt yet.
    """
    encoded, selection = prompt.encoded, prompt.selection
    real = encoded.tokens.real  # [B, M], M tokens that the tower left
    num_cells = encoded.tokens.grid_hw[0] * encoded.tokens.grid_hw[1]
    first = host.num_registers
    if len(encoded.embeddings) != len(real) * (first + num_cells):
        raise ValueError(
            "the images of this call have grids of different shapes, or rows between their tokens;"
            " pass one image at a time (batch size 1), and separators='none' where there are any."
        )
    tokens = host.tokens_of_rows(encoded).to(real.device).view(len(real), -1)[:, first:]
    if prompt.layers is None or not prompt.layers.layers:
        chosen, valid = selection.keep_indices, selection.valid
        kept = _marked(real, torch.arange(len(real)), chosen, valid)
    else:
        kept = torch.zeros_like(real)
        last = [s for s in prompt.layers.kept if s.layer == prompt.layers.layers[-1]]
        for stayed in last:
            kept |= _marked(real, stayed.images, stayed.places, stayed.valid)
        if sorted(i for stayed in last for i in stayed.images.tolist()) != [*range(len(real))]:
            raise ValueError(
                f"{prompt.layers.pruner.name} drops tokens inside the language model, which has not"
                " read this prompt yet, or more than once; look at the prompt after one call."
            )
    return kept.gather(1, tokens.clamp(min=0)) & (tokens >= 0)


def all_features(host: Host, prompt: Prompt, grid: tuple[int, int]) -> Tensor:
    """[B, N, D] features of all tokens; encoded again where the tower dropped some."""
    tokens = prompt.encoded.tokens
    if prompt.encoded.num_given is not None:
        plain = type(host)(host.model, host.tiling)  # without what acts inside the tower
        hooks = plain.install(Needs())
        try:
            tokens = plain.encode(prompt.images, Needs()).tokens
        finally:
            for hook in hooks:
                hook.remove()
    assert tokens.valid is None
    assert tokens.num_tokens == grid[0] * grid[1], (tokens.num_tokens, grid)
    return tokens.features


def nearest_kept(features: Tensor, kept: Tensor) -> Tensor:
    """`1/N sum_n max_{k kept} cos(x_n, x_k)`.

    Args:
        features: X [B, N, D]. kept: [B, N] bool, at least one an image.

    Returns:
        [B] in -1..1; 1 where all are kept.
    """
    index, valid = left_over(kept)
    directions = unit(features)
    cosine = directions @ take(directions, index).mT  # [B, N, K]
    if valid is not None:
        cosine = cosine.masked_fill(~valid[:, None], float("-inf"))
    return cosine.amax(dim=2).mean(dim=1)


def unrestored(features: Tensor, kept: Tensor) -> Tensor:
    """`sum_n |y_n - [Y Z^T (Z Z^T + 0.3 e I)^-1 Z]_n|^2 / sum_n |y_n|^2`, `e = mean_n |y_n|^2`.

    Y are the tokens at mean 0 and deviation 1 of each feature over their image, Z the kept ones.

    Args:
        features: [B, N, D]. kept: [B, N] bool, at least one an image.

    Returns:
        [B] in 0..1; above 0 also where all are kept, for the penalty.
    """
    index, valid = left_over(kept)
    targets = standardized(full(features))
    chosen = take(targets, index)  # Z
    if valid is not None:
        chosen = chosen.masked_fill(~valid[:, :, None], 0.0)
    weights = targets.new_full(targets.shape[:2], 1 / targets.shape[1])
    return ridge_error(targets, chosen, weights, PENALTY)


def _marked(like: Tensor, images: Tensor, tokens: Tensor, valid: Tensor | None) -> Tensor:
    """[B, M] bool as `like`: True at tokens [I, K] of images [I]; negative tokens are none."""
    counts = tokens >= 0 if valid is None else valid & (tokens >= 0)
    places = tokens.masked_fill(~counts, like.shape[1]).to(like.device)
    marked = like.new_zeros(like.shape[0], like.shape[1] + 1)
    marked[images.to(like.device)[:, None], places] = True
    return marked[:, :-1]
