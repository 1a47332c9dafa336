"""`evaluate`: a model, a task, pruners and budgets in; a report out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ocvtp.choices import Positions
from ocvtp.evaluation import conditions as made
from ocvtp.evaluation import earlier_runs
from ocvtp.evaluation.checkpoint_groups import grouped
from ocvtp.evaluation.conditions import Budget, Condition, Place, readable, takes_checkpoints
from ocvtp.evaluation.intervals import average
from ocvtp.evaluation.judged import Judged
from ocvtp.evaluation.labels import (
    CONTROLS,
    DOWNSAMPLE,
    ORACLE,
    ORIGINAL,
    POOL,
    SHUFFLED,
    UNPRUNED,
    UNTRAINED,
)
from ocvtp.evaluation.report import DIGITS, Report, Row
from ocvtp.evaluation.runner import run, seen_of, shared_settings
from ocvtp.evaluation.tasks.base import Record, Task, TokenTask
from ocvtp.pruners import trainable
from ocvtp.reporting.command_line import as_typed
from ocvtp.reporting.environment import environment_of

ANSWERS = "answers"
Words = Mapping[tuple[str, Budget | None], str]
"""What is said of a label at a budget."""
Part = tuple[str, str, Sequence[str]]
"""Label of rows, spec of their pruner, and the checkpoints whose figures are averaged."""


def evaluate(
    subject: Judged,
    task: Task,
    pruners: Sequence[str],
    budgets: Sequence[Budget],
    output: str | Path,
    *,
    checkpoints: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    batch_size: int = 32,
    controls: Sequence[str] = CONTROLS,
    skip_unfit: bool = False,
    command: str | None = None,
    positions: Sequence[Positions] = (),
) -> tuple[Report, dict[str, list[Record]]]:
    """Run pruners at budgets, and the controls beside them.

    Args:
        subject: the model, or the vision tower alone.
        task: what is asked.
        pruners: specs, see `build_spec`.
        budgets: of every pruner.
        output: folder; what an earlier run has answered there is not asked again.
        checkpoints: exported networks: a pruner that takes one is run with each of its kind.
            Figures of those that differ in nothing but the seed are averaged; others have rows of
            their own.
        seeds: of what is random.
        batch_size: items at a time.
        controls: what runs beside them, of `CONTROLS`, where it can; the oracle only where the
            masks of objects are known and tokens are one grid. Unpruned and shuffled images always
            do.
        skip_unfit: whether pruners that cannot run at a budget are left out, with a note.
        command: what to type for the same, for the report.
        positions: of the tokens that are left, `contiguous`, `original` or both, see
            `ocvtp.attach`; none: those that each pruner was trained with, and else contiguous.
            Original ones have rows of their own, compared with the others where both are tried.

    Returns:
        the report, and the records of every condition.

    Raises:
        ValueError: if a pruner does not fit the model, before anything is asked.
    """
    before = earlier_runs.read(Path(output))
    subject.check(task)
    num_tokens, grid = subject.shape(task)
    groups, remark = grouped(checkpoints)
    chosen = [part for spec in dict.fromkeys(pruners) for part in _parts(spec, groups)]
    settings = (num_tokens, grid, chosen, budgets, seeds, checkpoints, controls)
    found = made.at_positions(_conditions(subject, task, *settings), positions)
    unfit, notes = _tried(subject, task, found, batch_size)
    found, instead = _without_downsampling(found, unfit)
    if not skip_unfit:
        _refuse(subject, unfit, {part[0] for part in chosen})
    fit = [condition for condition in found if (condition.label, condition.budget) not in unfit]
    answers, shared = Path(output) / ANSWERS, shared_settings(subject, task, batch_size)
    asked = {(one.label, _share(one.label, one.budget, num_tokens)) for one in fit}
    there = earlier_runs.stored(Path(output), before, answers, shared, len(task.items), asked)
    records = run(subject, task, fit, answers, batch_size)
    rows = _rows(task, found, records, num_tokens, notes, unfit)
    unpruned = records.get(made.UNPRUNED_KEY, [])
    kept = earlier_runs.kept(before, there, task, unpruned)
    report = Report(
        task=task.name,
        model=subject.name,
        metrics=tuple(task.metrics),
        percent=task.percent,
        settings=_settings(shared, seeds, checkpoints) | kept.commands(command),
        environment=environment_of(subject),
        rows=kept.joined(rows),
        lower_is_better=task.lower_is_better,
        not_judged=task.not_judged,
        counts=task.counts,
        asks=not isinstance(task, TokenTask),
        remarks=[*task.remarks, *filter(None, [remark, instead]), *kept.remarks()],
    )
    return report, {**kept.records, **records}


def _settings(
    shared: Mapping[str, Any], seeds: Sequence[int], checkpoints: Sequence[str]
) -> dict[str, Any]:
    """Those of the task first; what the report says of the model or tower elsewhere is left out."""
    told = {"task", "batch_size", "model", "dtype"}
    return {
        "task": shared["task"],
        "batch_size": shared["batch_size"],
        "seeds": list(seeds),
        "checkpoints": list(checkpoints),
        **{name: value for name, value in shared.items() if name not in told},
    }


def _parts(spec: str, groups: Sequence[Sequence[str]]) -> list[Part]:
    """A pruner, once for each group of checkpoints if it takes them.

    `ocvtp` on several groups is `ocvtp:checkpoint=A`, named after the first of each.
    """
    if takes_checkpoints(spec):
        own = set(readable(spec, [path for group in groups for path in group]))
        groups = [group for group in groups if own.issuperset(group)] or groups
    if len(groups) < 2 or not takes_checkpoints(spec):
        return [(spec, spec, groups[0])]
    colon = "," if ":" in spec else ":"
    named = [(f"{spec}{colon}checkpoint={group[0]}", group) for group in groups]
    return [(name, name if len(group) == 1 else spec, group) for name, group in named]


def _conditions(
    subject: Judged,
    task: Task,
    num_tokens: int,
    grid: tuple[int, int],
    pruners: Sequence[Part],
    budgets: Sequence[Budget],
    seeds: Sequence[int],
    checkpoints: Sequence[str],
    controls: Sequence[str],
) -> list[Condition]:
    """All that is to be run; the first image has `num_tokens`, on that grid if they are one."""
    counts = [budget.count(num_tokens) for budget in budgets]
    if len(set(counts)) < len(counts):
        raise ValueError(
            f"the budgets {', '.join(map(str, budgets))} are {counts} of {num_tokens} tokens;"
            " pass each count once."
        )
    found = made.unpruned_conditions()
    if isinstance(task, TokenTask):  # those of a wrong image are no question about this one
        found = [condition for condition in found if condition.image == "own"]
    plain = [name for name in controls if name not in (UNTRAINED, ORACLE, DOWNSAMPLE)]
    known = {label for label, _, _ in pruners}
    controlled = [(name, name, checkpoints) for name in plain if name not in known]
    for label, spec, own in [*pruners, *controlled]:
        found += made.pruner_conditions(spec, budgets, seeds, own, num_tokens, label)
    if DOWNSAMPLE in controls and not isinstance(task, TokenTask):
        found += made.downsample_conditions(budgets)
    if UNTRAINED in controls:
        found += _untrained(subject, task, budgets, seeds, checkpoints)
    one_grid = num_tokens == np.prod(grid)
    if ORACLE in controls and one_grid and task.masks(0) is not None:
        found += made.oracle_conditions(budgets)
    return found


def answers_of(task: Task, records: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """What was asked, and what came back under each condition in that order, as JSON."""
    items = [
        {"key": i.key, "question": i.question, "answers": list(i.answers)}
        | ({"before": list(i.before)} if i.before else {})
        for i in task.items
    ]
    answered = {
        key: [record.get("answer", record) for record in some] for key, some in records.items()
    }
    return {"items": items, "conditions": answered}


def _untrained(
    subject: Judged,
    task: Task,
    budgets: Sequence[Budget],
    seeds: Sequence[int],
    checkpoints: Sequence[str],
) -> list[Condition]:
    """Of the sizes of the first network of each kind where there is one, else of the paper's."""
    first: dict[str, str] = {}
    for path in checkpoints:
        for name in trainable.readers(path)[:1]:
            first.setdefault(name, path)
    likes = [trainable.of_name(n).network_class.from_pretrained(p) for n, p in first.items()]
    if not likes:
        kind = trainable.of_name(trainable.DEFAULT).network_class
        layer = kind.default_layer(subject.num_tower_blocks)
        config = kind.default_config(subject.width(task, layer), layer)
        likes = [kind.untrained(config, 0)]
    return [one for like in likes for one in made.untrained_conditions(budgets, seeds, like)]


@torch.no_grad()
def _tried(
    subject: Judged, task: Task, found: Sequence[Condition], batch_size: int
) -> tuple[Words, Words]:
    """Why pruners cannot run at some budgets, and notes on those that can: a seed tries a batch."""
    items = task.items[:batch_size]
    owners = [item.owner for item in items]
    inputs = subject.inputs(task, items, owners)
    place = Place(0, lambda: seen_of(subject, task, owners))
    pruners = [condition.make(place) for condition in found]
    shared = subject.sharing(pruners)
    problems: dict[tuple[str, Budget | None], str] = {}
    notes: dict[tuple[str, Budget | None], str] = {}
    for condition, pruner in zip(found, pruners, strict=True):
        if (condition.label, condition.budget) in notes.keys() | problems.keys():
            continue  # another seed
        try:
            if condition.image == "smaller":
                _check_size(subject, task, condition.budget)
            else:
                subject.attempt(pruner, inputs, shared)
            notes[condition.label, condition.budget] = subject.note(pruner)
        except ValueError as error:
            problems[condition.label, condition.budget] = as_typed(str(error))
    return problems, notes


def _check_size(subject: Judged, task: Task, budget: Budget | None) -> None:
    """Refuse a budget that no size of the first image comes near."""
    assert budget is not None
    if subject.sizer is None:
        raise ValueError("a tower alone sees images in one size")
    first = task.shown(task.items[0].owner)[0]
    subject.sizer.check(task.image(first).size, budget)


def _without_downsampling(
    found: Sequence[Condition], unfit: Words
) -> tuple[list[Condition], str | None]:
    """The conditions without smaller images where no budget has them, and a remark on that."""
    own = {(c.label, c.budget) for c in found if c.image == "smaller"}
    if not own or not own <= unfit.keys():
        return list(found), None
    why = unfit[next(iter(own))]
    left = [condition for condition in found if condition.image != "smaller"]
    instead = "nothing stands for it"
    if any(condition.label == POOL for condition in left):
        instead = f"`{POOL}`, which averages neighbouring tokens, stands for it"
    return left, f"no `{DOWNSAMPLE}`: {why}; {instead}."


def _refuse(subject: Judged, unfit: Words, named: Collection[str]) -> None:
    """Refuse rows of these labels that cannot run."""
    problems = {key: why for key, why in unfit.items() if key[0].removesuffix(ORIGINAL) in named}
    if not problems:
        return
    lines = "".join(
        f"\n  {label}{'' if budget is None else f' @ {budget}'}: {problem}"
        for (label, budget), problem in problems.items()
    )
    raise ValueError(
        f"these cannot run on {subject.name}; leave them out, or pass --skip-unfit for a report"
        f" that says so:{lines}"
    )


def _rows(
    task: Task,
    found: Sequence[Condition],
    records: Mapping[str, Sequence[Record]],
    num_tokens: int,
    notes: Words,
    unfit: Words,
) -> list[Row]:
    """A row for each pruner and budget, averaged over seeds."""
    groups: dict[tuple[str, Budget | None], list[Condition]] = {}
    for condition in found:
        groups.setdefault((condition.label, condition.budget), []).append(condition)
    rows = []
    for (label, budget), group in groups.items():
        figures, kept, note = {}, None, unfit.get((label, budget))
        if note is None:
            note = notes[label, budget]
            unpruned = records.get(made.UNPRUNED_KEY, [])
            of_seeds = [task.compared(records[condition.key], unpruned) for condition in group]
            figures = {name: average([one[name] for one in of_seeds]) for name in of_seeds[0]}
            counts = [record["kept"] for condition in group for record in records[condition.key]]
            kept = float(np.mean(counts))
        rows.append(
            Row(
                label=label,
                pruner=label.removesuffix(ORIGINAL).partition(":")[0],
                budget=_share(label, budget, num_tokens),
                num_keep=None if budget is None else budget.num_keep,
                seeds=len(group),
                control=group[0].control,
                visual_tokens=kept,
                figures=figures,
                note=note,
                trained=group[0].trained,
                yours=group[0].yours,
            )
        )
    return rows


def _share(label: str, budget: Budget | None, num_tokens: int) -> float | None:
    """Of the tokens kept, where images have `num_tokens`; None where the pruner itself decides."""
    if budget is None:
        return 1.0 if label in (UNPRUNED, SHUFFLED) else None
    share = budget.keep_ratio or budget.count(num_tokens) / num_tokens
    return float(f"{share:.{DIGITS}g}")  # as results.json has it
