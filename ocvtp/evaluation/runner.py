"""Ask a model every item under every condition.

Batch by batch: the images of a batch are prepared and encoded once, then every condition answers,
and its answers are written to its log. A run that was stopped continues with the first batch that
a condition lacks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ocvtp.evaluation.conditions import Condition, Place, content_hash
from ocvtp.evaluation.logs import Log
from ocvtp.evaluation.tasks.base import Item, Record, Task, TokenTask
from ocvtp.evaluation.tasks.object_cells import at_pixels, source_pixels
from ocvtp.hosts.attach import attached
from ocvtp.hosts.prompt.chat_template import with_template
from ocvtp.hosts.prompt.shorten import Prompt
from ocvtp.hosts.registry import find_host
from ocvtp.hosts.runtime.shared_encodings import SharedEncodings
from ocvtp.reporting.progress import progress_bar


@dataclass(frozen=True)
class Subject:
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
    _sources: dict[tuple[int, int], Any] = field(default_factory=dict, repr=False)

    def inputs(self, task: Task, items: Sequence[Item], owners: Sequence[int]) -> Any:
        """The processor's tensors: the questions of items on the images of `owners`."""
        images = {owner: task.image(owner) for owner in owners}
        texts = [with_template(self.processor, item.question, 1) for item in items]
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.padding_side = "left"
        made = self.processor(
            images=[[images[owner]] for owner in owners],
            text=texts,
            return_tensors="pt",
            padding=True,
        )
        return made.to(self.model.device, self.model.dtype)

    def seen(self, task: Task, owner: int) -> NDArray[np.bool_]:
        """[O, H, W] the objects of an image whose masks are known, in the picture of the tower."""
        masks, size = task.masks(owner), task.image(owner).size
        assert masks is not None
        if size not in self._sources:
            images = getattr(self.processor, "image_processor", self.processor)
            self._sources[size] = source_pixels(find_host(self.model), images, size)
        rows, columns, inside = self._sources[size]
        there: NDArray[np.bool_] = at_pixels(masks, rows, columns, size[::-1]) & inside
        return there


def run(
    subject: Subject,
    task: Task,
    conditions: Sequence[Condition],
    folder: Path,
    batch_size: int,
) -> dict[str, list[Record]]:
    """The records of all items under every condition.

    Args:
        subject: the model.
        task: what is asked.
        conditions: under which.
        folder: where records are kept; those that are there are not made again.
        batch_size: items at a time.

    Returns:
        by `Condition.key`, in the order of `task.items`. A record has `answer`, or what
        `task.look` finds, and `given` and `kept`: visual tokens of its image, before and after,
        the latter on average over the layers of the language model.

    Raises:
        ValueError: if a pruner does not fit the model, or `folder` holds records of other settings.
    """
    shared = shared_settings(subject, task, batch_size)
    logs = {
        c.key: Log(folder, c.key, {**c.settings, "image": c.image, **shared}) for c in conditions
    }
    batches = [
        task.items[start : start + batch_size] for start in range(0, len(task.items), batch_size)
    ]
    pruners = [condition.make(Place(0, list)) for condition in conditions]
    encodings = SharedEncodings.of(subject.model, pruners)
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


def shared_settings(subject: Subject, task: Task, batch_size: int) -> dict[str, Any]:
    """What the records of all conditions of a run depend on, as JSON."""
    found: dict[str, Any] = {
        "model": subject.name,
        "model_weights": content_hash(subject.name),
        "dtype": str(subject.model.dtype),
        "task": {"name": task.name, **task.describe()},
        "batch_size": batch_size,
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _observe(
    subject: Subject,
    task: Task,
    items: Sequence[Item],
    start: int,
    conditions: Sequence[Condition],
    shared: SharedEncodings,
) -> Iterator[tuple[Condition, list[Record]]]:
    """What each condition makes of one batch."""
    host = find_host(subject.model)
    for image in ("own", "other"):
        group = [condition for condition in conditions if condition.image == image]
        if not group:
            continue
        owners = [item.owner for item in items]
        if image == "other":
            last = task.items[-1].owner
            owners = [(owner + 1) % (last + 1) for owner in owners]
        inputs = subject.inputs(task, items, owners)
        place = Place(start, partial(_seen, subject, task, owners))
        pruners = [condition.make(place) for condition in group]
        for condition, pruner in zip(group, pruners, strict=True):
            prompts: list[Prompt] = []
            try:
                with attached(
                    subject.model,
                    pruner,
                    processor=subject.processor,
                    text_tower=subject.text_tower,
                    on_prune=prompts.append,
                    shared=shared,
                ):
                    found = _ask(subject, task, items, inputs, host, prompts)
            except Exception as error:
                error.add_note(f"while {condition.key!r} ran on items {start} and following")
                raise
            counts = visual_token_counts(prompts[0], host)
            yield (
                condition,
                [{**record, **count} for record, count in zip(found, counts, strict=True)],
            )


@torch.no_grad()
def _ask(
    subject: Subject,
    task: Task,
    items: Sequence[Item],
    inputs: Any,
    host: Any,
    prompts: Sequence[Prompt],
) -> Sequence[Record]:
    if isinstance(task, TokenTask):
        subject.model(**inputs, logits_to_keep=1)
        return task.look(host, prompts[0], items)
    made = subject.model.generate(**inputs, do_sample=False, max_new_tokens=task.max_new_tokens)
    texts = subject.processor.batch_decode(
        made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [{"answer": text.strip()} for text in texts]


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


def _seen(subject: Subject, task: Task, owners: Sequence[int]) -> list[NDArray[np.bool_]]:
    """The objects of each row's image, as the tower sees them."""
    by_owner = {owner: subject.seen(task, owner) for owner in set(owners)}
    return [by_owner[owner] for owner in owners]
