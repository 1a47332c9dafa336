"""`ocvtp recommend`: one pruner at one budget for a model and a task, from accuracy and time."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from ocvtp.commands import options, output
from ocvtp.commands.tasks import make_task, task_settings
from ocvtp.evaluation.conditions import check_specs
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.tasks.agreement import AGREEMENT, Agreement
from ocvtp.evaluation.tasks.base import Supplied
from ocvtp.hosts.loading import check_model, load_model, load_processor
from ocvtp.pruners.budgets import budgets_of
from ocvtp.recommend.choice import refuse_unknown
from ocvtp.recommend.report import short, write
from ocvtp.recommend.run import ACCURACY, SHARES, SPEED, Wanted, recommend
from ocvtp.reporting.folder_lock import claimed


def run(arguments: argparse.Namespace) -> int:
    """Measure, choose, write and print."""
    folder = output.folder(arguments.output or f"outputs/recommend/{arguments.task}")
    with ExitStack() as claims:
        for place in (folder, folder / ACCURACY, folder / SPEED):  # others may write to one alone
            claims.enter_context(claimed(place, "ocvtp recommend"))
        return _run(arguments, folder)


def _run(arguments: argparse.Namespace, folder: Path) -> int:
    options.check_counts(arguments, "seeds", "batch_size", "bench_batch_size", "num_keep")
    by_agreement = arguments.metric == AGREEMENT
    wanted = Wanted(
        pruners=arguments.pruners,
        num_keep=arguments.num_keep or (),
        shares=arguments.keep_ratio or (),
        max_drop=arguments.max_drop,
        metric=None if by_agreement else arguments.metric,
        checkpoint=arguments.checkpoint,
        seeds=arguments.seeds,
        batch_size=arguments.batch_size,
        bench_batch_size=arguments.bench_batch_size,
        warmup=arguments.warmup,
        repetitions=arguments.repetitions,
        skip_unfit=arguments.skip_unfit,
    )
    named = budgets_of(wanted.num_keep, wanted.shares)
    checkpoints = [] if wanted.checkpoint is None else [wanted.checkpoint]
    pruners = check_specs(
        wanted.specs, named or budgets_of((), SHARES), checkpoints, given=bool(named)
    )
    place, text_tower = (arguments.model, arguments.dtype, arguments.device), arguments.text_tower
    leaves_out = wanted.skip_unfit or not wanted.pruners
    check_model(*place, () if leaves_out else pruners, text_tower)
    supplied = Supplied(arguments.task, folder, partial(load_processor, arguments.model))
    task = make_task(supplied, task_settings(arguments))
    if by_agreement:
        task = Agreement(task)
    elif wanted.metric is not None:
        refuse_unknown(wanted.metric, task)
    subject = Subject(*load_model(*place), arguments.model, text_tower)
    found = recommend(subject, task, wanted, folder, output.command(arguments))
    wrote = ", ".join(str(path) for path in write(found, folder))
    remarks = "".join(f"{text}\n" for text in found["remarks"])
    output.emit(found, f"{remarks}{short(found)}\n\nwrote {wrote}", arguments.json)
    return 0
