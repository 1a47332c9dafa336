"""Training the network of a trainable pruner, as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor

from ocvtp.encoders.base import FrozenEncoder
from ocvtp.learning.network import PrunerNetwork, Sizes
from ocvtp.learning.objective import Objective, Outcome
from ocvtp.pruners import trainable
from ocvtp.slots.attention import slot_winners
from ocvtp.slots.config import NetworkSizes
from ocvtp.structures import Needs, VisualTokens
from ocvtp.training.base import NetworkModule, seed_of
from ocvtp.training.callbacks import SlotPictures
from ocvtp.training.feature_statistics import measure_statistics
from ocvtp.training.features import stored_tokens
from ocvtp.training.metrics import (
    ForegroundARI,
    MeanBestOverlap,
    nearest_kept_distance,
    reconstruction_residual,
    slot_labels,
)
from ocvtp.training.object_masks import object_shares

_FEW_SLOTS = 0.1
"""Share of slots in use below which something is wrong; a third is usual for the paper's."""
_FEW_TOKENS = 0.25
"""The same of different tokens that slots want."""


class PrunerModule(NetworkModule):
    """Trains the network of a pruner (`TrainablePruner`) on the tokens of a frozen encoder.

    All that is random in a step (budgets drawn, query noise, masks, dropout) follows from the seed,
    the step and the rank, so that a resumed run continues bit for bit.

    Args:
        encoder: frozen tower; it fixes the layer, the width and the grid.
        objective: what to train for; None for the pruner's own, e.g. the paper's of the OC-pruner.
        network: sizes, which tell whose network it is: plain ones are the OC-pruner's; else the
            `Sizes` of another trainable pruner, by `class_path`.
        num_slots: budgets K, which are slot counts of the OC-pruner; each step draws one. Paper:
            16, 32, 64, 128.
        val_num_slots: budget of the validation; None for the median of `num_slots`.
        lr: peak learning rate of AdamW; paper: 1e-3.
        weight_decay: paper: 0.01.
        warmup_fraction: share of the steps in which the rate climbs; paper: 4 of 30 epochs.
        min_lr: where the cosine ends; paper: 1e-8.
        seed: of everything random in a step.
        statistics_images: training images, at equal steps among all, that the network's feature
            statistics are measured on before the first step, where it has any.
        load_tower: False leaves the encoder's weights unread, for data that brings the tokens
            (`ocvtp.data.features.FeatureDataModule`); `ocvtp train` sees to it.

    Raises:
        ValueError: for budgets that no image has, sizes of no trainable pruner, and an objective
            that cannot train the network.
    """

    frozen: ClassVar[str] = "encoder"

    def __init__(
        self,
        encoder: FrozenEncoder,
        objective: Objective | None = None,  # type: ignore[type-arg]  # the parser takes no Any
        network: Sizes | NetworkSizes | None = None,
        num_slots: list[int] | None = None,
        val_num_slots: int | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_fraction: float = 4 / 30,
        min_lr: float = 1e-8,
        seed: int = 0,
        statistics_images: int = 400,
        load_tower: bool = True,
    ) -> None:
        super().__init__(lr, weight_decay, warmup_fraction, min_lr, seed)
        pruner = trainable.of_sizes(network)
        kind: type[PrunerNetwork] = pruner.network_class
        sizes = network or kind.sizes_class()
        self.objective: Objective[Any] = objective or pruner.objective_class()
        if not issubclass(kind, self.objective.trains):
            raise ValueError(
                f"the objective {self.objective.name!r} trains {self.objective.trains.called}, and"
                f" model.network are the sizes of {kind.called}; set model.objective or"
                " model.network to a class of the other's own."
            )
        self.num_slots = list(num_slots or (16, 32, 64, 128))
        tokens = encoder.max_tokens
        for slots in [*self.num_slots, *([val_num_slots] if val_num_slots else [])]:
            if not 1 <= slots <= tokens:
                raise ValueError(f"{slots} slots for {tokens} tokens; pass 1 to {tokens} slots.")
        self.val_num_slots = val_num_slots or sorted(self.num_slots)[len(self.num_slots) // 2]
        self.statistics_images = statistics_images
        self.objective.check(sizes)
        layer = encoder.layer
        self._needs = kind.needs(sizes, layer) | self.objective.needs(layer)
        self._stored = encoder.resolved(self._needs)
        self.encoder = encoder.load(self._needs) if load_tower else encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = kind.build(sizes, self.objective, **self._origin())
        self.foreground_ari = ForegroundARI()
        self.mean_best_overlap = MeanBestOverlap()

    @property
    def transform(self) -> Any:
        return self.encoder.transform

    @property
    def val_budget(self) -> int:
        return self.val_num_slots

    @property
    def monitor(self) -> str:
        """What the kept tokens do not restore, where the network can tell which it keeps.

        A loss may fall while they get worse.
        """
        can_tell = type(self.network).kept is not PrunerNetwork.kept
        return "val/coverage_residual" if can_tell else "val/loss"

    def shown(self) -> list[pl.Callback]:
        return [SlotPictures()]

    def look_at(self, figures: Mapping[str, float]) -> None:
        """Say so where slots have collapsed."""
        used, unique = figures.get("slots_in_use"), figures.get("unique_tokens")
        if used is not None and used < _FEW_SLOTS:
            self.warn_once(
                "slots in use",
                f"only {used:.0%} of the slots win a token in the validation (val/slots_in_use);"
                " the others are dead. Look at the pictures of slots; a lower --model.lr, or fewer"
                " slots (--model.num_slots), may help.",
            )
        if unique is not None and unique < _FEW_TOKENS * self.val_num_slots:
            self.warn_once(
                "unique tokens",
                f"{self.val_num_slots} slots want {unique:.1f} different tokens in the validation"
                " (val/unique_tokens): they have collapsed onto the same ones, and a pruner would"
                " fill up by another rule. Lower --model.lr, or train longer before you judge.",
            )

    def _origin(self) -> dict[str, Any]:
        """Facts of the run for the network, see `NetworkConfig`."""
        encoder = self.encoder
        return {
            "feature_dim": encoder.feature_dim,
            "grid_hw": encoder.grid_hw,
            "layout": encoder.layout,
            "tower": encoder.tower_id,
            "layer": encoder.layer,
            "preprocessing": encoder.transform.describe(),
            "num_slots": tuple(self.num_slots),
            "objective": self.objective.name,
        }

    def reads(self) -> tuple[dict[str, Any], Needs, bool]:
        """What features must be: the encoder's `origin`, what is read, whether of masks too."""
        return self.encoder.origin, self._stored, self.objective.reads_objects

    def tokens_of(self, batch: dict[str, Any]) -> VisualTokens:
        """The visual tokens of a batch: by the tower, or those that it brings."""
        if "tokens" in batch:
            return stored_tokens(batch["tokens"], self._needs, self._stored)
        tokens: VisualTokens = self.encoder(batch["pixel_values"], batch["image_sizes"])
        return tokens

    def compile_network(self, backend: str) -> None:
        """Compile what a step calls of the network and many times of the objective."""
        super().compile_network(backend)
        self.objective.compile_steps(backend)

    # ------------------------------------------------------------------ steps

    def on_train_start(self) -> None:
        """Measure the features' statistics, unless a checkpoint brought them."""
        super().on_train_start()
        assert self.trainer.train_dataloader is not None
        data, images = self.trainer.train_dataloader, self.statistics_images
        measure_statistics(self.network, self.tokens_of, data.dataset, data.collate_fn, images)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """One step on a batch of images (`ocvtp.data.coco.collate`) or of their features."""
        self.report(batch["errors"])
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        # Seeded by name: every rank draws the same S, and its own noise.
        choice = seed_of(self.seed, "slots", step) % len(self.num_slots)
        torch.manual_seed(seed_of(self.seed, "noise", step, self.global_rank))
        size = self.count(batch)
        if not size:
            return self.step_on(None, {}, 0)
        outcome = self._run(batch, self.num_slots[choice])[1]
        num_slots = float(self.num_slots[choice])
        figures: dict[str, Tensor | float] = {"loss": outcome.loss, "num_slots": num_slots}
        figures |= outcome.logs
        return self.step_on(outcome.loss, figures, size)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any] | None:
        """Everything masked, fixed query noise: the same figure for the same weights."""
        self.report(batch["errors"])
        if not self.count(batch):
            return None
        tokens, outcome = self._run(batch, self.val_num_slots)
        figures = {"loss": outcome.loss, **outcome.logs, **self._coverage(tokens, outcome)}
        self.validated.add(figures, tokens.batch_size)
        if outcome.attention is None:
            return None
        masks = first_views(tokens, outcome.attention.float(), self.count(batch))
        if "instances" in batch:
            self._score_masks(masks, batch["instances"])
        return {"masks": masks}

    def _run(self, batch: dict[str, Any], num_slots: int) -> tuple[VisualTokens, Outcome]:
        tokens = self.tokens_of(batch)
        objects = object_shares(batch, tokens) if self.objective.reads_objects else None
        outcome = self.objective(self.network, tokens, num_slots, objects)
        read = (*tokens.hidden.values(), *tokens.attention.values())
        names = [str(name) for name in batch.get("paths", batch["image_ids"])]
        self.refuse_nan(outcome.loss, read, names)
        return tokens, outcome

    def _score_masks(self, masks: list[Tensor], instances: Tensor | list[Tensor]) -> None:
        """Add [S, h, w] slot masks and [H, W] instance ids to the metrics, equal sizes together."""
        metrics: dict[str, ForegroundARI | MeanBestOverlap]
        metrics = {"fg_ari": self.foreground_ari, "mbo_i": self.mean_best_overlap}
        pairs: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for mask, ids in zip(masks, instances, strict=True):
            pairs.setdefault((mask.shape, ids.shape), []).append((mask, ids))
        for (shape, size), alike in pairs.items():
            attention = torch.stack([mask.flatten(1) for mask, _ in alike])
            labels = slot_labels(attention, (shape[1], shape[2]), (size[0], size[1]))
            for metric in metrics.values():
                metric.update(labels, torch.stack([ids for _, ids in alike]))
        for name, metric in metrics.items():
            self.validated.add_sum(name, *metric.sums)
            metric.reset()

    def _coverage(self, tokens: VisualTokens, outcome: Outcome) -> dict[str, Tensor]:
        """How well the tokens that the network chooses itself (no fill) stand for all tokens."""
        figures: dict[str, Tensor] = {}
        if outcome.attention is not None:
            won = slot_winners(outcome.attention)  # [B, N]
            figures["unique_tokens"] = won.sum(dim=1).float().mean()
        chosen = self.network.kept(tokens, outcome.attention, self.val_num_slots)
        if chosen is None:
            return figures
        features = tokens.hidden[self.encoder.layer]
        order = chosen.int().sort(dim=1, descending=True, stable=True).indices
        keep = order[:, : self.val_num_slots]
        kept = (features, keep, chosen.gather(1, keep), tokens.valid)
        figures["coverage_distance"] = nearest_kept_distance(*kept).mean()
        figures["coverage_residual"] = reconstruction_residual(*kept).mean()
        return figures


OCPrunerModule = PrunerModule
"""Its name in earlier versions."""


def first_views(tokens: VisualTokens, attention: Tensor, num_images: int) -> list[Tensor]:
    """Slot masks of the whole image: the base views', where images are cut into tiles.

    Args:
        tokens: of B >= I rows, those of the I images or their base views first.
        attention: [B, S, N].
        num_images: I.

    Returns:
        of each image [S, h, w].
    """
    grids = [tokens.grid_hw] * num_images if tokens.grids is None else tokens.grids[:, 0].tolist()
    pairs = zip(attention[:num_images], grids, strict=True)
    return [
        own[:, : rows * columns].unflatten(1, (rows, columns)) for own, (rows, columns) in pairs
    ]
