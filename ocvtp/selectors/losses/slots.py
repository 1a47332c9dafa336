"""The loss of the OC-pruner's paper: restore all tokens from the slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ocvtp.field_types import read_fields
from ocvtp.ops.similarity import full
from ocvtp.selectors.losses.base import Loss, LossValue, Step, register_loss
from ocvtp.selectors.parts import flag
from ocvtp.selectors.schedules import ScheduleValue, number
from ocvtp.selectors.scorer import Scorer, Widths
from ocvtp.selectors.scorers.slots import Slots
from ocvtp.slots.decoder import Decoder, DecoderConfig, Visible, build_decoder
from ocvtp.slots.objectives import area_weighted_mse


@register_loss("slots")
class FromSlots(Loss, nn.Module):
    """Decode all of the tower's tokens from the slots; their error, weighed by areas of slots.

    Source: https://arxiv.org/abs/2511.20439 and its official code, as
    `ocvtp.slots.objectives.SlotsObjective` trains the OC-pruner alone. The scorer is `slots`. The
    decoder learns beside it and is in no artifact. It is computed in fp32.

    Args:
        weight: see `Loss`.
        decoder: fields of `ocvtp.slots.decoder.DecoderConfig`; None for the paper's.
        power: of the area weights.
        cap: their upper bound, None for none.
        legacy: weigh empty slots as the official code does.
    """

    reads = frozenset({"tower"})

    def __init__(
        self,
        weight: ScheduleValue = 1.0,
        decoder: Mapping[str, Any] | None = None,
        power: float = 0.5,
        cap: float | None = 10.0,
        legacy: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        super().__init__(weight)
        if not isinstance(decoder, Mapping | None):
            raise ValueError(f"decoder={decoder!r}; pass a mapping, e.g. {{kind: mlp}}.")
        self.decoder = dict(decoder or {})
        self._config = read_fields(DecoderConfig, self.decoder)
        self.power = number(power, "power", least=0)
        self.cap = None if cap is None else number(cap, "cap", above=0)
        self.legacy = flag(legacy, "legacy")
        self.layer = 0
        self.decode: Decoder | None = None

    def build(self, scorer: Scorer, widths: Widths, grid_hw: tuple[int, int]) -> None:
        if not isinstance(scorer, Slots):
            raise ValueError(
                f"the loss {self.name!r} restores tokens from slots, and the scorer"
                f" {scorer.name!r} has none; pass ocvtp.selectors.scorers.slots.Slots, or leave the"
                " loss out."
            )
        self.layer = scorer.layer
        self.decode = build_decoder(self._config, widths.tower, scorer.slot_dim, grid_hw)

    def _values(self, step: Step) -> LossValue:
        assert self.decode is not None, "see build"
        tokens = step.tokens
        height, width = tokens.grid_hw
        if tokens.grids is not None or height * width != tokens.num_tokens:
            raise ValueError(
                f"the loss {self.name!r} restores tokens of one grid, and images are several views"
                " here; train in a model of one grid, or leave the loss out."
            )
        features = full(tokens.hidden[self.layer])
        if tokens.valid is not None:
            features = features.masked_fill(~tokens.valid[:, :, None], 0.0)
        slots, attention = (full(step.aux[name]) for name in ("slots", "attention"))
        visible: Visible = "random" if self.training else "none"
        restored = self.decode(features, slots, tokens.grid_hw, visible, tokens.valid)
        error = area_weighted_mse(
            restored,
            features,
            attention,
            power=self.power,
            cap=self.cap,
            reduction="none",
            legacy=self.legacy,
            valid=tokens.valid,
        )
        return LossValue(error, step.real.any(dim=1))
