"""The stages of the demo VLM, one after the other, continued where they were stopped.

Everything random in step i of a stage depends on the seed, the stage and i alone, so that on a CPU
a training that was stopped ends with the very weights of one that was not.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from ocvtp.reporting.files import replacing
from ocvtp.reporting.progress import progress_bar
from tools.demo_vlm.batches import Batch, QuestionEncoder, StageScenes, batches, collate
from tools.demo_vlm.learner import Learner
from tools.demo_vlm.processor import word_tokenizer
from tools.demo_vlm.settings import DemoSettings, StageSettings

STATE_FOLDER = "training"
LOG_EVERY = 10

_BEGIN_SCENES = 64
_VAL_SCENES = 96
_LAST_RATE = 0.02
_WEIGHT_DECAY = 0.02


def train(settings: DemoSettings, resume: bool = False) -> Learner:
    """Train through all stages.

    A file of state is kept for each stage in `training/` of the output folder, beside its losses.

    Args:
        settings: the recipe.
        resume: continue what the folder holds, or begin if it holds nothing.

    Returns:
        The learner, on its device, folded.

    Raises:
        ValueError: if the folder holds a training and `resume` is not set, or one of other
            settings.
    """
    learner = Learner(settings.model, word_tokenizer(), settings.seed).to(settings.device)
    saved = _saved(settings, resume)
    first = len(saved) - 1 if saved else 0
    for number in range(first, len(settings.stages)):
        state = _load(saved[number], settings, number) if number < len(saved) else None
        if state is not None:
            learner.load_state_dict(state["learner"])
        _run_stage(learner, settings, number, state)
    learner.fold()
    return learner


def stage_file(settings: DemoSettings, number: int, suffix: str = "ckpt") -> Path:
    """Where the state of a stage is, or with `csv` its losses."""
    name = f"{number + 1}-{settings.stages[number].name}.{suffix}"
    return Path(settings.output) / STATE_FOLDER / name


def _saved(settings: DemoSettings, resume: bool) -> list[Path]:
    """The files of the stages that have begun, in order."""
    files = [stage_file(settings, number) for number in range(len(settings.stages))]
    begun = [number for number, path in enumerate(files) if path.is_file()]
    if begun and not resume:
        raise ValueError(
            f"{settings.output} holds a training; pass --resume to continue it, or another"
            " --output."
        )
    return files[: begun[-1] + 1] if begun else []


def _recipe(settings: DemoSettings, number: int) -> str:
    """What the weights of a stage depend on."""
    parts = {"model": asdict(settings.model), "seed": settings.seed, "bf16": settings.bfloat16}
    stages = [asdict(stage) for stage in settings.stages[: number + 1]]
    return json.dumps({**parts, "stages": stages})


def _load(path: Path, settings: DemoSettings, number: int) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location=settings.device, weights_only=True)
    if state["recipe"] != _recipe(settings, number):
        raise ValueError(
            f"{path} was written with other settings of the model, the seed or the stages up to"
            f" {settings.stages[number].name!r}; pass the same, or another --output."
        )
    return state


def _run_stage(
    learner: Learner, settings: DemoSettings, number: int, state: dict[str, Any] | None
) -> None:
    stage = settings.stages[number]
    encoder = QuestionEncoder(word_tokenizer(), stage.prompts == "english")
    place = (settings.model, stage, number, settings.seed, encoder)
    scenes = StageScenes(*place, "train", stage.steps * stage.batch_size)
    optimizer = build_optimizer(learner, stage)
    if state is None:
        count = min(_BEGIN_SCENES, len(scenes))
        some = collate([scenes[index] for index in range(count)]).to(settings.device)
        learner.begin(stage, some, _generator(settings.seed, number, stage.steps))
        state = {"step": 0, "rows": []}
    elif state["step"] == stage.steps:
        return
    else:
        optimizer.load_state_dict(state["optimizer"])
    rows: list[dict[str, float]] = state["rows"]
    stream = batches(scenes, stage.batch_size, state["step"], settings.num_workers)
    with progress_bar("{task.fields[loss]}") as progress:
        task = progress.add_task(stage.name, total=stage.steps, completed=state["step"], loss="")
        for step, batch in enumerate(stream, start=state["step"]):
            generator = _generator(settings.seed, number, step)
            terms = _step(learner, settings, stage, optimizer, step, batch, generator)
            done = step + 1
            if done % LOG_EVERY == 0 or done == stage.steps:
                row = {name: float(term.detach()) for name, term in terms.items()}
                rows.append({"step": done, **row})
                shown = "  ".join(f"{name} {value:.3f}" for name, value in row.items())
                progress.update(task, loss=shown)
            progress.update(task, completed=done)
            if done % settings.checkpoint_every == 0 or done == stage.steps:
                _save(learner, settings, number, done, optimizer, rows)
    val = StageScenes(*place, "val", _VAL_SCENES)
    scores = validate(learner, stage, batches(val, 16), settings.device)
    shown = ", ".join(f"{name} {100 * value:.1f}%" for name, value in scores.items())
    Console(stderr=True).print(f"{stage.name}: {stage.steps} steps; validation: {shown or '-'}")


def _step(
    learner: Learner,
    settings: DemoSettings,
    stage: StageSettings,
    optimizer: torch.optim.Optimizer,
    step: int,
    batch: Batch,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """One step of the optimiser; the terms of the loss before it."""
    kind = torch.device(settings.device).type
    with torch.autocast(kind, torch.bfloat16, enabled=settings.bfloat16):
        terms = learner.loss(stage, batch.to(settings.device), generator)
    weights = {"dense": stage.dense, "align": stage.align, "answer": stage.answer}
    loss = torch.stack([weights[name] * term.float() for name, term in terms.items()]).sum()
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
        group["lr"] = group["initial_lr"] * rate(stage, step)
    optimizer.step()
    return terms


def build_optimizer(learner: Learner, stage: StageSettings) -> torch.optim.Optimizer:
    """AdamW over what the stage trains: the reader, and the tower unless it is frozen."""
    tower = [*learner.model.model.vision_tower.parameters(), *learner.heads.parameters()]
    in_tower = {id(parameter) for parameter in tower}
    reader = [p for p in learner.parameters() if p.requires_grad and id(p) not in in_tower]
    groups: list[dict[str, Any]] = []
    if stage.align or stage.answer:
        lr = stage.learning_rate
        groups.append({"params": reader, "lr": lr, "initial_lr": lr, "betas": (0.9, 0.98)})
    if stage.tower_learning_rate:
        lr = stage.tower_learning_rate
        groups.append({"params": tower, "lr": lr, "initial_lr": lr, "betas": (0.9, 0.95)})
    return torch.optim.AdamW(groups, weight_decay=_WEIGHT_DECAY)


def rate(stage: StageSettings, step: int) -> float:
    """Part of the learning rate in a step: it rises, stays, and falls on a cosine."""
    rise = min(1.0, (step + 1) / max(stage.warmup, 1))
    done = (step / stage.steps - stage.hold) / max(1 - stage.hold, 1e-9)
    fall = 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
    return rise * (_LAST_RATE + (1 - _LAST_RATE) * fall)


@torch.no_grad()
def validate(
    learner: Learner, stage: StageSettings, stream: Iterable[Batch], device: str
) -> dict[str, float]:
    """Shares of `Learner.scores` that are right, with all tokens."""
    found: dict[str, list[Tensor]] = {}
    for batch in stream:
        for name, right in learner.scores(stage, batch.to(device)).items():
            found.setdefault(name, []).append(right.flatten().float())
    return {name: float(torch.cat(parts).mean()) for name, parts in found.items()}


def _generator(*numbers: int) -> torch.Generator:
    seed = int(np.random.SeedSequence([*numbers, 1]).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


def _save(
    learner: Learner,
    settings: DemoSettings,
    number: int,
    step: int,
    optimizer: torch.optim.Optimizer,
    rows: list[dict[str, float]],
) -> None:
    state = {"recipe": _recipe(settings, number), "step": step, "rows": rows}
    state["learner"] = learner.state_dict()
    if step < settings.stages[number].steps:
        state["optimizer"] = optimizer.state_dict()
    with replacing(stage_file(settings, number)) as temporary:
        torch.save(state, temporary)
    with replacing(stage_file(settings, number, "csv")) as temporary, temporary.open("w") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["step"])
        writer.writeheader()
        writer.writerows(rows)
