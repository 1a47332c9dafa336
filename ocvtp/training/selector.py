"""Training a scorer of visual tokens with a frozen vision-language model in the loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from itertools import chain
from operator import or_
from typing import Any, ClassVar, Literal, Self

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from ocvtp.choices import Positions
from ocvtp.hosts.asking import (
    Answered,
    Asked,
    Asker,
    after_column,
    attention_rows,
    before_layer,
    drop,
    read,
)
from ocvtp.hosts.base import Host
from ocvtp.hosts.gating import Gate, KeyBias, NoGate, checkpointed, gating
from ocvtp.hosts.loading import load_model
from ocvtp.hosts.origin import origin_of
from ocvtp.ops.selection import mask_of
from ocvtp.pruners.selector_pruner import at_layer, check_inside
from ocvtp.pruners.two_stage import of_tower
from ocvtp.selectors.budgets import NumKeep, check_budgets, count_of, counts_of
from ocvtp.selectors.choices import parse_choice
from ocvtp.selectors.losses import Loss, Step, build_losses
from ocvtp.selectors.losses.base import mean_of_rows
from ocvtp.selectors.network import SelectorNetwork
from ocvtp.selectors.parts import spoken
from ocvtp.selectors.relaxations import Gates, HardST, Relaxation, hard_top_k
from ocvtp.selectors.scorer import Scorer
from ocvtp.slots.statistics import Moments
from ocvtp.structures import LayerTokens, VisualTokens
from ocvtp.training.base import NetworkModule, seed_of
from ocvtp.training.callbacks import ScorePictures
from ocvtp.training.deposition import Deposition
from ocvtp.training.feature_statistics import at_equal_steps
from ocvtp.training.object_masks import ObjectsOnTokens
from ocvtp.training.prompts import PromptTransform
from ocvtp.training.schedule import planned_steps, steps_done
from ocvtp.training.teacher import Teacher, TeacherNeeds

_MEASURED = 16  # questions at once
_EARLY = 0.25  # of a run, after which a scorer should be better than chance


@dataclass(frozen=True)
class FrozenModel:
    """The vision-language model whose visual tokens are scored.

    Args:
        model: a folder, a hub id, or random weights; see `ocvtp.hosts.loading.load_model`.
        dtype: of its weights: `auto`, `float32`, `bfloat16`, `float16`.
        stage: `llm_input`: tokens are dropped before the language model; `llm_layers`: before one
            of its layers.
        layer: that one; none with `llm_input`.
        checkpointing: whether its layers run again in the backward pass, to need less memory.
    """

    model: str
    dtype: str = "auto"
    stage: Literal["llm_input", "llm_layers"] = "llm_input"
    layer: int | None = None
    checkpointing: bool = False


class SelectorModule(NetworkModule):
    """Trains any scorer with any relaxation, gate and losses; the model itself is frozen.

    A step draws a budget K, scores the visual tokens of every question's image, makes gates of the
    scores, and lets the frozen model answer through these gates; losses compare. What no loss reads
    is not computed: where losses read masks alone, the language model does not run. Validation
    drops tokens for real, and shows the same figures of random tokens and of the scorer before its
    training.

    Args:
        host: the frozen model.
        scorer: network of the scores, with its sizes.
        losses: by name, with their arguments; see `ocvtp.selectors.losses`.
        relaxation: what makes gates of scores; None for losses that read none.
        gate: how gates act in the frozen model; None for losses that read no answers through them.
        warm_start: folder or hub id of an exported artifact of the same scorer, to begin from; for
            the scorer `slots` that of an OC-pruner, too.
        budgets: whole numbers of tokens, and shares of each image's tokens (0.11); each step draws
            one.
        val_budgets: those of the validation; None for the median of `budgets`.
        choice: how K tokens are chosen by score: `topk`, `{mmr: 0.5}`, `{maxmin: 0.5}`,
            `restore`.
        positions: of tokens that are left: `contiguous` numbers them from 0, `original` leaves
            gaps. It says how the validation reads, and goes into the artifact.
        teacher: folder of `ocvtp teacher`: what the whole model says of the training questions;
            None asks it in every step.
        samples: sets drawn of every question, for the loss `reward`.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        warmup_fraction: share of the steps in which the rate climbs.
        min_lr: where the cosine ends.
        seed: of everything random in a step.
        recipe: what the artifact calls this training.
        statistics_questions: training questions, at equal steps among all, by which the scorer and
            the gate measure what tokens are like before the first step, where they do.

    Raises:
        ValueError: for losses that lack what they read, numbers out of their range, and an artifact
            of another scorer.
    """

    frozen: ClassVar[str] = "vlm"
    network: SelectorNetwork

    def __init__(
        self,
        host: FrozenModel,
        scorer: Scorer,
        losses: dict[str, Any],
        relaxation: Relaxation | None = None,
        gate: Gate | None = None,
        warm_start: str | None = None,
        budgets: list[int | float] | None = None,
        val_budgets: list[int | float] | None = None,
        choice: str | dict[str, Any] | None = None,
        positions: Positions = "contiguous",
        teacher: str | None = None,
        samples: int = 8,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_fraction: float = 0.05,
        min_lr: float = 1e-8,
        seed: int = 0,
        recipe: str = "",
        statistics_questions: int = 400,
    ) -> None:
        super().__init__(lr, weight_decay, warmup_fraction, min_lr, seed)
        self.losses = build_losses(losses)
        self.reads = frozenset[str]().union(*(loss.reads for loss in self.losses))
        self.host, self.relaxation = host, relaxation
        self._check_parts(gate, scorer)
        self.budgets = check_budgets("budgets", budgets, [16, 32, 64, 128])
        median = sorted(self.budgets)[len(self.budgets) // 2]
        self.val_budgets = check_budgets("val_budgets", val_budgets, [median])
        self.choice, self.positions = parse_choice(choice or "topk"), positions
        self.samples, self.statistics_questions, self.recipe = samples, statistics_questions, recipe
        self._check_numbers()
        model, self.processor = load_model(host.model, host.dtype)
        self.vlm = model.requires_grad_(False)
        self._asker = self._ask_of(scorer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            origin = self._origin(losses, gate)
            self.network = SelectorNetwork.build(scorer, None, **origin)
            self.gate, self.learning_losses = self._built(gate or NoGate())
        self.deposition = Deposition(self.frozen_host, self.losses)
        if warm_start is not None:
            self._begin_from(warm_start)
        # In lists, so that they are no part of this module.
        self._control: list[SelectorNetwork] = []
        self._teacher = None if teacher is None else self._stored(teacher)
        self._objects = ObjectsOnTokens(self.frozen_host, self.processor)
        self._modes = ExitStack()

    def _check_parts(self, gate: Gate | None, scorer: Scorer) -> None:
        """Refuse losses that lack what they read."""
        through = sorted(self.reads & {"pruned", "states"})
        if through and (gate is None or not gate.reads_model):
            raise ValueError(
                f"losses read {through} of the model with gates, and model.gate is none; pass one,"
                " e.g. ocvtp.hosts.gating.KeyBias."
            )
        wants = sorted(self.reads & {"gates", "pruned", "states", "reward"})
        if wants and self.relaxation is None:
            raise ValueError(
                f"losses read {wants}, which follow from gates, and model.relaxation is none; pass"
                " one, e.g. ocvtp.selectors.relaxations.HardST."
            )
        if "reward" in self.reads and getattr(self.relaxation, "name", "") != "sample":
            raise ValueError(
                "the loss 'reward' reads drawn sets; pass ocvtp.selectors.relaxations.Sample as"
                " model.relaxation."
            )
        self._check_floors(gate)
        self._check_column(scorer)

    def _check_floors(self, gate: Gate | None) -> None:
        """Refuse a floor of gates that another one hides; at 0 that one alone is meant."""
        if not isinstance(self.relaxation, HardST) or not isinstance(gate, KeyBias):
            return
        floor = self.relaxation.floor
        least = min(floor.start, floor.end)
        if 0 < least < gate.floor:
            raise ValueError(
                f"model.relaxation has a floor of {floor.plain()}, and model.gate one of"
                f" {gate.floor:g}, below which no gate acts; pass a gate with floor={least:g} or"
                " less."
            )

    def _check_column(self, scorer: Scorer) -> None:
        """Refuse what does not go with a column of the scorer's own, or without one."""
        if scorer.needs.column is None:
            if "column" in self.reads:
                raise ValueError(
                    "the loss 'column_ce' reads the answer after a column of the scorer's own, and"
                    f" {scorer.name!r} has none; pass ocvtp.selectors.scorers.vip.VIP with learnt:"
                    " true, or leave the loss out."
                )
        elif self.host.checkpointing:
            raise ValueError(
                "a scorer with a column of its own reads keys and values of the prompt, which"
                " layers that run again in the backward pass do not keep; leave"
                " model.host.checkpointing out."
            )

    def _ask_of(self, scorer: Scorer) -> Asker:
        """Asks the model what the scorer and the losses read before its language model.

        Raises:
            ValueError: that names the scorer's settings, if the model cannot give it.
        """
        layer, needs = self.host.layer, scorer.needs
        if layer is not None:
            needs = check_inside(scorer, layer)
        try:
            return Asker(
                self.vlm,
                self.processor,
                reduce(or_, (loss.needs for loss in self.losses), needs),
            )
        except ValueError as error:
            said = ", ".join(f"{name}={value!r}" for name, value in scorer.sizes().items())
            raise ValueError(f"model.scorer {scorer.name!r} ({said}): {error}") from error

    def _check_numbers(self) -> None:
        least = 2 if "reward" in self.reads else 1
        if self.samples < least:
            raise ValueError(
                f"samples={self.samples}; pass at least {least}: the loss 'reward' compares sets"
                " that are drawn of one question."
            )
        if self.statistics_questions < 1:
            raise ValueError(
                f"statistics_questions={self.statistics_questions}; pass at least 1: by them the"
                " scorer and the gate measure what tokens are like."
            )

    def _origin(self, losses: dict[str, Any], gate: Gate | None) -> dict[str, Any]:
        """All of `SelectorConfig` but the scorer and the run."""
        return origin_of(self.frozen_host, self.host.model) | {
            "stage": self.host.stage,
            "layer": self.host.layer,
            "choice": self.choice.describe(),
            "positions": self.positions,
            "relaxation": _named(self.relaxation),
            "gate": _named(gate),
            "losses": {
                name: {setting: spoken(value) for setting, value in (settings or {}).items()}
                for name, settings in losses.items()
            },
            "num_slots": tuple(self.budgets),
            "objective": self.recipe,
        }

    def _built(self, gate: Gate) -> tuple[Gate, torch.nn.ModuleList]:
        """The gate, and those of the losses that learn something themselves, with their layers."""
        gate.build(self.frozen_host)
        config = self.network.config
        for loss in self.losses:
            loss.build(self.network.scorer, config.widths, config.grid_hw)
        learn = [loss for loss in self.losses if isinstance(loss, torch.nn.Module)]
        return gate, torch.nn.ModuleList(learn)

    def _begin_from(self, artifact: str) -> None:
        """Take the weights of an artifact.

        Raises:
            ValueError: if it is of another scorer, or of other sizes or widths.
        """
        found = SelectorNetwork.from_pretrained(artifact)
        own, theirs = self.network.config, found.config
        widths = {
            name: width for name, width in asdict(theirs.widths).items() if width
        }  # 0: unread
        theirs = replace(theirs, widths=replace(own.widths, **widths))
        for name in ("scorer", "sizes", "widths", "stage", "layer"):
            if getattr(theirs, name) != getattr(own, name):
                raise ValueError(
                    f"warm_start={artifact} has {name}={getattr(theirs, name)!r}, and this run"
                    f" {getattr(own, name)!r}; pass an artifact of the same scorer, of the same"
                    " model."
                )
        self.network.load_state_dict(found.state_dict())

    def _stored(self, teacher: str) -> Teacher:
        return Teacher(teacher, self.says(), self.vlm, self.processor)

    @property
    def transform(self) -> PromptTransform:
        return PromptTransform(self.processor)

    @property
    def val_budget(self) -> float:
        return self.val_budgets[0]

    def shown(self) -> list[pl.Callback]:
        return [ScorePictures()]

    def count(self, batch: Mapping[str, Any]) -> int:
        return len(batch["keys"])

    def look_at(self, figures: Mapping[str, float]) -> None:
        """Say so where the scorer has learnt nothing in a quarter of the run."""
        done = steps_done(self.trainer) / planned_steps(self.trainer)
        pairs = [(figures.get(f"kl_{k}"), figures.get(f"kl_{k}_random")) for k in self.val_budgets]
        known = [(own, random) for own, random in pairs if own is not None and random is not None]
        if done >= _EARLY and known and all(own >= random for own, random in known):
            self.warn_once(
                "chance",
                f"after {done:.0%} of the run answers with the scorer's tokens are no nearer to"
                " those with all tokens than answers with random ones are (val/kl_K and"
                " val/kl_K_random): lower --model.lr, or look at the losses' weights.",
            )

    def trained(self) -> Iterator[torch.nn.Parameter]:
        learn = self.network, self.gate, self.learning_losses
        return chain.from_iterable(module.parameters() for module in learn)

    def train(self, mode: bool = True) -> Self:
        """The frozen model stays in evaluation mode."""
        super().train(mode)
        self.vlm.eval()
        return self

    @property
    def frozen_host(self) -> Host:
        """The adapter of the frozen model."""
        return self._asker.host

    def says(self) -> TeacherNeeds:
        """What losses read of the whole model."""
        layers = {layer for loss in self.losses for layer in loss.layers}
        rows: Any = next((loss.rows for loss in self.losses if loss.rows), "text")
        return TeacherNeeds(bool(self.reads & {"full", "states"}), tuple(sorted(layers)), rows)

    # ------------------------------------------------------------------ a run

    def setup(self, stage: str) -> None:
        """The data is open.

        Raises:
            ValueError: for losses that read masks, and training questions that have none.
        """
        super().setup(stage)
        asked = getattr(getattr(self.trainer, "datamodule", None), "train_set", None)
        reading = [loss.name for loss in self.losses if "objects" in loss.reads]
        if reading and not getattr(asked, "has_places", True):
            raise ValueError(
                f"the losses {reading} read masks or boxes of what questions are about, and no"
                " training question has any; pass data that has, or leave these losses out."
            )

    def on_fit_start(self) -> None:
        """Put gates and checkpointing into the model until the run ends, as gradients need them."""
        self._modes.close()
        if self.reads & {"pruned", "states"}:
            self._modes.enter_context(gating(self.vlm))
        if self.host.checkpointing:
            self._modes.enter_context(checkpointed(self.vlm))

    def teardown(self, stage: str) -> None:
        """Leave the model as it was."""
        del stage
        self._modes.close()

    def on_train_start(self) -> None:
        """Measure what tokens are like, unless a checkpoint brought it."""
        super().on_train_start()
        wanted = [(source, own, Moments()) for source, own in self.network.statistics()]
        wanted = [one for one in wanted if not int(one[1].num_tokens)]
        gate_wants = any(value.isnan().any() for value in self.gate.buffers())
        place_wants = self.deposition.is_missing
        if not wanted and not gate_wants and not place_wants:
            return

        def questions() -> Iterator[Asked]:
            for asked in self._some_questions():
                for source, _, moments in wanted:
                    tokens = asked.tokens
                    values = tokens.projected if source == "projected" else tokens.hidden[source]
                    assert values is not None
                    moments.add(values, tokens.valid)
                if place_wants:
                    self.deposition.add(asked)
                yield asked

        if gate_wants:
            self.gate.measure(questions())
        else:
            for _ in questions():
                pass
        for _, statistics, moments in wanted:
            statistics.measure(moments)
        self.deposition.measure()

    def _some_questions(self) -> Iterator[Asked]:
        """Training questions at equal steps among all."""
        data: Any = self.trainer.train_dataloader
        some = at_equal_steps(data.dataset, self.statistics_questions)
        for batch in DataLoader(some, _MEASURED, collate_fn=data.collate_fn):
            if batch["keys"]:
                yield self.ask(move_data_to_device(batch, self.device))

    # ------------------------------------------------------------------ steps

    def ask(self, batch: dict[str, Any]) -> Asked:
        """The questions of a batch before the layer where tokens are dropped."""
        dtype = self.vlm.dtype
        inputs = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in batch["inputs"].items()
        }
        with self._asker:
            asked = self._asker.ask(inputs, batch["answers"])
        if self.host.layer is None:
            return asked
        needs = self.network.scorer.needs
        host, layer = self.frozen_host, self.host.layer
        asked = before_layer(host, asked, layer, needs.attention, needs.column)
        return replace(asked, tokens=at_layer(asked.tokens, needs))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """One step on a batch of questions (`ocvtp.training.prompts.PromptTransform`)."""
        self.report(batch["errors"])
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        # Seeded by name: every rank draws the same K, and its own noise.
        budget = self.budgets[seed_of(self.seed, "budget", step) % len(self.budgets)]
        torch.manual_seed(seed_of(self.seed, "noise", step, self.global_rank))
        size = self.count(batch)
        if not size:
            return self.step_on(None, {}, 0)
        share = self._share_done()
        found = self._step(batch, self.ask(batch), budget, share, self.losses)
        figures: dict[str, Tensor | float] = {}
        total = found.scores.new_zeros(())
        for loss in self.losses:
            value = loss(found).mean()
            total = total + loss.weight.at(share) * value
            figures[loss.name] = value.detach()
        self._refuse_nan(total, found, batch)
        kept = found.num_keep
        mean = float(kept) if isinstance(kept, int) else kept.float().mean()
        figures |= {"loss": total.detach(), "num_keep": mean}
        if found.gates is not None:
            figures |= _of_gates(found.gates, found.real, kept)
        return self.step_on(total, figures, size)

    def _share_done(self) -> float:
        """Of the run, where schedules are: 0 at its first step, 1 at its last."""
        return min(1.0, steps_done(self.trainer) / max(1, planned_steps(self.trainer) - 1))

    def _refuse_nan(self, loss: Tensor, step: Step, batch: dict[str, Any]) -> None:
        tokens = step.tokens
        read = (tokens.projected, *tokens.hidden.values())
        self.refuse_nan(loss, read, batch["keys"])

    def _step(
        self,
        batch: dict[str, Any],
        asked: Asked,
        budget: float,
        share: float,
        losses: Sequence[Loss],
        training: bool = True,
    ) -> Step:
        """What these losses read of a batch, and nothing else."""
        reads = frozenset[str]().union(*(loss.reads for loss in losses))
        scores = self.network(asked.tokens, counts_of(budget, asked.tokens))
        values, aux, found = scores.values, scores.aux, dict[str, Any]()
        if "reward" in reads:
            values = values.repeat_interleave(self.samples, dim=0)
            aux = {k: v.repeat_interleave(self.samples, dim=0) for k, v in aux.items()}
            groups = torch.arange(len(scores.values), device=values.device)
            found["groups"] = groups.repeat_interleave(self.samples)
            asked, batch = asked.repeat(self.samples), _repeated(batch, self.samples)
        real, num_keep = asked.tokens.real, counts_of(budget, asked.tokens)
        if self.relaxation is not None and reads & _THROUGH_GATES:
            gates = self.relaxation(values, num_keep, real, share, training=training)
            found["gates"] = gates
            if "reward" in reads:
                found["reward"] = self._reward(asked, gates)
        if reads & {"full", "states", "attention"}:
            self.deposition.check(asked.tokens)
            stored = self._teacher if training else None
            found |= self._whole(batch, asked, reads, stored)
        if reads & {"pruned", "states"}:
            answered = read(self.frozen_host, asked, found["gates"], self.gate)
            found |= {"pruned_logits": answered.logits, "pruned_states": answered.states}
            found |= {"owner": answered.owner, "targets": answered.targets}
        if "column" in reads:
            found |= self._after_column(asked)
        if "objects" in reads:
            shares, known = self._shown(batch["objects"], asked.tokens)
            found |= {"objects": shares, "has_objects": known}
        return Step(
            tokens=asked.tokens,
            num_keep=num_keep,
            deposition=self.deposition.means(),
            most_kept=count_of(budget, asked.tokens.num_tokens),
            share=share,
            scores=values,
            aux=aux,
            **found,
        )

    def _shown(self, objects: Sequence[Any], tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        """[B, N] how much of each token shows the question's objects, [B] whether that is known."""
        if not isinstance(tokens, LayerTokens):
            return self._objects(objects, tokens)
        assert tokens.tower is not None
        shares, known = self._objects(objects, tokens.tower)
        return of_tower(tokens, shares).masked_fill(tokens.places < 0, 0), known

    @torch.no_grad()
    def _whole(
        self, batch: dict[str, Any], asked: Asked, reads: frozenset[str], stored: Teacher | None
    ) -> dict[str, Any]:
        """What the model says of questions with all of their tokens: as it was stored, or now."""
        host, needs = self.frozen_host, self.says()
        layers = needs.layers if "attention" in reads else ()
        if not reads & {"full", "states"}:
            if stored is not None:
                return {"teacher": stored.attention(batch, layers, asked)}
            return {"teacher": attention_rows(host, asked, layers, needs.rows)}
        if stored is not None:
            answered = stored.answered(batch, asked, layers, self.vlm)
        else:
            answered = read(host, asked, layers=layers, raters=needs.rows)
        return {
            "full_logits": answered.logits,
            "full_states": answered.states,
            "owner": answered.owner,
            "targets": answered.targets,
            "teacher": answered.attention,
        }

    def _after_column(self, asked: Asked) -> dict[str, Any]:
        """What the model answers with all tokens, after the scorer's own column."""
        vectors = self.network.scorer.column()
        assert vectors is not None
        answered = after_column(self.frozen_host, asked, vectors)
        logits, owner, targets = answered.logits, answered.owner, answered.targets
        return {"column_logits": logits, "owner": owner, "targets": targets}

    @torch.no_grad()
    def _reward(self, asked: Asked, gates: Gates) -> Tensor:
        """[B] what the drawn tokens alone earn: see `ocvtp.selectors.losses.gates.Reward`."""
        answered = read(self.frozen_host, drop(asked, gates.hard, self.positions))
        earned = next(loss.earned for loss in self.losses if "reward" in loss.reads)
        of_rows = _right if earned == "right" else _likelihood
        return of_rows(answered, len(asked.mask))

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any] | None:
        """Tokens are dropped for real; random ones and those of the untrained scorer beside."""
        self.report(batch["errors"])
        size = self.count(batch)
        if not size:
            return None
        asked = self.ask(batch)
        whole, teacher = read(self.frozen_host, asked), self._validate_losses(batch, asked)
        figures, kept, scored = dict[str, Tensor](), [], []
        for budget in self.val_budgets:
            num_keep = capped_count(budget, asked.tokens)
            scored.append(self.network(asked.tokens, num_keep).values)
            for key, value in self._validate_gates(asked, scored[-1], budget).items():
                figures[f"{key}_{budget}"] = value
            for name, keep in self._chosen(asked, scored[-1], budget, batch["keys"]).items():
                ending = f"_{name}" if name else ""
                short = drop(asked, keep, self.positions)
                answered = read(self.frozen_host, short)
                for key, value in compared(whole, answered, size).items():
                    figures[f"{key}_{budget}{ending}"] = value
                for layer, attention in teacher.items():
                    best = hard_top_k(attention, num_keep, asked.tokens.real)
                    shared = (keep & best).sum(), best.sum()
                    self.validated.add_sum(f"overlap_layer{layer}_{budget}{ending}", *shared)
                if not name:
                    kept.append(keep)
        figures["loss"] = torch.stack([figures[f"ce_{k}"] for k in self.val_budgets]).mean()
        self.validated.add(figures, size)
        return {"scores": scored[0], "kept": kept, "grid_hw": asked.tokens.grid_hw}

    def _validate_losses(self, batch: dict[str, Any], asked: Asked) -> Mapping[int, Tensor]:
        """The losses that need no gates, at the weights of the run's end, over rows that count.

        Returns:
            layer -> [B, N], whose attention they read.
        """
        plain = [loss for loss in self.losses if not loss.reads & _THROUGH_GATES]
        if not plain:
            return {}
        found = self._step(batch, asked, self.val_budget, 1.0, plain, False)
        for loss in plain:
            value = loss(found)
            self.validated.add_sum(loss.name, value.values.sum(), value.counts.sum())
        return found.teacher or {}

    def _validate_gates(self, asked: Asked, scores: Tensor, budget: float) -> dict[str, Tensor]:
        """What the gates of these scores would be now, without anything drawn."""
        if self.relaxation is None:
            return {}
        real, num_keep = asked.tokens.real, capped_count(budget, asked.tokens)
        share = self._share_done()
        gates = self.relaxation(scores, num_keep, real, share, training=False)
        return _of_gates(gates, real, num_keep)

    def _chosen(
        self, asked: Asked, scores: Tensor, budget: float, keys: Sequence[str]
    ) -> dict[str, Tensor]:
        """[B, N] bool tokens kept: by the scorer, at random, by the scorer before its training."""
        tokens = asked.tokens
        num_keep = capped_count(budget, tokens)
        if not self._control:
            network = SelectorNetwork.untrained(self.network.config, self.seed, self.network)
            self._control.append(network)
        untrained = self._control[0].to(self.device)(tokens, num_keep).values
        return {
            "": self._keep(tokens, scores, num_keep),
            "random": self.at_random(tokens, budget, keys),
            "untrained": self._keep(tokens, untrained, num_keep),
        }

    def at_random(self, tokens: VisualTokens, budget: float, keys: Sequence[str]) -> Tensor:
        """[B, N] bool tokens drawn for a budget, by the names of the questions."""
        seeds = [seed_of(self.seed, "random", budget, key) for key in keys]
        drawn = [torch.Generator().manual_seed(seed) for seed in seeds]
        random = torch.stack([torch.rand(tokens.num_tokens, generator=own) for own in drawn])
        return hard_top_k(random.to(self.device), capped_count(budget, tokens), tokens.real)

    def _keep(self, tokens: VisualTokens, scores: Tensor, num_keep: NumKeep) -> Tensor:
        if isinstance(num_keep, int):
            selection = self.choice.select(scores, tokens, num_keep)
            chosen = mask_of(selection.keep_indices, tokens.num_tokens)
            return chosen & tokens.real  # padding is chosen last
        kept = torch.zeros_like(tokens.real)
        for count in set(num_keep.tolist()):  # as images of one size are pruned together
            rows = num_keep == count
            alike = tokens.map(partial(_rows_of, rows))
            kept[rows] = self._keep(alike, scores[rows], count)
        return kept


_THROUGH_GATES = frozenset({"pruned", "states", "reward", "gates"})


def capped_count(budget: float, tokens: VisualTokens) -> NumKeep:
    """[B] or int: K of a budget, no more than there are tokens."""
    num_keep = counts_of(budget, tokens)
    return min(num_keep, tokens.num_tokens) if isinstance(num_keep, int) else num_keep


def _repeated(batch: Mapping[str, Any], times: int) -> dict[str, Any]:
    """What losses look up of a batch, every question so many times, one after the other."""
    ids = {name: batch["inputs"][name] for name in ("input_ids", "attention_mask")}
    return {
        "inputs": {name: rows.repeat_interleave(times, dim=0) for name, rows in ids.items()},
        "keys": [key for key in batch["keys"] for _ in range(times)],
        "objects": [objects for objects in batch["objects"] for _ in range(times)],
    }


def _rows_of(rows: Tensor, values: Tensor) -> Tensor:
    return values[rows]


def _named(part: Relaxation | Gate | None) -> dict[str, Any]:
    return {} if part is None else {"name": part.name, **part.settings()}


def _of_gates(gates: Gates, real: Tensor, num_keep: NumKeep) -> dict[str, Tensor]:
    """How hard gates are, and how far their sum is from K."""
    if gates.soft is None:
        return {}
    soft = gates.soft.detach()
    between = ((soft > 0.1) & (soft < 0.9) & real).sum() / real.sum()
    wanted = real.sum(dim=1).clamp(max=num_keep)
    error = ((soft.sum(dim=1) - wanted).abs() / wanted.clamp(min=1)).mean()
    return {"gates_between": between, "gate_error": error}


def compared(whole: Answered, answered: Answered, size: int) -> dict[str, Tensor]:
    """An answer with few tokens beside that with all; the columns are the same.

    Args:
        whole: with all tokens. answered: with few. size: B, the questions.

    Returns:
        `kl`, `ce`, `agreement` with the answer of all tokens, `accuracy`: means over the questions.
    """

    def by_question(values: Tensor) -> Tensor:
        return mean_of_rows(values, answered.owner, size).values

    full, pruned = (one.logits.float().log_softmax(dim=1) for one in (whole, answered))
    divergence = (full.exp() * (full - pruned)).sum(dim=1)
    agrees = (pruned.argmax(dim=1) == full.argmax(dim=1)).float()
    return {
        "kl": by_question(divergence).mean(),
        "ce": -_likelihood(answered, size).mean(),
        "agreement": by_question(agrees).mean(),
        "accuracy": _right(answered, size).mean(),
    }


def _likelihood(answered: Answered, size: int) -> Tensor:
    """[B] the mean log-likelihood of the answer's tokens."""
    values = functional.cross_entropy(answered.logits.float(), answered.targets, reduction="none")
    return -mean_of_rows(values, answered.owner, size).values


def _right(answered: Answered, size: int) -> Tensor:
    """[B] 1 where all of the answer's tokens are predicted, else 0."""
    right = (answered.logits.argmax(dim=1) == answered.targets).float()
    return right.new_ones(size).scatter_reduce(0, answered.owner, right, "amin")
