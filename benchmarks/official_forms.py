"""Greedy methods as their official code computes them: all pairs as one product, then K steps.

Written from the papers and the public code, and cut down to what costs time: no padding, no guards,
no choice of options. Where there is no public code, the paper's algorithm in the same form. They
keep what the pruners keep, and show what these cost beside them (`benchmarks.select`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ocvtp.ops.ridge import token_weights
from ocvtp.slots.statistics import standardized
from ocvtp.structures import VisualTokens


def _cosines(x: Tensor) -> Tensor:
    x = x / x.norm(dim=-1, keepdim=True)
    return x @ x.mT


def _projected(tokens: VisualTokens) -> Tensor:
    assert tokens.projected is not None
    return tokens.projected


def divprune(tokens: VisualTokens, num_keep: int) -> Tensor:
    """Of one image after the other, as the official code; each step reads the rows of all picks."""
    chosen = []
    for image in _projected(tokens):
        distance = 1 - _cosines(image)
        picks = distance.topk(2, dim=0, largest=False).values[1].argmax()[None]
        for _ in range(num_keep - 1):
            nearest = distance.index_select(0, picks).amin(dim=0)
            picks = torch.cat([picks, nearest.argmax()[None]])
        chosen.append(picks)
    return torch.stack(chosen)


def cdpruner(tokens: VisualTokens, num_keep: int) -> Tensor:
    """The kernel of all pairs under the relevance, and Cholesky rows."""
    assert tokens.clip_visual is not None
    assert tokens.clip_text is not None
    cosine = _cosines(_projected(tokens))
    visual = tokens.clip_visual / tokens.clip_visual.norm(dim=-1, keepdim=True)
    text = tokens.clip_text / tokens.clip_text.norm(dim=-1, keepdim=True)
    related = -(visual @ text.mT).mean(dim=2)
    low, high = related.amin(dim=1, keepdim=True), related.amax(dim=1, keepdim=True)
    related = (related - low + 1e-6) / (high - low)
    kernel = related[:, :, None] * cosine * related[:, None]
    images = torch.arange(len(kernel))
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    basis = kernel.new_zeros(num_keep, len(kernel), kernel.shape[1])
    picks = []
    for step in range(num_keep):
        pick = gain.argmax(dim=1)
        explained = torch.einsum("tb,tbn->bn", basis[:step, images, pick], basis[:step])
        basis[step] = (kernel[images, pick] - explained) / gain[images, pick].sqrt()[:, None]
        gain -= basis[step].square()
        gain[images, pick] = float("-inf")
        picks.append(pick)
    return torch.stack(picks, dim=1)


def scope(tokens: VisualTokens, num_keep: int) -> Tensor:
    """Each step compares all pairs with what is covered."""
    cosine, images = _cosines(tokens.features), torch.arange(tokens.batch_size)
    saliency = tokens.attention[-2, "cls"]
    covered = torch.zeros_like(saliency)
    taken = torch.zeros_like(saliency, dtype=torch.bool)
    picks = []
    for _ in range(num_keep):
        gain = (cosine - covered[:, None]).clamp(min=0).sum(dim=2) * saliency
        pick = gain.masked_fill(taken, float("-inf")).argmax(dim=1)
        taken[images, pick] = True
        covered = torch.maximum(covered, cosine[images, pick])
        picks.append(pick)
    return torch.stack(picks, dim=1)


def _spread(
    cosine: Tensor, chosen: Tensor, num: int, candidates: Tensor | None, total: bool
) -> Tensor:
    """From chosen tokens on the one of the least cosine, largest or in total, to those before."""
    images = torch.arange(len(cosine))
    rows = cosine[images[:, None], chosen]
    alike = rows.sum(dim=1) if total else rows.amax(dim=1)
    if candidates is not None:
        alike = alike.masked_fill(~candidates, float("inf"))
    alike = alike.scatter(1, chosen, float("inf"))
    for _ in range(num - chosen.shape[1]):
        pick = alike.argmin(dim=1)
        row = cosine[images, pick]
        alike = alike + row if total else torch.maximum(alike, row)
        alike[images, pick] = float("inf")
        chosen = torch.cat([chosen, pick[:, None]], dim=1)
    return chosen


def zspaprune(tokens: VisualTokens, num_keep: int) -> Tensor:
    """A core by the prompt, then max-min distances."""
    assert tokens.text is not None
    visual, words = _projected(tokens), tokens.text.mean(dim=1)
    close = torch.cosine_similarity(visual, words[:, None], dim=2)
    core = close.topk(max(1, int(0.6 * num_keep)), dim=1).indices
    return _spread(_cosines(visual), core, num_keep, None, total=False)


def todre(tokens: VisualTokens, num_keep: int) -> Tensor:
    """From the CLS token's own on, the least cosines in total."""
    first = tokens.attention[-1, "cls"].argmax(dim=1, keepdim=True)
    return _spread(_cosines(_projected(tokens)), first, num_keep, None, total=True)


def trimtokenator(tokens: VisualTokens, num_keep: int) -> Tensor:
    """The same among four fifths of the tokens, which lie next to the prompt."""
    assert tokens.text is not None
    visual = _projected(tokens)
    distance = torch.cdist(visual, tokens.text).square().mean(dim=2)
    stay = distance.topk(max(num_keep, int(0.8 * tokens.num_tokens)), dim=1, largest=False).indices
    candidates = torch.zeros_like(distance, dtype=torch.bool).scatter(1, stay, True)
    cosine = _cosines(visual)
    alike = (cosine * candidates[:, None]).sum(dim=2).masked_fill(~candidates, float("inf"))
    return _spread(cosine, alike.argmin(dim=1)[:, None], num_keep, candidates, total=True)


def greedyprune(tokens: VisualTokens, num_keep: int) -> Tensor:
    """In the order of saliency, what repeats a kept token after all others."""
    assert tokens.text is not None
    visual, images = _projected(tokens), torch.arange(tokens.batch_size)
    saliency = torch.cosine_similarity(visual, tokens.text[:, -1:], dim=2)
    cosine = _cosines(visual)
    picks = []
    for _ in range(num_keep):
        pick = saliency.argmax(dim=1)
        saliency = torch.where(cosine[images, pick] > 0.9, saliency.clamp(max=1) - 10, saliency)
        saliency[images, pick] = float("-inf")
        picks.append(pick)
    return torch.stack(picks, dim=1)


def ridge(tokens: VisualTokens, num_keep: int) -> Tensor:
    """Each step deflates the matrix of all pairs, and reads all of it again."""
    weights = token_weights(tokens, "cls", -1, num_keep, 4.0)
    targets, images = standardized(tokens.features, None), torch.arange(tokens.batch_size)
    weights = weights.to(targets)
    gram = targets @ targets.mT
    floor = 0.3 * (weights * targets.square().sum(dim=2)).sum(dim=1, keepdim=True)
    taken = torch.zeros_like(weights, dtype=torch.bool)
    picks = []
    for _ in range(num_keep):
        energy = gram.diagonal(dim1=1, dim2=2)
        gain = (gram.square() @ weights[:, :, None]).squeeze(2) / (energy + floor)
        pick = gain.masked_fill(taken, float("-inf")).argmax(dim=1)
        taken[images, pick] = True
        column, length = gram[images, pick], energy[images, pick][:, None]
        shrink = (length + 2 * floor) / (length + floor).square()
        gram = gram - shrink[:, :, None] * column[:, :, None] * column[:, None]
        picks.append(pick)
    return torch.stack(picks, dim=1)


FORMS: dict[str, Callable[[VisualTokens, int], Tensor]] = {
    form.__name__: form
    for form in (
        divprune, cdpruner, scope, zspaprune, todre, trimtokenator, greedyprune, ridge,
    )
}  # fmt: skip
