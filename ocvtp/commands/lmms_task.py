"""`ocvtp lmms-task`: a task of `ocvtp evaluate`, written for lmms-eval."""

from __future__ import annotations

import argparse

from ocvtp.commands import output
from ocvtp.commands.tasks import make_task, task_settings
from ocvtp.evaluation.lmms.export import export_task
from ocvtp.evaluation.tasks.base import Supplied
from ocvtp.hosts.loading import load_model


def run(arguments: argparse.Namespace) -> int:
    """Write the task and say how to run it."""
    folder, model = output.folder(arguments.output), arguments.model
    supplied = Supplied(arguments.task, folder, model and (lambda: load_model(model)[1]))
    task = make_task(supplied, task_settings(arguments))
    path = export_task(task, folder)
    facts = {"task": path.stem, "yaml": str(path), "questions": len(task.items)}
    text = (
        f"wrote {len(task.items)} questions to {folder}; run them with\n  lmms-eval --model ocvtp"
        f" --model_args pretrained={model or 'MODEL'},pruner=PRUNER,num_keep=K"
        f" --include_path {folder} --tasks {path.stem} --batch_size 4"
    )
    output.emit(facts, text, arguments.json)
    return 0
