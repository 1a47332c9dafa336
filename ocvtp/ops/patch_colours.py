"""How alike patches of an image are in colour, and in which order they can be dropped.

N are its patches, M those of one level, in G groups of S = s x s neighbours; a patch has P values
in each colour.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ocvtp.structures import take


def histograms(pixels: Tensor, bins: int) -> Tensor:
    """Counts of the values of every patch in each colour.

    Args:
        pixels: [B, N, 3 P], 0 to 255, colour after colour.
        bins: of equal width.

    Returns:
        [B, N, 3 bins], fp32.
    """
    colours = pixels.float().unflatten(2, (3, -1))  # [B, N, 3, P]
    index = (colours * (bins / 256)).floor().clamp(0, bins - 1).long()
    index = index.clamp_(min=0)  # what is no number counts as 0, and not outside
    counts = colours.new_zeros(*colours.shape[:3], bins)
    found: Tensor = counts.scatter_add(3, index, torch.ones_like(colours)).flatten(2)
    return found


def chi_square(histograms: Tensor) -> Tensor:
    """1/2 sum (a - b)^2 / (a + b) of all pairs of histograms [..., S, C]: [..., S, S]."""
    a, b = histograms[..., :, None, :], histograms[..., None, :, :]
    distance: Tensor = 0.5 * ((a - b).square() / (a + b).clamp(min=1)).sum(dim=-1)
    return distance


def cosine(vectors: Tensor) -> Tensor:
    """Of all pairs of vectors [..., S, D]: [..., S, S]; 1 where both are black."""
    vectors = vectors.float()
    norms = vectors.norm(dim=-1, keepdim=True)
    lengths = norms * norms.transpose(-1, -2)
    black = norms == 0
    both = black & black.transpose(-1, -2)
    found = vectors @ vectors.transpose(-1, -2) / lengths.clamp(min=1e-12)
    return torch.where(both, 1.0, found)


def groups(grid_hw: tuple[int, int], side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Squares of neighbours on a grid, in raster order, cut off at its lower and right edge.

    Args:
        grid_hw: H and W.
        side: s.
        device: of the result.

    Returns:
        [G, S] numbers of patches, in raster order, and which of them are on the grid, [G, S] bool.
    """
    height, width = grid_hw
    rows = torch.arange(-(-height // side) * side, device=device).view(-1, 1, side, 1)
    columns = torch.arange(-(-width // side) * side, device=device).view(1, -1, 1, side)
    numbers = (rows * width + columns).flatten(2).flatten(0, 1)
    inside = ((rows < height) & (columns < width)).flatten(2).flatten(0, 1)
    return numbers.masked_fill(~inside, 0), inside


def redundant(
    pixels: Tensor, colours: Tensor, there: Tensor, limits: tuple[float, float]
) -> Tensor:
    """Patches of a group that are like one before them that is not redundant itself.

    Args:
        pixels: [B, G, S, D] values of the patches. colours: [B, G, S, C] their histograms.
        there: [B, G, S] bool, which of them are patches.
        limits: the largest chi-square distance and the smallest cosine of patches that are alike.

    Returns:
        [B, G, S] bool.
    """
    alike = (chi_square(colours) <= limits[0]) & (cosine(pixels) >= limits[1])
    alike &= there[..., None, :]
    found = [torch.zeros_like(alike[..., 0, 0])]  # the first of a group stays
    for number in range(1, alike.shape[-1]):
        kept = ~torch.stack(found, dim=-1)
        found.append((alike[..., number, :number] & kept).any(dim=-1))
    return torch.stack(found, dim=-1)


def sparing_order(
    colours: Tensor, grid_hw: tuple[int, int], side: int, real: Tensor | None
) -> Tensor:
    """When each patch is dropped if one after the other is: the later, the longer it stays.

    In groups of s x s neighbours the pair of the smallest chi-square distance goes first, and of it
    the later patch, until every group has one left. Then these are a grid of their own,
    and so on to the last patch.

    Args:
        colours: [B, N, C] histograms.
        grid_hw: H and W.
        side: s, at least 2.
        real: [B, N] bool, False on padding, which is dropped before anything else.

    Returns:
        [B, N] ranks from 0 on, fp32.
    """
    number = torch.arange(colours.shape[1], device=colours.device).expand(colours.shape[:2])
    alive = torch.ones_like(number, dtype=torch.bool) if real is None else real
    cost = colours.new_full(number.shape, float("inf"))
    level = torch.where(alive, 0, -1)
    height, width = grid_hw
    depth = 0
    while height * width > 1:
        numbers, inside = groups((height, width), side, colours.device)
        members = number[:, numbers.flatten()]  # [B, G S]
        there = alive[:, numbers.flatten()] & inside.flatten()
        seen = take(colours, members).unflatten(1, numbers.shape)
        when, left = _thin(chi_square(seen), there.unflatten(1, numbers.shape))
        # Slots beyond the grid repeat patch 0: what they say goes to a spare column.
        target = torch.where(there, members, colours.shape[1])
        cost = _put(cost, target, when.flatten(1))
        level = _put(level, target, torch.full_like(members, depth))
        first = left.long().argmax(dim=2, keepdim=True)
        number = members.unflatten(1, numbers.shape).gather(2, first).squeeze(2)
        alive = left.any(dim=2)
        height, width = -(-height // side), -(-width // side)
        depth += 1
    by_cost = cost.sort(dim=1, stable=True).indices
    order = by_cost.gather(1, level.gather(1, by_cost).sort(dim=1, stable=True).indices)
    ranks = torch.arange(order.shape[1], dtype=torch.float32, device=order.device)
    return torch.empty_like(cost).scatter(1, order, ranks.expand_as(cost))


def _thin(distance: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the later patch of the closest pair, until a group has one: costs, and what is left.

    Args:
        distance: [B, G, S, S].
        alive: [B, G, S] bool.
    """
    size = distance.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=distance.device).tril(-1)
    distance = distance.masked_fill(~later, float("inf"))
    cost = distance.new_full(alive.shape, float("inf"))
    slots = torch.arange(size, device=distance.device)
    for _ in range(size - 1):
        pairs = alive[..., :, None] & alive[..., None, :]
        best, pair = distance.masked_fill(~pairs, float("inf")).flatten(2).min(dim=2)  # [B, G]
        dropped = (slots == (pair // size)[..., None]) & best.isfinite()[..., None]
        cost = torch.where(dropped, best[..., None], cost)
        alive = alive & ~dropped
    return cost, alive


def _put(values: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """[B, N] with `new` [B, M] at `index`; what goes to number N is left out."""
    wide = torch.nn.functional.pad(values, (0, 1))
    return wide.scatter(1, index, new.to(values.dtype))[:, :-1]
