"""Methods of two halves by plain loops over the tokens of one image.

N tokens, K or R kept, C clusters, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import dist, exp

from naive_layers import best, clusters
from torch import Tensor
from torch.nn.functional import cosine_similarity

Row = tuple[int, dict[int, float]]
"""A token that is left: in whose place it stands, and the weights of what it is made of."""


def dominant_and_contextual(scores: Sequence[float], keys: Tensor, num_keep: int) -> list[Row]:
    """The best tokens, and behind them the means of the others: .135 of K."""
    num_contextual = round(0.135 * num_keep)
    dominant = sorted(best(scores, num_keep - num_contextual))
    rows: list[Row] = [(i, {i: 1.0}) for i in dominant]
    rest = [i for i in range(len(scores)) if i not in dominant]
    step = max(1, len(rest) // num_contextual) if num_contextual else 1
    targets = rest[::step][:num_contextual]
    joined: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if targets and i not in targets:
            nearest = max(targets, key=lambda t: float(cosine_similarity(keys[i], keys[t], dim=0)))
            joined[nearest].append(i)
    for target, members in joined.items():
        rows.append((target, {target: 1.0} | {i: 1 / len(members) for i in members}))
    return rows


def quotas(sizes: Sequence[int], total: int) -> list[int]:
    """How many tokens each cluster keeps."""
    room = sum(sizes) - len(sizes)
    found = [round(total * (size - 1) / room) if room else 0 for size in sizes]
    small = sorted(range(len(sizes)), key=lambda c: (sizes[c], -c))
    for c in small:
        if sum(found) < total and found[c] < sizes[c] - 1:
            found[c] += 1
    for c in reversed(small):
        if sum(found) > total and found[c] > 0:
            found[c] -= 1
    return found


def shortest_of_clusters(
    points: Tensor, lengths: Sequence[float], num_clusters: int, num_keep: int
) -> list[Row]:
    """Of every cluster of [N, D] the tokens of the least length, and the mean of its others."""
    members = [sorted(own) for _, own in clusters(points, num_clusters)]
    if num_keep < num_clusters:
        small = sorted(range(num_clusters), key=lambda c: (len(members[c]), -c))
        apart = [members[c] for c in small[: num_keep - 1]]
        members = [*apart, sorted(i for c in small[num_keep - 1 :] for i in members[c])]
    shares = quotas([len(own) for own in members], num_keep - len(members))
    single, means = [], []
    for own, share in zip(members, shares, strict=True):
        alone = sorted(own, key=lambda i: lengths[i])[:share]
        left = [i for i in own if i not in alone]
        single += alone
        means.append((left[len(left) // 2], {i: 1 / len(left) for i in left}))
    return [(i, {i: 1.0}) for i in sorted(single)] + means


def transport_costs(
    x: Sequence[Sequence[float]],
    y: Sequence[Sequence[float]],
    at: Sequence[tuple[int, int]],
    grid_hw: tuple[int, int],
    weights: tuple[float, float, float],
    sigma: float,
) -> list[list[float]]:
    """Of carrying states x [N, D] to y [N, D]: appearance, places, and how far from the centre."""
    appearance, relative, centre = weights
    middle = (grid_hw[0] - 1) / 2, (grid_hw[1] - 1) / 2
    squares = [[dist(a, b) ** 2 for b in y] for a in x]
    largest = max(map(max, squares))
    return [
        [
            appearance * squares[i][j] / largest
            + relative * (1 - exp(-(dist(at[i], at[j]) ** 2) / (2 * sigma**2)))
            + centre * dist(at[i], middle)
            for j in range(len(y))
        ]
        for i in range(len(x))
    ]


def mean_costs(costs: Sequence[Sequence[float]], entropy: float) -> list[float]:
    """Three Sinkhorn steps between equal masses, then what each token pays."""
    n = len(costs)
    kernel = [[exp(-c / entropy) for c in row] for row in costs]
    u, v = [1.0] * n, [1.0] * n
    for _ in range(3):
        u = [1 / n / sum(kernel[i][j] * v[j] for j in range(n)) for i in range(n)]
        v = [1 / n / sum(kernel[i][j] * u[i] for i in range(n)) for j in range(n)]
    plan = [[u[i] * kernel[i][j] * v[j] for j in range(n)] for i in range(n)]
    paid = ([p * c for p, c in zip(*rows, strict=True)] for rows in zip(plan, costs, strict=True))
    return [sum(own) / sum(row) for own, row in zip(paid, plan, strict=True)]
