"""How a trained OC-pruner chooses tokens by its slots; M are the candidates."""

from __future__ import annotations

from torch import Tensor

from ocvtp.ops.ridge import greedy_ridge
from ocvtp.slots.matching import token_shares
from ocvtp.slots.statistics import centred
from ocvtp.structures import take

CANDIDATES = 3
"""`restore` looks at this many tokens for each one that it keeps."""
PENALTY = 0.3
"""The ridge penalty of `restore`, as in the recipe of the objective `kept`."""


def restore(attention: Tensor, targets: Tensor, num: int, valid: Tensor | None = None) -> Tensor:
    """Take the tokens from which those that slots attend to can be restored; ours.

    A token weighs as much as its largest share in a slot, `omega_n = max_s w[s, n]`. Among the
    `3 num` tokens that weigh most, the greedy solver of the ridge (`greedy_ridge`) takes those that
    restore these candidates best. The slots learnt what matters; the solver prevents two
    slots on one object from keeping it twice. It costs (M / N)^2 of the solver on all tokens.

    Args:
        attention: [B, S, N], a softmax over slots, 0 on padding tokens.
        targets: [B, N, D], the tokens to restore.
        num: K, at most N; it need not be S.
        valid: [B, N] bool, False on padding tokens, which are taken when no others are left.

    Returns:
        [B, num] tokens in the order of taking, unique.
    """
    weights = token_shares(attention.detach()).amax(dim=1)
    if valid is not None:
        weights = weights.masked_fill(~valid, -1.0)
    weights, candidates = weights.topk(min(CANDIDATES * num, weights.shape[1]), dim=1)
    weights = weights.clamp(min=0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    own = None if valid is None else valid.gather(1, candidates)
    held = take(centred(targets, valid), candidates)  # [B, M, D]
    picks = greedy_ridge(held, weights.to(held.dtype), num, PENALTY, own)
    return candidates.gather(1, picks)
