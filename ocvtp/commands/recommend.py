"""`ocvtp recommend`: one pruner at one budget for a model and a task, from accuracy and time."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

from ocvtp.commands import options, output
from ocvtp.commands.tasks import make_task, task_settings
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.tasks.agreement import AGREEMENT, Agreement
from ocvtp.evaluation.tasks.base import Supplied
from ocvtp.hosts.loading import load_model
from ocvtp.pruners.specs import known_settings
from ocvtp.recommend.choice import refuse_unknown
from ocvtp.recommend.report import short, write
from ocvtp.recommend.run import ACCURACY, SPEED, Wanted, recommend
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
    for spec in wanted.specs:
        known_settings(spec)  # refuses what is unknown before anything is loaded
    settings = task_settings(arguments)
    loaded = cache(partial(load_model, arguments.model, arguments.dtype, arguments.device))
    task = make_task(Supplied(arguments.task, folder, lambda: loaded()[1]), settings)
    if by_agreement:
        task = Agreement(task)
    elif wanted.metric is not None:
        refuse_unknown(wanted.metric, task)
    subject = Subject(*loaded(), arguments.model, arguments.text_tower)
    found = recommend(subject, task, wanted, folder, output.command(arguments))
    wrote = ", ".join(str(path) for path in write(found, folder))
    remarks = "".join(f"{text}\n" for text in found["remarks"])
    output.emit(found, f"{remarks}{short(found)}\n\nwrote {wrote}", arguments.json)
    return 0
