"""The moving average of the weights that learn, which are validated and kept in their place."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ocvtp.training.base import NetworkModule


class NetworkAverage(EMAWeightAveraging):
    """Lightning's exponential moving average, of the network without what is frozen.

    Checkpoints, and so artifacts, hold the average; a resumed run goes on with both.

    Args:
        decay: of the average in a step, 0 to 1; what is older than about 1 / (1 - decay) steps
            hardly counts.

    Raises:
        ValueError: for a decay out of its range.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema={decay}; pass a number between 0 and 1, e.g. 0.999.")
        super().__init__(use_buffers=False, decay=decay)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._average_model = AveragedModel(
                _learning(pl_module), device=pl_module.device, use_buffers=False, **self._kwargs
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """What is kept in memory goes where the network went."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, _learning(pl_module), outputs, batch, batch_idx)  # type: ignore[arg-type]

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_end(trainer, _learning(pl_module))  # type: ignore[arg-type]

    def _swap_models(self, pl_module: Any) -> None:
        super()._swap_models(_learning(pl_module))  # type: ignore[arg-type]

    def _copy_average_to_current(self, pl_module: Any) -> None:
        super()._copy_average_to_current(_learning(pl_module))  # type: ignore[arg-type]


def _learning(module: NetworkModule) -> nn.ModuleDict:
    """All that has weights and is not frozen, by its names in the module."""
    children = {name: child for name, child in module.named_children() if name != module.frozen}
    return nn.ModuleDict({n: c for n, c in children.items() if any(True for _ in c.parameters())})
