"""The objective `kept`: choose the tokens from which the others can be restored.

S = K: one slot for each kept token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocvtp.learning import Outcome
from ocvtp.ops.ridge import (
    WeightKind,
    greedy_ridge,
    ridge_error,
    ridge_step,
    straight_through,
    token_weights,
    weight_attention,
)
from ocvtp.slots.config import NetworkSizes
from ocvtp.slots.matching import (
    PairsStep,
    greedy_pairs,
    pairs_step,
    token_shares,
    tokens_of_slots,
)
from ocvtp.slots.network import OCPruner
from ocvtp.slots.objectives import Objective
from ocvtp.slots.statistics import centred
from ocvtp.structures import Needs, VisualTokens


class KeptObjective(Objective):
    """Restore all tokens from the kept ones, by ridge regression in closed form; ours.

    Slots choose tokens one to one, the gradient of the restoring error goes straight through to
    their shares, and there is no decoder. With `teacher`, the slots' shares of the tokens that a
    greedy solver of the same problem picks are raised too: `L = ridge L_ridge + teacher L_CE`,
    `L_CE = -mean log w` at the solver's tokens, matched to slots greedily.

    The network needs `choice: one_to_one` or `restore` and `truncation: none`; `standardize: true`
    and `frozen_queries: true` belong to the recipe. In training the choice is `one_to_one` either
    way; `restore` is how the pruner then chooses.

    Args:
        target_layer: the tower's layer whose tokens are restored: the one that the host reads.
        weights: of the tokens to restore: attention of the `cls` token, `received` attention (where
            a tower has no CLS), or `none` (where the encoder supplies no attention). They are read
            in training only.
        weight_block: block of the tower whose attention that is; the last one.
        weight_power: the weights are attention ** (weight_power / K).
        objects: whether they are also multiplied by how much of a token's patch the masks of
            annotated objects cover, in training only, so that the network learns to tell objects
            from what only looks like them; the training images must have masks.
        object_floor: added to the covered share, so that the rest counts a little.
        penalty: of the ridge, a share of the mean squared length of the tokens.
        ridge: weight of the restoring error.
        teacher: weight of the greedy solver's tokens; 0 leaves it out.

    Raises:
        ValueError: for settings out of range.
    """

    name = "kept"

    def __init__(
        self,
        target_layer: int = -2,
        weights: WeightKind = "cls",
        weight_block: int = -1,
        weight_power: float = 4.0,
        objects: bool = False,
        object_floor: float = 0.01,
        penalty: float = 0.3,
        ridge: float = 1.0,
        teacher: float = 0.1,
    ) -> None:
        weight_attention(weights, weight_block)
        if not object_floor > 0:
            raise ValueError(f"object_floor={object_floor}; pass a number above 0.")
        if not penalty > 0 or not weight_power >= 0:
            raise ValueError(
                f"penalty={penalty}, weight_power={weight_power}; pass a penalty above 0 and a"
                " power of at least 0."
            )
        if min(ridge, teacher) < 0 or not ridge + teacher > 0:
            raise ValueError(
                f"ridge={ridge}, teacher={teacher}; pass weights of at least 0, one of them above."
            )
        self.target_layer: int = target_layer
        self.weight_block, self.weight_power = weight_block, weight_power
        self.weights: WeightKind = weights
        self.reads_objects, self.object_floor = objects, object_floor
        self.penalty = penalty
        self.ridge, self.teacher = ridge, teacher
        self._ridge_step: Callable[..., Tensor] | None = None
        self._pairs_step: PairsStep = pairs_step

    def compile_steps(self, backend: str) -> None:
        """Compile a step of each of the loops over K in which tokens are taken one by one.

        As in the network, a graph of one budget is followed by one that serves all others.
        """
        self._ridge_step = torch.compile(ridge_step, backend=backend)
        self._pairs_step = torch.compile(pairs_step, backend=backend)

    def check(self, sizes: NetworkSizes) -> None:
        if sizes.choice == "winners":
            raise ValueError(
                "the objective `kept` trains slots that never share a token, the network's choice"
                " is 'winners'; set network.choice to one_to_one or restore."
            )
        if sizes.truncation != "none" or sizes.num_iterations < 2:
            raise ValueError(
                f"with truncation {sizes.truncation!r} and {sizes.num_iterations} iterations no"
                " gradient of the objective `kept`, which reads the last iteration's attention,"
                " reaches the slots' update; set network.truncation to none and"
                " network.num_iterations to at least 2."
            )

    def needs(self, layer: int) -> Needs:
        """Two layers, and the attention that the weights are made of."""
        attention = weight_attention(self.weights, self.weight_block)
        return Needs(hidden=tuple({layer: 0, self.target_layer: 0}), attention=attention)

    def __call__(
        self,
        network: OCPruner,
        tokens: VisualTokens,
        num_slots: int,
        objects: Tensor | None = None,
    ) -> Outcome:
        """See `Objective.__call__`.

        Raises:
            ValueError: without `objects` where the weights read them.
        """
        features = tokens.hidden[network.config.layer]
        slots, attention = network.assign(features, num_slots, valid=tokens.valid)
        with torch.autocast(features.device.type, enabled=False):
            weights = self._weights(tokens, num_slots, objects)
            loss, logs = self._loss(network, tokens, attention, weights)
        return Outcome(loss, slots, attention, logs)

    def _weights(self, tokens: VisualTokens, num_slots: int, objects: Tensor | None) -> Tensor:
        """[B, N], 0 on padding; sums to 1."""
        weights = token_weights(
            tokens, self.weights, self.weight_block, num_slots, self.weight_power
        )
        if not self.reads_objects:
            return weights
        if objects is None:
            raise ValueError(
                "objects=True reads the masks of annotated objects, and the batch has none; train"
                " on images with masks, or set objects to false."
            )
        weights = weights * (objects + self.object_floor)
        total = weights.sum(dim=1, keepdim=True)
        return weights / total.clamp(min=torch.finfo(weights.dtype).tiny)

    def _loss(
        self, network: OCPruner, tokens: VisualTokens, attention: Tensor, weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the slots' attention [B, S, N], and its parts."""
        assert network.targets is not None
        num_slots, valid = attention.shape[1], tokens.valid
        targets = centred(network.targets(tokens.hidden[self.target_layer].float()), valid)
        if (absent := num_slots - tokens.num_tokens) > 0:  # slots without a token take padding
            attention, weights = pad(attention, (0, absent)), pad(weights, (0, absent))
            targets, valid = pad(targets, (0, 0, 0, absent)), pad(tokens.real, (0, absent))
        shares = token_shares(attention)
        chosen = tokens_of_slots(attention, valid, self._pairs_step)
        kept = straight_through(shares, targets, chosen)
        error = ridge_error(targets, kept, weights, self.penalty).mean()
        loss, logs = self.ridge * error, {"ridge_error": error.detach()}
        if self.teacher:
            found = (targets, weights, num_slots, self.penalty, valid)
            picks = greedy_ridge(*found, self._ridge_step)
            missed = cross_entropy(shares, picks, valid, self._pairs_step).mean()
            loss = loss + self.teacher * missed
            logs["teacher"] = missed.detach()
        return loss, logs


def cross_entropy(
    shares: Tensor, picks: Tensor, valid: Tensor | None = None, step: PairsStep = pairs_step
) -> Tensor:
    """`-mean_j log w[slot(j), picks(j)]`, slots matched to picks greedily, one to one.

    Args:
        shares: w [B, S, N], see `ocvtp.slots.matching.token_shares`.
        picks: [B, S] token numbers.
        valid: [B, N] bool; picks of padding tokens do not count.
        step: of `greedy_pairs`.

    Returns:
        [B]
    """
    index = picks[:, None].expand(-1, shares.shape[1], -1)
    likely = shares.gather(2, index).clamp(min=torch.finfo(shares.dtype).tiny).log()  # [B, S, S]
    if valid is None:
        real = torch.ones_like(picks, dtype=torch.bool)
    else:
        real = valid.gather(1, picks)
    wanted = likely.masked_fill(~real[:, None], -1e30)
    slots, columns = greedy_pairs(wanted, picks.shape[1], step)
    matched = likely.gather(1, slots[:, :, None].expand_as(likely))
    matched = matched.gather(2, columns[:, :, None]).squeeze(2)  # [B, S]
    counted = real.gather(1, columns)
    return -(matched * counted).sum(dim=1) / counted.sum(dim=1)
