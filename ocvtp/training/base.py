"""What every LightningModule of `ocvtp train` has: a network that learns, beside what is frozen."""

from __future__ import annotations

import hashlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from ocvtp.learning.network import PrunerNetwork
from ocvtp.training.schedule import planned_steps, warmup_cosine
from ocvtp.training.summary import Curve, data_of, training_summary, validation_figures

_LOG = logging.getLogger(__name__)
CHECKPOINT_KEY = "ocvtp"


class NetworkModule(pl.LightningModule, ABC):
    """Trains `network`, which a subclass builds; its checkpoints hold that alone.

    Args:
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        warmup_fraction: share of the steps in which the rate climbs.
        min_lr: where the cosine ends.
        seed: of everything random in a step.

    Raises:
        ValueError: for a rate, decay or share out of its range.

    Attributes:
        run_settings: the settings of the run in plain types, for its checkpoints; see
            `ocvtp.training.resume`.
    """

    network: PrunerNetwork
    frozen: ClassVar[str]
    """The attribute that holds what is frozen, and is read from its own files."""

    def __init__(
        self, lr: float, weight_decay: float, warmup_fraction: float, min_lr: float, seed: int
    ) -> None:
        super().__init__()
        _check_rates(lr, weight_decay, warmup_fraction, min_lr)
        self.lr, self.weight_decay = lr, weight_decay
        self.warmup_fraction, self.min_lr = warmup_fraction, min_lr
        self.seed = seed
        self.run_settings: dict[str, Any] = {}
        self._bad_images = 0
        self._curve = Curve()

    @property
    @abstractmethod
    def transform(self) -> Any:
        """What the data module makes its batches with."""

    @property
    @abstractmethod
    def val_budget(self) -> int:
        """K of the validation's loss."""

    def shown(self) -> list[pl.Callback]:
        """What shows how the run goes, besides its logs."""
        return []

    def trained(self) -> Iterator[nn.Parameter]:
        """All that learns."""
        return self.network.parameters()

    def nothing(self) -> Tensor | None:
        """A step without images: skipped, or, among other ranks, a zero gradient."""
        if self.trainer.world_size == 1:
            return None
        return sum(p.sum() * 0.0 for p in self.trained())  # type: ignore[return-value]

    def report(self, errors: list[str]) -> None:
        """Name and count images that could not be read (on_error=skip)."""
        for error in errors:
            _LOG.warning("skipped %s", error)
        self._bad_images += len(errors)
        if errors:
            self.log("skipped_images", float(self._bad_images), batch_size=1)

    def configure_optimizers(self) -> Any:
        """AdamW; linear warm-up, then cosine, per step.

        Raises:
            ValueError: if the run has no known end.
        """
        optimizer = AdamW(self.trained(), lr=self.lr, weight_decay=self.weight_decay)
        total = planned_steps(self.trainer)
        warmup = round(self.warmup_fraction * total)
        floor = self.min_lr / self.lr

        def factor(step: int) -> float:
            return warmup_cosine(step, warmup, total, floor)

        schedule = LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The network alone: what is frozen is read from its own files."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        return {k: v for k, v in state.items() if not k.startswith(f"{self.frozen}.")}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Strict: the checkpoint's network and what is frozen here."""
        own = getattr(self, self.frozen).state_dict()
        frozen = {f"{self.frozen}.{k}": v for k, v in own.items()}
        return super().load_state_dict({**state_dict, **frozen}, strict=strict, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an export and a resumed run need, in plain types."""
        settings = {"lr": self.lr, "weight_decay": self.weight_decay, "seed": self.seed}
        self._curve.add(self.trainer.global_step, validation_figures(self.trainer))
        told = {"data": data_of(self.run_settings), "curve": list(self._curve.points)}
        summary = training_summary(self.trainer, settings, self.val_budget)
        checkpoint[CHECKPOINT_KEY] = {
            "format": self.network.format,
            "config": asdict(self.network.config),
            "training": summary | {name: value for name, value in told.items() if value},
            "settings": self.run_settings,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the curve of the run."""
        kept = checkpoint.get(CHECKPOINT_KEY) or {}
        self._curve.points = list((kept.get("training") or {}).get("curve") or ())


def _check_rates(lr: float, weight_decay: float, warmup_fraction: float, min_lr: float) -> None:
    if not 0 < lr < math.inf:
        raise ValueError(f"lr={lr}; pass a number above 0.")
    if not 0 <= min_lr <= lr:
        raise ValueError(f"min_lr={min_lr}, lr={lr}; the rate falls to min_lr: pass 0 to {lr}.")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay}; pass a number of at least 0.")
    if not 0 <= warmup_fraction <= 1:
        raise ValueError(f"warmup_fraction={warmup_fraction}; pass a share of the steps, 0 to 1.")


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
