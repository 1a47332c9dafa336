"""Training steps to hold losses to, drawn or written by hand."""

from __future__ import annotations

from dataclasses import replace

import torch

from ocvtp.selectors.losses import Step
from ocvtp.selectors.relaxations import build_relaxation
from ocvtp.structures import VisualTokens

COUNTS = (6, 4, 1)
NUM_KEEP = 3
WORDS = 11


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(counts=COUNTS, *, num_keep=NUM_KEEP, relaxation="soft_topk", filling=7.0, **changes):
    """Rows of different lengths, two answer tokens each, with all that any loss reads."""
    rows, most = len(counts), max(counts)
    real = torch.arange(most) < torch.tensor(counts)[:, None]

    def noise(seed, *shape):
        return torch.randn(*shape, generator=seeded(seed))

    def padded(seed, *width):
        own = [noise(seed + 100 * b, most, *width) for b in range(rows)]
        return torch.stack(own).masked_fill(~real.view(*real.shape, *[1] * len(width)), filling)

    tokens = VisualTokens(
        features=padded(1, 5),
        grid_hw=(1, most),
        valid=None if min(counts) == most else real,
        projected=padded(2, 4),
        attention={(-1, "cls"): padded(3).sigmoid()},
    )
    scores = changes.pop("scores", padded(4)).requires_grad_()
    gates = None
    if relaxation is not None:
        gates = build_relaxation(relaxation)(scores, num_keep, real, 0.5, seeded(5))
    rewards = torch.arange(rows).float()
    step = Step(
        tokens=tokens,
        num_keep=num_keep,
        share=0.5,
        scores=scores,
        gates=gates,
        full_logits=noise(6, 2 * rows, WORDS),
        pruned_logits=noise(7, 2 * rows, WORDS).requires_grad_(),
        column_logits=noise(12, 2 * rows, WORDS).requires_grad_(),
        owner=torch.arange(rows).repeat_interleave(2),
        targets=torch.arange(2 * rows) % WORDS,
        full_states=noise(8, 2 * rows, 4),
        pruned_states=noise(9, 2 * rows, 4).requires_grad_(),
        teacher={0: padded(10).sigmoid() * real},
        objects=padded(11).sigmoid() * real,
        has_objects=torch.ones(rows, dtype=torch.bool),
        reward=rewards,
        groups=torch.zeros(rows, dtype=torch.long),
    )
    return replace(step, **changes)


def written(scores, **changes):
    """One image of the scores [N], and what else a test writes."""
    scores = torch.tensor([scores], dtype=torch.float32).requires_grad_()
    tokens = VisualTokens(features=torch.zeros(1, scores.shape[1], 2), grid_hw=(1, scores.shape[1]))
    return Step(tokens=tokens, num_keep=2, share=0.0, scores=scores, **changes)
