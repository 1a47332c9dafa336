"""Ask a model every item under every condition.

Batch by batch: the images of a batch are prepared and encoded once, then every condition answers,
and its answers are written to its log. A run that was stopped continues with the first batch that
a condition lacks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ocvtp.choices import Positions
from ocvtp.evaluation.conditions import Budget, Condition, Place, content_hash
from ocvtp.evaluation.downsample import Downsampled, Sizer
from ocvtp.evaluation.judged import Judged
from ocvtp.evaluation.logs import Log
from ocvtp.evaluation.prompts import Prompts, answers, make_prompts
from ocvtp.evaluation.tasks.base import Item, Record, Task, TokenTask
from ocvtp.evaluation.tasks.object_cells import Sight, sight_of_host
from ocvtp.hosts.attach import attached, trained_positions
from ocvtp.hosts.prompt.checks import refuse_beyond_all
from ocvtp.hosts.prompt.read_call import look
from ocvtp.hosts.prompt.shorten import Prompt
from ocvtp.hosts.registry import find_host
from ocvtp.hosts.runtime.shared_encodings import SharedEncodings
from ocvtp.pruners import Compose, Pruner
from ocvtp.reporting.progress import progress_bar
from ocvtp.structures import Needs, VisualTokens


@dataclass(frozen=True)
class Subject(Judged):
    """A model to be asked.

    Args:
        model: a supported VLM. processor: its own.
        name: folder or hub id.
        text_tower: see `ocvtp.attach`.
    """

    model: Any
    processor: Any
    name: str
    text_tower: Any = None

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def num_tower_blocks(self) -> int:
        return find_host(self.model).num_tower_blocks

    @cached_property
    def _sight(self) -> Sight:
        images = getattr(self.processor, "image_processor", self.processor)
        return sight_of_host(find_host(self.model), images)

    @cached_property
    def sizer(self) -> Sizer:
        return Sizer(self.processor, find_host(self.model).image_token_id)

    def settings(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "model_weights": content_hash(self.name),
            "dtype": str(self.dtype),
        }

    def shape(self, task: Task) -> tuple[int, tuple[int, int]]:
        first = self._first_tokens(task, Needs())
        return first.num_tokens, first.grid_hw

    def width(self, task: Task, layer: int) -> int:
        return self._first_tokens(task, Needs(hidden=(layer,))).hidden[layer].shape[-1]

    @torch.no_grad()
    def _first_tokens(self, task: Task, needs: Needs) -> VisualTokens:
        item = task.items[0]
        inputs = self.inputs(task, [item], [item.owner])
        host = find_host(self.model)
        hooks = host.install(needs)
        try:
            return look(host, needs, inputs.first).encoded.tokens
        finally:
            for hook in hooks:
                hook.remove()

    def inputs(self, task: Task, items: Sequence[Item], owners: Sequence[int]) -> Prompts:
        """The processor's tensors: the questions of items on the images of `owners`."""
        place = self.model.device, self.model.dtype
        return make_prompts(self.processor, task, items, owners, *place)

    def seen(self, task: Task, owner: int) -> NDArray[np.bool_]:
        masks = task.masks(owner)
        assert masks is not None
        return self._sight.seen(masks, task.image(owner).size)

    def sharing(self, pruners: Sequence[Pruner | Compose]) -> SharedEncodings:
        return SharedEncodings.of(self.model, pruners)

    def attempt(self, pruner: Pruner | Compose, inputs: Prompts, shared: SharedEncodings) -> None:
        refuse_beyond_all(find_host(self.model), pruner)
        with self._attached(pruner, shared):
            self.model(**inputs.first, logits_to_keep=1)

    def observe(
        self,
        task: Task,
        items: Sequence[Item],
        pruner: Pruner | Compose,
        inputs: Prompts,
        shared: SharedEncodings,
        positions: Positions | None = None,
    ) -> list[Record]:
        prompts: list[Prompt] = []
        host = find_host(self.model)
        how = {"on_prune": prompts.append, "positions": positions}
        with self._attached(pruner, shared, **how):
            found = _ask(self, task, items, inputs, host, prompts)
        counts = _of_rows(visual_token_counts(prompts[0], host), len(items))
        return [{**record, **count} for record, count in zip(found, counts, strict=True)]

    def _attached(
        self, pruner: Pruner | Compose, shared: SharedEncodings, **options: Any
    ) -> AbstractContextManager[Any]:
        return attached(
            self.model,
            pruner,
            processor=self.processor,
            text_tower=self.text_tower,
            shared=shared,
            **options,
        )


def run(
    subject: Judged,
    task: Task,
    conditions: Sequence[Condition],
    folder: Path,
    batch_size: int,
) -> dict[str, list[Record]]:
    """The records of all items under every condition.

    Args:
        subject: what pruners are judged on.
        task: what is asked.
        conditions: under which.
        folder: where records are kept; those that are there are not made again.
        batch_size: items at a time.

    Returns:
        by `Condition.key`, in the order of `task.items`, see `Judged.observe`.

    Raises:
        ValueError: if a pruner does not fit, or `folder` holds records of other settings.
    """
    shared = shared_settings(subject, task, batch_size)
    pruners = [condition.make(Place(0, list)) for condition in conditions]
    logs = {
        c.key: Log(
            folder,
            c.key,
            {**c.settings, "image": c.image, **shared},
            {"positions": trained_positions(pruner)},
        )
        for c, pruner in zip(conditions, pruners, strict=True)
    }
    for log in logs.values():
        log.refuse_more_than(len(task.items))
    batches = [
        task.items[start : start + batch_size] for start in range(0, len(task.items), batch_size)
    ]
    encodings = subject.sharing(pruners)
    with progress_bar() as progress:
        bar = progress.add_task("", total=len(conditions) * len(batches))
        start = 0
        for items in batches:
            end = start + len(items)
            waiting = [c for c in conditions if len(logs[c.key]) < end]
            progress.advance(bar, len(conditions) - len(waiting))
            for condition, records in _observe(subject, task, items, start, waiting, encodings):
                log = logs[condition.key]
                log.append(records[len(log) - start :])
                progress.update(bar, advance=1, description=condition.label)
            start = end
    return {key: log.records for key, log in logs.items()}


def shared_settings(subject: Judged, task: Task, batch_size: int) -> dict[str, Any]:
    """What the records of all conditions of a run depend on, as JSON."""
    found: dict[str, Any] = {
        **subject.settings(),
        "task": {"name": task.name, **task.describe()},
        "batch_size": batch_size,
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _observe(
    subject: Judged,
    task: Task,
    items: Sequence[Item],
    start: int,
    conditions: Sequence[Condition],
    shared: Any,
) -> Iterator[tuple[Condition, list[Record]]]:
    """What each condition makes of one batch."""
    for (image, budget), group in _by_view(conditions).items():
        shown = task
        if image == "smaller":
            assert subject.sizer is not None
            assert budget is not None
            shown = Downsampled(task, subject.sizer, budget)
        owners = [item.owner for item in items]
        if image == "other":
            last = task.items[-1].owner
            owners = [(owner + 1) % (last + 1) for owner in owners]
        inputs = subject.inputs(shown, items, owners)
        place = Place(start, partial(seen_of, subject, task, owners))
        pruners = [condition.make(place) for condition in group]
        for condition, pruner in zip(group, pruners, strict=True):
            try:
                found = subject.observe(task, items, pruner, inputs, shared, condition.positions)
            except Exception as error:
                error.add_note(f"while {condition.key!r} ran on items {start} and following")
                raise
            if image == "smaller":
                sizes = [list(shown.image(task.shown(owner)[0]).size) for owner in owners]
                found = [{**one, "shown": size} for one, size in zip(found, sizes, strict=True)]
            yield condition, found


def _by_view(
    conditions: Sequence[Condition],
) -> dict[tuple[str, Budget | None], list[Condition]]:
    """Those that see the same images together: of which item, and for `smaller` of what size."""
    found: dict[tuple[str, Budget | None], list[Condition]] = {}
    for one in conditions:
        budget = one.budget if one.image == "smaller" else None
        found.setdefault((one.image, budget), []).append(one)
    return found


@torch.no_grad()
def _ask(
    subject: Subject,
    task: Task,
    items: Sequence[Item],
    inputs: Prompts,
    host: Any,
    prompts: Sequence[Prompt],
) -> Sequence[Record]:
    if isinstance(task, TokenTask):
        subject.model(**inputs.first, logits_to_keep=1)
        return task.look(host, prompts[0], items)
    said = answers(subject.model, subject.processor, inputs, task.max_new_tokens)
    return [{"answer": text} for text in said]


def _of_rows(counts: Sequence[dict[str, float]], rows: int) -> list[dict[str, float]]:
    """Visual tokens of an image, on average over those that a row shows."""
    each = len(counts) // rows
    if each == 1:
        return list(counts)
    groups = [counts[start : start + each] for start in range(0, len(counts), each)]
    return [
        {name: float(np.mean([one[name] for one in group])) for name in group[0]}
        for group in groups
    ]


def visual_token_counts(prompt: Prompt, host: Any) -> list[dict[str, float]]:
    """Visual tokens of each image: `given` before pruning, `kept` on average over the layers."""
    summary = prompt.summary()
    given, left = summary["visual_tokens"], np.array(summary["visual_tokens_kept"], float)
    num_layers = len(host.language_model.layers)
    total, since = np.zeros_like(left), 0
    for stage in summary["layers"]:
        total += left * (stage["layer"] - since)
        left, since = np.array(stage["visual_tokens_kept"], float), stage["layer"]
    kept = (total + left * (num_layers - since)) / num_layers
    return [
        {"given": all_, "kept": round(few, 3)}
        for all_, few in zip(given, kept.tolist(), strict=True)
    ]


def seen_of(subject: Judged, task: Task, owners: Sequence[int]) -> list[NDArray[np.bool_]]:
    """The objects of each image that rows show, as the tower sees them."""
    numbers = [number for owner in owners for number in task.shown(owner)]
    by_number = {number: subject.seen(task, number) for number in set(numbers)}
    return [by_number[number] for number in numbers]
