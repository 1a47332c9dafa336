"""What the OC-pruner is trained to do, apart from the network and from the loop.

An objective names the tokens it reads (`needs`, of the training encoder) and turns one batch into a
loss. `slots` is the paper's: reconstruct the tokens from the slots. `kept`, in
`ocvtp.slots.kept`, restores them from the kept tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ocvtp import learning
from ocvtp.learning import Outcome as Outcome
from ocvtp.ops.similarity import full
from ocvtp.slots.decoder import DecoderConfig, Visible
from ocvtp.slots.network import OCPruner
from ocvtp.structures import VisualTokens

Normalization = Literal["mean1", "sum1", "none"]


def slot_areas(attention: Tensor, valid: Tensor | None = None) -> Tensor:
    """How many tokens each slot wins.

    Args:
        attention: [B, S, N].
        valid: [B, N] bool, False on padding tokens, which no slot wins.

    Returns:
        [B, S] whole numbers, in fp32 at least: bf16 would round those above 256.
    """
    winner = attention.argmax(dim=1)  # [B, N]
    one = torch.ones_like(winner) if valid is None else valid.long()
    areas = torch.zeros(attention.shape[:2], dtype=torch.long, device=attention.device)
    return areas.scatter_add_(1, winner, one).to(full(attention).dtype)


def slot_weights(
    areas: Tensor,
    power: float = 0.5,
    cap: float | None = 10.0,
    normalization: Normalization = "mean1",
    eps: float = 1e-8,
    legacy: bool = False,
) -> Tensor:
    """Weights [B, S] that make small slots count: `(area / N) ** -power`, normalised, capped.

    In fp32 at least, as in fp16 `eps` would be 0, and its power infinite.

    An empty slot has no area to make up for: it weighs 0 and is left out of the mean. With `legacy`
    it gets `eps ** -power` before the mean, as in the official code, and outweighs all others.
    """
    areas = full(areas)
    fraction = areas / areas.sum(dim=1, keepdim=True)
    counted = torch.ones_like(fraction) if legacy else (areas > 0).to(fraction.dtype)
    weights = fraction.clamp(min=eps).pow(-power) * counted
    total = weights.sum(dim=1, keepdim=True)
    if normalization == "mean1":
        weights = weights * counted.sum(dim=1, keepdim=True) / total
    elif normalization == "sum1":
        weights = weights / total
    elif normalization != "none":
        raise ValueError(f"normalization={normalization!r}; pass 'mean1', 'sum1' or 'none'.")
    return weights if cap is None else weights.clamp(max=cap)


def area_weighted_mse(
    prediction: Tensor,
    target: Tensor,
    attention: Tensor,
    *,
    power: float = 0.5,
    cap: float | None = 10.0,
    normalization: Normalization = "mean1",
    channel_reduction: Literal["mean", "sum"] = "mean",
    reduction: Literal["mean", "sum", "none"] = "mean",
    eps: float = 1e-8,
    legacy: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """Area-weighted MSE: every object counts, not every pixel (arXiv 2511.20439).

    `omega_t = sum_k A_kt w_k` with `w` of `slot_weights`; an image's loss is the omega-weighted
    mean of its tokens' squared errors. The attention is detached. All in fp32 at least.

    Args:
        prediction: [B, N, D].
        target: [B, N, D].
        attention: [B, S, N], softmax over slots.
        power: p of the weights. cap: their upper bound, None for none. normalization, eps and
            legacy: see `slot_weights`.
        channel_reduction: over D. reduction: over B.
        valid: [B, N] bool, False on padding tokens, which do not count.

    Returns:
        The loss, a scalar, or [B] for `reduction="none"`.
    """
    prediction, target, attention = (full(x) for x in (prediction, target, attention.detach()))
    areas = slot_areas(attention, valid)
    weights = slot_weights(areas, power, cap, normalization, eps, legacy)
    omega = (attention * weights[:, :, None]).sum(dim=1)  # [B, N]
    if valid is not None:
        omega = omega * valid
    error = (prediction - target).square()
    error = error.mean(dim=2) if channel_reduction == "mean" else error.sum(dim=2)  # [B, N]
    loss = (omega * error).sum(dim=1) / omega.sum(dim=1)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def relative_mse(prediction: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Squared error over the spread of the tokens around their mean, in fp32 at least.

    Args:
        prediction: [B, N, D].
        target: [B, N, D].
        valid: [B, N] bool, False on padding tokens, which do not count.

    Returns:
        [B]
    """
    prediction, target = full(prediction), full(target)
    if valid is None:
        spread = (target - target.mean(dim=1, keepdim=True)).square().mean(dim=(1, 2))
        return (prediction - target).square().mean(dim=(1, 2)) / spread
    counted = valid[:, :, None]
    centre = (target * counted).sum(dim=1, keepdim=True) / counted.sum(dim=1, keepdim=True)
    spread = ((target - centre) * counted).square().sum(dim=(1, 2))
    return ((prediction - target) * counted).square().sum(dim=(1, 2)) / spread


class Objective(learning.Objective[OCPruner]):
    """How one batch of visual tokens becomes a loss of the OC-pruner.

    Parameters that only training needs live in the network's decoder, which `decoder` configures.
    In training mode the network draws new queries and masks; else all is deterministic and the
    decoder sees no token. The budget K is the number of slots, S.
    """

    trains = OCPruner
    decoder: DecoderConfig | None = None
    target_layer: int | None = None
    """Layer of the tower whose tokens are restored; None for the one that the network reads."""


class SlotsObjective(Objective):
    """The paper's objective: reconstruct all tokens from the slots, area-weighted.

    Source: arXiv 2511.20439 and its official code.

    Args:
        decoder: see `DecoderConfig`; None for the paper's.
        power: of the area weights. cap: their upper bound.
        legacy: weigh empty slots as the official code does, see `slot_weights`.
    """

    name = "slots"

    def __init__(
        self,
        decoder: DecoderConfig | None = None,
        power: float = 0.5,
        cap: float | None = 10.0,
        legacy: bool = False,
    ) -> None:
        self.decoder = decoder or DecoderConfig()
        self.power = power
        self.cap = cap
        self.legacy = legacy

    def __call__(
        self,
        network: OCPruner,
        tokens: VisualTokens,
        num_slots: int,
        objects: Tensor | None = None,
    ) -> Outcome:
        del objects
        features = tokens.hidden[network.config.layer]
        slots, attention = network.assign(features, num_slots, valid=tokens.valid)
        visible: Visible = "random" if network.training else "none"
        grids = tokens.grid_hw if tokens.grids is None else tokens.grids
        prediction = network.decode(features, slots, grids, visible, tokens.valid)
        loss = area_weighted_mse(
            prediction,
            features,
            attention,
            power=self.power,
            cap=self.cap,
            legacy=self.legacy,
            valid=tokens.valid,
        )
        with torch.no_grad():
            won = slot_areas(attention, tokens.valid) > 0
            logs = {
                "relative_mse": relative_mse(prediction, features, tokens.valid).mean(),
                "slots_in_use": won.float().mean(),
            }
        return Outcome(loss, slots, attention, logs)
