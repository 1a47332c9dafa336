"""The stages of projector and language model, continued where they were stopped.

On a CPU a training that was stopped ends with the very weights of one that was not.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from ocvtp.reporting.files import replacing
from ocvtp.reporting.progress import progress_bar
from tools.demo_vlm.training import rate
from tools.photo_vlm.batches import Batches
from tools.photo_vlm.learner import Learner
from tools.photo_vlm.questions import Asker
from tools.photo_vlm.settings import PhotoSettings, PhotoStage
from tools.photo_vlm.shards import Encoded

LOG_EVERY = 20

_BEGIN = 64
_CHECKED = 64
_WEIGHT_DECAY = 0.02


def train(
    learner: Learner,
    settings: PhotoSettings,
    encoded: Encoded,
    held_out: Encoded,
    asker: Asker,
    tokenizer: Any,
    folder: Path,
) -> None:
    """Run all stages, and fold the projector.

    Args:
        learner: fresh; is trained.
        settings: the recipe.
        encoded: composites for training. held_out: others, whose score is printed after a stage.
        asker: of the questions. tokenizer: of the model.
        folder: of the state, a file a stage, with its losses.

    Raises:
        ValueError: if the folder holds the state of another recipe.
    """
    files = [folder / f"{n + 1}-{stage.name}.ckpt" for n, stage in enumerate(settings.stages)]
    begun = [number for number, path in enumerate(files) if path.is_file()]
    for number in range(begun[-1] if begun else 0, len(files)):
        state = None
        if files[number].is_file():
            state = _load(files[number], _recipe(settings, encoded, number))
            learner.load_reader(state["learner"])
        batches = Batches(encoded, asker, tokenizer, settings.seed, number)
        _run_stage(learner, settings, encoded, number, batches, state, files[number])
        shown = ", ".join(
            f"{kind} {100 * value:.1f}%"
            for kind, value in score(
                learner, settings.stages[number], Batches(held_out, asker, tokenizer, 0, number)
            ).items()
        )
        Console(stderr=True).print(f"{settings.stages[number].name}: held out: {shown or '-'}")
    learner.fold()


def _recipe(settings: PhotoSettings, encoded: Encoded, number: int) -> str:
    """What the weights of a stage depend on."""
    parts = {"reader": asdict(settings.reader), "seed": settings.seed, "of": len(encoded)}
    stages = [asdict(stage) for stage in settings.stages[: number + 1]]
    return json.dumps({**parts, "stages": stages})


def _load(path: Path, recipe: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if state["recipe"] != recipe:
        raise ValueError(
            f"{path} was written with other settings of the reader, the seed, the composites or the"
            " stages; pass the same, or another --output."
        )
    return state


def _run_stage(
    learner: Learner,
    settings: PhotoSettings,
    encoded: Encoded,
    number: int,
    batches: Batches,
    state: dict[str, Any] | None,
    path: Path,
) -> None:
    stage, seed = settings.stages[number], settings.seed
    learnt = [p for p in learner.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        learnt, stage.learning_rate, betas=(0.9, 0.98), weight_decay=_WEIGHT_DECAY
    )
    if state is None:
        some = batches.at(0, min(_BEGIN, len(encoded)), 0, english=False)
        learner.begin(stage, some, _generator(seed, number, stage.steps))
        state = {"step": 0, "rows": []}
    elif "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    with progress_bar("{task.fields[loss]}") as progress:
        task = progress.add_task(stage.name, total=stage.steps, completed=state["step"], loss="")
        for step in range(state["step"], stage.steps):
            batch = batches.at(step, stage.batch_size, stage.questions, stage.prompts == "english")
            terms = learner.loss(stage, batch, _generator(seed, number, step))
            _step(optimizer, stage, step, terms)
            done = step + 1
            if done % LOG_EVERY == 0 or done == stage.steps:
                row = {name: float(term.detach()) for name, term in terms.items()}
                state["rows"].append({"step": done, **row})
                shown = "  ".join(f"{name} {value:.3f}" for name, value in row.items())
                progress.update(task, loss=shown)
            progress.update(task, completed=done)
            if done % settings.checkpoint_every == 0 or done == stage.steps:
                kept = {"step": done, "rows": state["rows"], "learner": learner.reader_state()}
                kept["recipe"] = _recipe(settings, encoded, number)
                if done < stage.steps:
                    kept["optimizer"] = optimizer.state_dict()
                with replacing(path) as temporary:
                    torch.save(kept, temporary)


def _step(
    optimizer: torch.optim.Optimizer, stage: PhotoStage, step: int, terms: dict[str, Tensor]
) -> None:
    weights = {"align": stage.align, "answer": stage.answer}
    loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
        group["lr"] = stage.learning_rate * rate(stage, step)
    optimizer.step()


def _generator(*numbers: int) -> torch.Generator:
    seed = int(np.random.SeedSequence([*numbers, 1]).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def score(learner: Learner, stage: PhotoStage, batches: Batches) -> dict[str, float]:
    """Share of right answers by kind, with all tokens; of objects' patches where none is asked."""
    num = min(_CHECKED, len(batches.encoded))
    right: dict[str, list[bool]] = {}
    for step in range(-(-num // 16)):
        batch = batches.at(step, min(16, num), stage.questions, stage.prompts == "english")
        visual = learner.project(batch.features)
        if not stage.answer:
            found = learner.word_logits(visual, plurals=False).argmax(-1) == batch.patches
            right.setdefault("patches", []).extend(found[batch.patches > 0].tolist())
            continue
        logits, _ = learner.answer(visual, batch)
        hits = (logits.argmax(-1) == batch.answer).flatten().tolist()
        for kind, hit in zip(batch.kinds, hits, strict=True):
            right.setdefault(kind, []).append(hit)
    return {kind: float(np.mean(hits)) for kind, hits in sorted(right.items())}
