"""`ocvtp lmms-task`: a task of `ocvtp evaluate`, written for lmms-eval."""

from __future__ import annotations

import argparse

from ocvtp.commands import evaluate, output
from ocvtp.evaluation.lmms.export import export_task
from ocvtp.hosts.loading import load_model


def run(arguments: argparse.Namespace) -> int:
    """Write the task and say how to run it."""
    folder, processor = output.folder(arguments.output), None
    if arguments.task == "scenes":
        if arguments.model is None:
            raise ValueError("--task scenes needs --model; pass the VLM whose image size to draw.")
        _, processor = load_model(arguments.model)
    task = evaluate.TASKS[arguments.task](arguments, processor, folder)
    path = export_task(task, folder)
    facts = {"task": path.stem, "yaml": str(path), "questions": len(task.items)}
    text = (
        f"wrote {len(task.items)} questions to {folder}; run them with\n  lmms-eval --model ocvtp"
        f" --model_args pretrained={arguments.model or 'MODEL'},pruner=PRUNER,num_keep=K"
        f" --include_path {folder} --tasks {path.stem} --batch_size 4"
    )
    output.emit(facts, text, arguments.json)
    return 0
