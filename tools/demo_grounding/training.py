"""The training, continued where it was stopped.

Everything random in step i depends on the seed and i alone, so that on a CPU a training that was
stopped ends with the very weights of one that was not.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ocvtp.hosts.loading import load_model
from ocvtp.reporting.files import replacing
from ocvtp.reporting.progress import progress_bar
from tools.demo_grounding.batches import Kind, draw_batch, draw_tower_batch
from tools.demo_grounding.conversations import ConversationEncoder, grounding_tokenizer
from tools.demo_grounding.learner import GroundingReader, TowerTeacher, trained, weighed

STATE, LOSSES = "state.ckpt", "losses.csv"
_LAST_RATE = 0.02
_WEIGHT_DECAY = 0.02


@dataclass(frozen=True)
class GroundingSettings:
    """The recipe.

    Args:
        output: folder of the model; `training` in it holds the state.
        base: folder of the demo VLM to begin with.
        tower_steps: of the tower's own stage. sight_steps: of the projector's, after it. steps: of
            the language model's and the projector's, last.
        tower_learning_rate, sight_learning_rate, learning_rate: of these stages, at their highest;
            the last is low, so that what the language model knows is not lost at once.
        warmup: steps in which they rise. hold: share of the steps after which they fall, on a
            cosine to 2%.
        alone_steps: the first of `steps`, whose questions are no conversations.
        spotlight: share of `steps` in which the model reads a third of the tokens, those on objects
            first. drop: share in which it reads a random part of them. Tokens have the positions
            that they have in the image.
        seed: of new words, scenes and questions.
        checkpoint_every: steps from one saved state to the next.
    """

    output: str
    base: str = "checkpoints/demo-vlm"
    tower_steps: int = 500
    sight_steps: int = 120
    steps: int = 1500
    alone_steps: int = 1000
    tower_learning_rate: float = 2e-3
    sight_learning_rate: float = 2e-3
    learning_rate: float = 7e-4
    warmup: int = 25
    hold: float = 0.4
    spotlight: float = 0.5
    drop: float = 0.2
    seed: int = 0
    checkpoint_every: int = 25

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        counts = self.tower_steps, self.sight_steps, self.steps
        if min(counts) < 1:
            raise ValueError(
                f"tower_steps, sight_steps, steps = {counts}: pass at least 1 of each."
            )
        if min(self.spotlight, self.drop) < 0 or self.spotlight + self.drop > 1:
            raise ValueError(
                f"spotlight={self.spotlight}, drop={self.drop} are no shares; pass 0 to 1, no more"
                " than 1 together."
            )


def train(settings: GroundingSettings, resume: bool = False) -> GroundingReader:
    """Train, or go on where a training in the output folder stopped.

    Returns:
        The reader, folded.

    Raises:
        ValueError: if the folder holds a training and `resume` is not set, or one of other
            settings.
    """
    tokenizer = grounding_tokenizer()
    model, _ = load_model(settings.base, "float32")
    reader = GroundingReader(model, tokenizer, settings.seed)
    run = _Run(settings, reader, ConversationEncoder(tokenizer))
    if (state := _saved(settings, resume)) is not None:
        run.load(state)
    total = settings.tower_steps + settings.sight_steps + settings.steps
    with progress_bar("{task.fields[loss]}") as progress:
        task = progress.add_task("boxes", total=total, completed=run.step, loss="")
        while run.step < total:
            kind, loss = run.go_on()
            progress.update(task, completed=run.step, loss=f"{kind} {loss:.3f}")
            if run.step % settings.checkpoint_every == 0 or run.step == total:
                _save(settings, run)
    reader.model.model.vision_tower.requires_grad_(False)
    reader.fold()
    return reader


class _Run:
    """Where a training is: first the tower learns, then what reads it."""

    def __init__(
        self, settings: GroundingSettings, reader: GroundingReader, encoder: ConversationEncoder
    ) -> None:
        self.settings, self.reader, self.encoder = settings, reader, encoder
        config = reader.model.config.vision_config
        self._size, self._patch = config.image_size, config.patch_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.teacher = TowerTeacher(
                reader.model.model.vision_tower, config.image_size // config.patch_size
            )
        tower = [*self.teacher.parameters()]
        own = {id(parameter) for parameter in tower}
        rest = [p for p in trained(reader) if id(p) not in own]
        self._parts = tower, rest
        self.optimizers = tuple(
            torch.optim.AdamW(part, betas=betas, weight_decay=_WEIGHT_DECAY)
            for part, betas in zip(
                self._parts,
                ((0.9, 0.95), (0.9, 0.98)),
                strict=True,
            )
        )
        self.step = 0
        self.rows: list[list[Any]] = []

    def go_on(self) -> tuple[str, float]:
        """One step; its kind and its loss."""
        settings = self.settings
        step = self.step - settings.tower_steps
        self.reader.model.model.vision_tower.requires_grad_(step < 0)
        if step < 0:
            kind, total, number = "tower", settings.tower_steps, self.step
            highest = settings.tower_learning_rate
            if number == 0:
                self.teacher.begin(torch.Generator().manual_seed(settings.seed))
            batch = draw_tower_batch(self.step, settings.seed, self._size, self._patch)
            loss = self.teacher.loss(batch)
        elif step < settings.sight_steps:
            kind, total, number = "sight", settings.sight_steps, step
            highest = settings.sight_learning_rate
            sight = draw_tower_batch(self.step, settings.seed, self._size, self._patch)
            if step == 0:
                self.reader.fit(self.reader.encode(sight.pixel_values))
            loss = weighed(self.reader.sight(sight))
        else:
            total, number = settings.steps, step - settings.sight_steps
            highest = settings.learning_rate
            asked: Kind = "alone" if number < settings.alone_steps else "turns"
            kind = asked
            generator = torch.Generator().manual_seed((settings.seed << 32) + step)
            read = draw_batch(self.encoder, step, settings.seed, self._size, self._patch, asked)
            terms = self.reader.loss(read, settings.spotlight, settings.drop, generator)
            loss = weighed(terms)
        optimizer, part = self.optimizers[step >= 0], self._parts[step >= 0]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(part, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = highest * rate(settings, number, total)
        optimizer.step()
        self.step += 1
        value = round(float(loss.detach()), 4)
        self.rows.append([self.step, kind, value])
        return kind, value

    def state(self) -> dict[str, Any]:
        """All that `load` needs."""
        return {
            "step": self.step,
            "rows": self.rows,
            "reader": self.reader.state_dict(),
            "where": self.teacher.where.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.step, self.rows = state["step"], state["rows"]
        self.reader.load_state_dict(state["reader"])
        self.teacher.where.load_state_dict(state["where"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)


def rate(settings: GroundingSettings, step: int, total: int) -> float:
    """Part of the learning rate in a step: it rises, stays, and falls on a cosine."""
    rise = min(1.0, (step + 1) / max(settings.warmup, 1))
    done = (step / total - settings.hold) / max(1 - settings.hold, 1e-9)
    fall = 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
    return rise * (_LAST_RATE + (1 - _LAST_RATE) * fall)


def _folder(settings: GroundingSettings) -> Path:
    return Path(settings.output) / "training"


def _recipe(settings: GroundingSettings) -> str:
    ignored = ("output", "checkpoint_every")
    return json.dumps({k: v for k, v in asdict(settings).items() if k not in ignored})


def _saved(settings: GroundingSettings, resume: bool) -> dict[str, Any] | None:
    path = _folder(settings) / STATE
    if not path.is_file():
        return None
    if not resume:
        raise ValueError(
            f"{settings.output} holds a training; pass --resume to continue it, or another"
            " --output."
        )
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if state["recipe"] != _recipe(settings):
        raise ValueError(
            f"{path} was written with other settings; pass the same, or another --output."
        )
    return state


def _save(settings: GroundingSettings, run: _Run) -> None:
    folder = _folder(settings)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / STATE) as temporary:
        torch.save({"recipe": _recipe(settings), **run.state()}, temporary)
    with replacing(folder / LOSSES) as temporary:
        lines = ["step,kind,loss", *(",".join(map(str, row)) for row in run.rows)]
        temporary.write_text("\n".join(lines) + "\n")
