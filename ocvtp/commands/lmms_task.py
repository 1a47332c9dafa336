"""`ocvtp lmms-task`: a task of `ocvtp evaluate`, written for lmms-eval."""

from __future__ import annotations

import argparse

from ocvtp.commands import evaluate, output
from ocvtp.evaluation.lmms_export import export_task, shipped_tasks
from ocvtp.hosts.loading import load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.add_argument("--task", required=True, choices=shipped_tasks(), help="what is asked")
    parser.add_argument(
        "--model", help="folder or hub id of a VLM, for scenes: they are drawn in its size"
    )
    parser.add_argument("--output", required=True, help="folder to write; lmms-eval's include_path")
    evaluate.add_task(parser)
    output.add_json(parser)


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
