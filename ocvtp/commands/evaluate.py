"""`ocvtp evaluate`: accuracy against budget, of any pruners on any task."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from ocvtp.commands import options, output
from ocvtp.commands.tasks import make_task, task_settings
from ocvtp.evaluation.conditions import check_specs
from ocvtp.evaluation.judged import Judged
from ocvtp.evaluation.labels import CONTROLS
from ocvtp.evaluation.report import results, short_table, write
from ocvtp.evaluation.run import answers_of, evaluate
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.scores import SCORES
from ocvtp.evaluation.tasks.base import Supplied
from ocvtp.evaluation.tasks.registry import task_class
from ocvtp.hosts.loading import check_model, load_model, load_processor
from ocvtp.pruners.budgets import budgets_of
from ocvtp.reporting.folder_lock import claimed


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, write and print."""
    folder = output.folder(arguments.output or f"outputs/evaluate/{arguments.task}")
    with claimed(folder, "ocvtp evaluate"):
        return _run(arguments, folder)


def _run(arguments: argparse.Namespace, folder: Path) -> int:
    if arguments.seeds < 1 or arguments.batch_size < 1:
        raise ValueError("--seeds and --batch-size count something; pass at least 1.")
    budgets = budgets_of(arguments.num_keep, arguments.keep_ratio)
    controls = () if arguments.no_controls else CONTROLS
    pruners = check_specs(arguments.pruners, budgets, arguments.checkpoint, controls=bool(controls))
    options.check_tower(arguments)
    settings = task_settings(arguments)
    subject: Judged
    if arguments.tower is not None:
        from ocvtp.evaluation.towers import TowerSubject, refuse_questions

        refuse_questions(task_class(arguments.task))
        task = make_task(Supplied(arguments.task, folder, None), settings)
        subject = TowerSubject(**options.tower_settings(arguments))
    else:
        place = (arguments.model, arguments.dtype, arguments.device)
        check_model(*place, () if arguments.skip_unfit else pruners, arguments.text_tower)
        supplied = Supplied(arguments.task, folder, partial(load_processor, arguments.model))
        task = make_task(supplied, settings)
        subject = Subject(*load_model(*place), arguments.model, arguments.text_tower)
    report, records = evaluate(
        subject,
        task,
        arguments.pruners,
        budgets,
        folder,
        checkpoints=arguments.checkpoint,
        seeds=range(arguments.seeds),
        batch_size=arguments.batch_size,
        controls=controls,
        skip_unfit=arguments.skip_unfit,
        positions=arguments.positions or (),
        command=output.command(arguments),
    )
    paths = write(report, folder, answers_of(task, records))
    found = results(report)
    said = [*found["remarks"], *(warning["text"] for warning in found["warnings"])]
    warnings = "".join(f"{text}\n" for text in said)
    wrote = ", ".join(str(path) for path in paths)
    told = {name: value for name, value in found.items() if name != SCORES}
    output.emit(told, f"{warnings}{short_table(report)}\nwrote {wrote}", arguments.json)
    return 0
