"""ToMe's matching in plain loops, from the paper."""

from __future__ import annotations

from torch import Tensor


def naive_rows(metric: Tensor, r: int, has_cls: bool) -> list[list[int]]:
    """The rows of one image's tokens [T, d] behind a merge, as lists of tokens."""
    unit = metric / metric.norm(dim=1, keepdim=True)
    even, odd = list(range(0, len(unit), 2)), list(range(1, len(unit), 2))
    similarity = (unit[even] @ unit[odd].T).tolist()
    best = {}
    for a, scores in zip(even, similarity, strict=True):
        highest = max(range(len(odd)), key=lambda i: scores[i])  # noqa: B023
        best[a] = (scores[highest], odd[highest])
    free = [a for a in even if not (has_cls and a == 0)]
    chosen = sorted(free, key=lambda a: -best[a][0])[:r]
    left = sorted((a for a in even if a not in chosen), key=lambda a: -best[a][0])
    rows = [[a] for a in (sorted(left) if has_cls else left)] + [[b] for b in odd]
    for a in chosen:
        next(row for row in rows if row[0] == best[a][1]).append(a)
    return rows
