"""`recommend`: accuracy, then time of what runs, and the choice; both go on where they stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ocvtp.bench import report as speed_report
from ocvtp.bench.run import Plan, bench
from ocvtp.evaluation import report as accuracy_report
from ocvtp.evaluation.conditions import Budget
from ocvtp.evaluation.labels import DOWNSAMPLE, POOL, RANDOM, UNPRUNED
from ocvtp.evaluation.plots import order
from ocvtp.evaluation.run import answers_of, evaluate
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.tasks.base import Task
from ocvtp.pruners import trainable
from ocvtp.pruners.budgets import check_count
from ocvtp.recommend.choice import (
    Option,
    choose,
    doubts,
    facts_of,
    front,
    metric_of,
    options,
    refuse_unknown,
    sentence,
)
from ocvtp.recommend.code import lines
from ocvtp.recommend.typical import Typical, typical
from ocvtp.reporting.command_line import command as typed
from ocvtp.reporting.plain_text import on_images

KIND, SCHEMA = "ocvtp recommend", 1
ACCURACY, SPEED = "accuracy", "speed"
PRUNERS = (
    "divprune",
    "fastervlm",
    "fopru",
    "hiprune",
    "todre",
    "tome",
    "visionzip",
    "zspaprune",
)
"""What is looked at where nobody says what: methods without training, of several kinds."""
SHARES = (0.5, 0.25, 0.11, 0.056)
"""Of the tokens kept, where nobody says how many: 64 and 32 of LLaVA-1.5's 576 are the last two."""
CONTROLS = (RANDOM, POOL, DOWNSAMPLE)
_NEW_TOKENS = 2  # the fewest that `bench` takes: only the first one counts here


@dataclass(frozen=True)
class Wanted:
    """What is looked for.

    Args:
        pruners: specs; none for `PRUNERS`, of which those are left out that the model cannot run.
        num_keep, shares: budgets; neither for `SHARES`.
        max_drop: points that may be lost.
        metric: figure to choose by; None for that of all questions.
        checkpoint: exported network, for pruners that take one.
        seeds: of what is random. batch_size: questions at a time.
        bench_batch_size: requests at a time where times are measured.
        warmup, repetitions: rounds there.
        skip_unfit: whether named pruners that cannot run are left out, too.

    Raises:
        ValueError: for a `max_drop` below 0, counts and shares that are none, and rounds that are
            too few for `Plan`.
    """

    pruners: Sequence[str] = ()
    num_keep: Sequence[int] = ()
    shares: Sequence[float] = ()
    max_drop: float = 1.0
    metric: str | None = None
    checkpoint: str | None = None
    seeds: int = 3
    batch_size: int = 32
    bench_batch_size: int = 1
    warmup: int = 3
    repetitions: int = 20
    skip_unfit: bool = False

    def __post_init__(self) -> None:
        if not self.max_drop >= 0:
            raise ValueError(
                f"max_drop={self.max_drop}; pass the points that may be lost, at least 0."
            )
        if wrong := [share for share in self.shares if not 0 < share <= 1]:
            raise ValueError(f"keep_ratio={wrong[0]}; pass shares above 0, up to 1.")
        Plan((), (), (), _NEW_TOKENS, self.warmup, self.repetitions)  # refuses too few rounds
        object.__setattr__(self, "num_keep", [check_count("num_keep", k) for k in self.num_keep])

    @property
    def specs(self) -> list[str]:
        """The pruners to look at; of the usual ones, with what reads the checkpoint."""
        if self.pruners:
            return list(self.pruners)
        readers = [] if self.checkpoint is None else trainable.readers(self.checkpoint)[:1]
        return [*readers, *PRUNERS]


def recommend(
    subject: Subject, task: Task, wanted: Wanted, folder: Path, command: str = ""
) -> dict[str, Any]:
    """Measure what `folder` does not hold yet, and choose.

    Args:
        subject: the model. task: what is asked.
        wanted: what is looked for.
        folder: gets `accuracy`, as `evaluate` writes it, and `speed`, as `bench` does.
        command: what to type for the same, for the reports.

    Returns:
        what recommendation.json holds.

    Raises:
        ValueError: if no pruner can run, or what `evaluate` and `bench` refuse.
    """
    if wanted.metric is not None:
        refuse_unknown(wanted.metric, task)
    usual = typical(subject, task)
    shares = wanted.shares or (() if wanted.num_keep else SHARES)
    counts = usual.counts(wanted.num_keep, shares)
    accuracy = _accuracy(subject, task, wanted, counts, folder / ACCURACY, command)
    metric = metric_of(accuracy, wanted.metric, len(task.items))
    asked = _asked(accuracy, wanted.specs, counts)
    specs = _that_run(subject, wanted.specs, asked)
    speed = _speed(subject, wanted, specs, counts, usual, folder / SPEED, command)
    speed_report.write(speed, folder / SPEED, accuracy)
    sizes = vars(usual.cell(wanted.bench_batch_size))
    cell = next(one for one in speed["cells"] if sizes.items() <= one.items())
    found = options(asked, cell, metric)
    if not found:
        raise ValueError(
            f"nothing was both answered and timed on {subject.name}; see {folder / ACCURACY} and"
            f" {folder / SPEED}, and pass other --pruners or a smaller --num-keep."
        )
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "model": subject.name,
        "task": accuracy["task"],
        **_chosen(accuracy, found, metric, wanted, subject.text_tower),
        "remarks": [*accuracy["remarks"], *_warnings(accuracy, "mild")],
        "order": dict(zip(("methods", "controls"), order(accuracy), strict=True)),
        "left_out": _left_out(asked, cell, _names(specs, counts)),
        "request": {**sizes, "image_size": list(usual.image_size), "tokens": usual.num_tokens},
        "command": command,
        "environment": speed["environment"],
    }


def _chosen(
    accuracy: Mapping[str, Any],
    found: Sequence[Option],
    metric: str,
    wanted: Wanted,
    text_tower: Any,
) -> dict[str, Any]:
    """What is chosen of the options, by which figure, and what to know about it."""
    chosen = choose(found, wanted.max_drop)
    figure = next(r["figures"][metric] for r in accuracy["rows"] if r["label"] == UNPRUNED)
    asked = f"{figure['n']} {accuracy['counts']} {on_images(figure['images'])}"
    questions = f"these {asked}"
    return {
        "metric": metric,
        "max_drop": wanted.max_drop,
        "n": figure["n"],
        "images": figure["images"],
        "unpruned": {name: figure[name] for name in ("value", "low", "high")},
        "sentence": sentence(found, chosen, wanted.max_drop, metric),
        "doubts": [
            *_warnings(accuracy, "loud"),
            *doubts(found, chosen, wanted.max_drop, questions),
        ],
        "python": [] if chosen is None else lines(chosen, wanted.checkpoint, text_tower),
        "rows": facts_of(found, front(found), chosen),
    }


def _warnings(accuracy: Mapping[str, Any], level: str) -> list[str]:
    return [one["text"] for one in accuracy["warnings"] if one["level"] == level]


def _speed(
    subject: Subject,
    wanted: Wanted,
    specs: Sequence[str],
    counts: Sequence[int],
    usual: Typical,
    folder: Path,
    command: str,
) -> dict[str, Any]:
    plan = Plan(
        pruners=specs,
        num_keep=counts,
        cells=[usual.cell(wanted.bench_batch_size)],
        new_tokens=_NEW_TOKENS,
        warmup=wanted.warmup,
        repetitions=wanted.repetitions,
        image_size=usual.image_size,
        checkpoint=wanted.checkpoint,
        skip_unfit=True,
    )
    return bench(subject, plan, folder, command)


def _accuracy(
    subject: Subject,
    task: Task,
    wanted: Wanted,
    counts: Sequence[int],
    folder: Path,
    command: str,
) -> dict[str, Any]:
    report, records = evaluate(
        subject,
        task,
        wanted.specs,
        [Budget(num_keep=count) for count in counts],
        folder,
        checkpoints=[] if wanted.checkpoint is None else [wanted.checkpoint],
        seeds=range(wanted.seeds),
        batch_size=wanted.batch_size,
        controls=CONTROLS,
        skip_unfit=wanted.skip_unfit or not wanted.pruners,
        command=command or None,
    )
    accuracy_report.write(report, folder, answers_of(task, records))
    return accuracy_report.results(report)


def _asked(
    accuracy: Mapping[str, Any], specs: Sequence[str], counts: Sequence[int]
) -> dict[str, Any]:
    """The accuracy of what was asked for; a folder may hold rows of other runs."""
    budgets = (None, *counts)
    known = {UNPRUNED, *specs}
    rows = [r for r in accuracy["rows"] if r["label"] in known and r["num_keep"] in budgets]
    return {**accuracy, "rows": rows}


def _that_run(subject: Subject, specs: Sequence[str], accuracy: Mapping[str, Any]) -> list[str]:
    """The specs that have a figure at any budget."""
    known = {row["label"] for row in accuracy["rows"] if row["figures"]}
    if found := [spec for spec in dict.fromkeys(specs) if spec in known]:
        return found
    why = {row["label"]: row["note"] for row in accuracy["rows"] if row["note"]}
    raise ValueError(
        f"none of these pruners can run on {subject.name}; see"
        f" `{typed('list', '--model', subject.name)}`:"
        + "".join(f"\n  {label}: {text}" for label, text in why.items())
    )


def _names(specs: Sequence[str], counts: Sequence[int]) -> set[str]:
    """What pruners at these budgets are called among the times."""
    return {*specs, *(f"{spec} K={count}" for spec in specs for count in counts)}


def _left_out(
    accuracy: Mapping[str, Any], cell: Mapping[str, Any], asked: Set[str]
) -> dict[str, str]:
    """Why pruners have no row, by what they are called; budgets of one reason side by side.

    Args:
        accuracy: of the pruners and budgets that were asked for.
        cell: of times. asked: names there of these pruners at these budgets.
    """
    unanswered = [row for row in accuracy["rows"] if row["note"] and not row["figures"]]
    groups: dict[tuple[str, str], list[int | None]] = {}
    for row in unanswered:
        if not row["control"]:
            groups.setdefault((row["label"], row["note"]), []).append(row["num_keep"])
    found = {}
    for (label, why), counts in groups.items():
        some = ", ".join(str(count) for count in counts if count is not None)
        found[f"{label} at K={some}" if some else label] = why
    known = {f"{row['label']} K={row['num_keep']}" for row in unanswered}
    untimed = {name: cell["unfit"][name] for name in cell["unfit"] if name in asked - known}
    return {**found, **untimed}
