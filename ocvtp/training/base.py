"""What every LightningModule of `ocvtp train` has: a network that learns, beside what is frozen."""

from __future__ import annotations

import hashlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from ocvtp.learning.network import PrunerNetwork
from ocvtp.training.figures import Figures, gathered, is_shared, share_of_gradient
from ocvtp.training.schedule import (
    begin_epoch,
    count_whole_epoch,
    planned_steps,
    steps_done,
    warmup_cosine,
)
from ocvtp.training.summary import Curve, data_of, training_summary, validation_figures

_LOG = logging.getLogger(__name__)
CHECKPOINT_KEY = "ocvtp"
_USUAL_RATE, _USUAL_BATCH, _MANY_TIMES = 1e-3, 12, 8
"""The paper's rate and images of a step; and how many times as many are worth a word."""
_HALF = ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16")


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
        validated: figures of the validation that runs, without `val/`.
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
        self.register_load_state_dict_pre_hook(_with_frozen)  # type: ignore[no-untyped-call]
        self.validated = Figures()
        self._warned: set[str] = set()
        self._bad_images = 0
        self._curve = Curve()

    @property
    @abstractmethod
    def transform(self) -> Any:
        """What the data module makes its batches with."""

    @property
    @abstractmethod
    def val_budget(self) -> float:
        """K of the validation's loss."""

    @property
    def monitor(self) -> str:
        """The figure, best where it is lowest, that best.ckpt is chosen by."""
        return "val/loss"

    def shown(self) -> list[pl.Callback]:
        """What shows how the run goes, besides its logs."""
        return []

    def count(self, batch: Mapping[str, Any]) -> int:
        """Images (or questions) of a batch that can be read."""
        return len(batch["image_ids"])

    def look_at(self, figures: Mapping[str, float]) -> None:
        """Warn of figures of a validation, without `val/`, that show that something is wrong."""

    def warn_once(self, of: str, text: str) -> None:
        """By the first process."""
        if self.trainer.is_global_zero and of not in self._warned:
            self._warned.add(of)
            _LOG.warning("%s", text)

    def compile_network(self, backend: str) -> None:
        """Compile what of the network a step calls, see `PrunerNetwork.compiled`.

        Args:
            backend: of `torch.compile`, e.g. `inductor`.

        Raises:
            ValueError: for one that is unknown.
        """
        known = sorted({"eager", "aot_eager", *torch.compiler.list_backends()})
        if backend not in known:
            raise ValueError(f"compile={backend!r} is unknown; pass one of {', '.join(known)}.")
        for name in self.network.compiled:
            setattr(self.network, name, torch.compile(getattr(self.network, name), backend=backend))

    def trained(self) -> Iterator[nn.Parameter]:
        """All that learns."""
        return self.network.parameters()

    def setup(self, stage: str) -> None:
        """Tell DistributedDataParallel what it need not send among the processes.

        What is frozen and the tables of the network are the same in all of them; and a process with
        one validation batch less than another would never answer.

        Raises:
            ValueError: for a precision that weights cannot learn in.
        """
        del stage
        if str(self.trainer.precision) in _HALF:
            raise ValueError(
                f"precision={self.trainer.precision} keeps the weights themselves in half"
                " precision, where small steps of the optimiser are lost; pass --trainer.precision"
                " bf16-mixed, and --model.encoder.dtype or --model.host.dtype bfloat16 for what is"
                " frozen."
            )
        names = [
            f"{self.frozen}.{name}" for name, _ in getattr(self, self.frozen).named_parameters()
        ]
        names += [name for name, _ in self.named_buffers()]
        self._ddp_params_and_buffers_to_ignore = names

    # ------------------------------------------------------------- figures

    def on_train_start(self) -> None:
        """Go on from a checkpoint's epochs and rate, on however many devices, to whatever end."""
        count_whole_epoch(self.trainer)
        self._warn_of_large_steps()
        if type(self).configure_optimizers is NetworkModule.configure_optimizers:
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = self.lr * self._rate()
        begin_epoch(self.trainer)

    def _warn_of_large_steps(self) -> None:
        of_device = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None) or 0
        images = of_device * self.trainer.world_size * self.trainer.accumulate_grad_batches
        times = images / _USUAL_BATCH
        if times >= _MANY_TIMES and self.lr == _USUAL_RATE:
            self.warn_once(
                "large steps",
                f"a step sees {images} images, {times:.0f} times those that lr={self.lr} is usual"
                f" for ({_USUAL_BATCH}), and an epoch has as many times fewer steps. With AdamW the"
                f" rate is usually raised with the root of it, up to {self.lr * times**0.5:.2g}"
                " here, with a longer warm-up: --model.lr, --model.warmup_fraction.",
            )

    def step_on(
        self, loss: Tensor | None, figures: Mapping[str, Tensor | float], count: int
    ) -> Tensor | None:
        """End a training step: log its figures, and weigh the loss among the processes.

        Args:
            loss: the mean over `count` images; None if there are none to learn from.
            figures: by name, without `train/`.
            count: readable images (or questions) of this process's batch.

        Returns:
            what `training_step` returns: without any image nothing, or, among other processes, a
            zero gradient.
        """
        self._log_step({f"train/{name}": value for name, value in figures.items()}, count)
        share = share_of_gradient(count, self.device)
        if loss is not None:
            return loss * share if is_shared() else loss
        return self.nothing()

    def nothing(self) -> Tensor | None:
        """A step without images: skipped, or, among other ranks, a zero gradient."""
        if not is_shared():
            return None
        return sum(p.sum() * 0.0 for p in self.trained())  # type: ignore[return-value]

    def _log_step(self, figures: Mapping[str, Tensor | float], count: int) -> None:
        """In one process every step; among several those that the loggers write, of all images."""
        if is_shared():
            if not self.trainer._logger_connector.should_update_logs:
                return  # and no process waits for another
            step = Figures()
            step.add(figures, count)
            figures = step.pooled()
            self._log_skipped()
        for name, value in figures.items():
            self.log(name, value, prog_bar=name == "train/loss", batch_size=max(1, count))

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the validation: over all images, on any number of devices."""
        figures = self.validated.pooled()
        for name, value in figures.items():
            # Every process has the same figure already.
            self.log(f"val/{name}", value, prog_bar=name == "loss", rank_zero_only=False)
        if is_shared():
            self._log_skipped()
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.look_at(figures)

    def report(self, errors: list[str]) -> None:
        """Name and count images that could not be read (on_error=skip)."""
        for error in errors:
            _LOG.warning("skipped %s", error)
        self._bad_images += len(errors)
        if errors and not is_shared():
            self.log("skipped_images", float(self._bad_images), batch_size=1)

    def _log_skipped(self) -> None:
        if total := sum(gathered(self._bad_images)):
            self.log("skipped_images", float(total), batch_size=1)

    def refuse_nan(
        self, loss: Tensor, features: Iterable[Tensor | None], names: Sequence[str]
    ) -> None:
        """Stop before a batch that is not finite spoils the weights.

        Args:
            loss: of the batch.
            features: what the network read of it, each [B, ...].
            names: of its images or questions, in the order of the rows.

        Raises:
            ValueError: that names the batch.
        """
        read = [one.detach() for one in features if one is not None]
        finite = [x.isfinite().all() for x in (loss.detach(), *read)]
        if bool(torch.stack(finite).all()):
            return
        where = f"at step {self.trainer.global_step}"
        rows = [~one.flatten(1).isfinite().all(dim=1) for one in read if len(one) == len(names)]
        bad = torch.stack(rows).any(dim=0).tolist() if rows else []
        named = [name for name, is_bad in zip(names, bad, strict=False) if is_bad] or list(names)
        shown = ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
        if not bool(torch.stack(finite[1:]).all() if read else True):
            raise ValueError(
                f"{where} what is read of {shown} is not finite: the frozen model's dtype is too"
                " narrow for it (bfloat16 and float32 have the range), its weights or the stored"
                " features are damaged, or the image is."
            )
        raise ValueError(
            f"{where} the loss is {float(loss)} on {shown}, whose features are finite: training"
            f" went astray. Lower --model.lr ({self.lr}), clip gradients"
            " (--trainer.gradient_clip_val 1.0), or train in fp32 or bf16-mixed."
        )

    # ----------------------------------------------------------- optimiser

    def configure_optimizers(self) -> Any:
        """AdamW; linear warm-up, then cosine, by the share of the run that is done.

        Raises:
            ValueError: if the run has no known end.
        """
        optimizer = AdamW(self.trained(), lr=self.lr, weight_decay=self.weight_decay)
        planned_steps(self.trainer)
        # Its own count is that of this number of devices alone.
        schedule = LambdaLR(optimizer, lambda step: self._rate())
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _rate(self) -> float:
        """Share of the peak rate at this moment of the run."""
        total = planned_steps(self.trainer)
        warmup = round(self.warmup_fraction * total)
        return warmup_cosine(steps_done(self.trainer), warmup, total, self.min_lr / self.lr)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The network alone: what is frozen is read from its own files, see `_with_frozen`."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        frozen = f"{kwargs.get('prefix', '')}{self.frozen}."
        for name in [name for name in state if name.startswith(frozen)]:
            del state[name]
        return state

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


def _with_frozen(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """What is frozen is as it is here, also where a callback reads a copy of the module."""
    for name, value in getattr(module, module.frozen).state_dict().items():
        state_dict[f"{prefix}{module.frozen}.{name}"] = value


def _check_rates(lr: float, weight_decay: float, warmup_fraction: float, min_lr: float) -> None:
    if not 0 < lr < math.inf:
        raise ValueError(f"lr={lr}; pass a number above 0.")
    if not 0 <= min_lr <= lr:
        raise ValueError(f"min_lr={min_lr}, lr={lr}; the rate falls to min_lr: pass 0 to {lr}.")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay}; pass a number of at least 0.")
    if not 0 <= warmup_fraction <= 1:
        raise ValueError(f"warmup_fraction={warmup_fraction}; pass a share of the steps, 0 to 1.")


def seed_of(*parts: float | str) -> int:
    """A 63-bit seed that depends on every part."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
