"""`ocvtp lmms-task`: a task of `ocvtp evaluate`, written for lmms-eval."""

from __future__ import annotations

import argparse
import shlex

from ocvtp.commands import output
from ocvtp.commands.tasks import make_task, task_settings
from ocvtp.evaluation.lmms.export import export_task
from ocvtp.evaluation.tasks.base import Supplied
from ocvtp.hosts.loading import load_processor


def run(arguments: argparse.Namespace) -> int:
    """Write the task and say how to run it."""
    folder, model = output.folder(arguments.output), arguments.model
    supplied = Supplied(arguments.task, folder, model and (lambda: load_processor(model)))
    task = make_task(supplied, task_settings(arguments))
    path = export_task(task, folder)
    facts = {"task": path.stem, "yaml": str(path), "questions": len(task.items)}
    words = ["lmms-eval", "--model", "ocvtp", "--include_path", str(folder), "--tasks", path.stem]
    words += ["--model_args", f"pretrained={model or 'MODEL'},pruner=PRUNER,num_keep=K"]
    again = shlex.join([*words, "--batch_size", "4"])
    text = f"wrote {len(task.items)} questions to {folder}; run them with\n  {again}"
    output.emit(facts, text, arguments.json)
    return 0
