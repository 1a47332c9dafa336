"""Methods inside the language model by plain loops over the tokens of one image.

N tokens, M text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def best(scores: Sequence[float], count: int) -> list[int]:
    """The first of equals counts as the better."""
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:count]


def raters(image: Tensor, text: Tensor) -> list[int]:
    """[N, D], [M, D] embeddings: the words above the mean of the image's softmax over the text."""
    total = [0.0] * len(text)
    for token in image:
        shares = torch.stack([token @ word for word in text]).softmax(dim=0)
        total = [t + float(share) for t, share in zip(total, shares, strict=True)]
    mean = sum(total) / len(total)
    return [i for i, t in enumerate(total) if t > mean] or list(range(len(text)))


def clusters(points: Tensor, count: int) -> list[tuple[int, list[int]]]:
    """DPC-kNN: for every cluster its centre and its members, the clearest peak first."""
    size, width = points.shape
    distance = [[float((a - b).norm()) / width**0.5 for b in points] for a in points]
    density = []
    for row in distance:
        near = sorted(row)[:count]
        density.append(float(torch.tensor(-sum(d * d for d in near) / count).exp()))
    farthest = max(map(max, distance))
    peaks = []
    for i in range(size):
        denser = [distance[i][j] for j in range(size) if (-density[j], j) < (-density[i], i)]
        peaks.append(density[i] * min(denser, default=farthest))
    centres = best(peaks, count)
    members: dict[int, list[int]] = {centre: [centre] for centre in centres}
    for i in range(size):
        if i not in members:
            members[min(centres, key=lambda centre: distance[i][centre])].append(i)
    return [(centre, members[centre]) for centre in centres]


def sparsevlm(scores: Sequence[float], num_kept: int) -> tuple[list[int], list[int], int]:
    """Kept tokens, ascending; recycled ones, the best first; and how many clusters of them."""
    order = best(scores, len(scores))
    dropped = len(scores) - num_kept
    if not dropped:
        return sorted(order), [], 0
    recycled = int(0.3 * dropped) + 1
    return sorted(order[:num_kept]), order[num_kept:][:recycled], recycled // 10 + 1


def without_recycled(total: int, num_tokens: int) -> int:
    """The most tokens to keep as they are of `total` that stay, recycled ones included."""
    for kept in range(total, 1, -1):
        if kept + sparsevlm([0.0] * num_tokens, kept)[2] <= total:
            return kept
    return 1


def dart(
    keys: Tensor, text_keys: Tensor, normed: Tensor, text_normed: Tensor, num_keep: int
) -> list[int]:
    """[N, D], [M, D] keys and normed hidden states: the tokens that stay, ascending."""
    image_pivots = best([float(k.abs().sum()) for k in keys], min(4, num_keep))
    text_pivots = best([float(k.abs().sum()) for k in text_keys], 4)
    pivots = [normed[i] for i in sorted(image_pivots)]
    pivots += [text_normed[i] for i in sorted(text_pivots)]
    kept = set(image_pivots)
    for number, pivot in enumerate(pivots):
        each, more = divmod(num_keep - len(image_pivots), len(pivots))
        left = [i for i in range(len(keys)) if i not in kept]
        cosine = [float(cosine_similarity(pivot, normed[i], dim=0)) for i in left]
        kept |= {left[i] for i in best([-c for c in cosine], each + (number < more))}
    return sorted(kept)
