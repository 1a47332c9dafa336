"""`ocvtp evaluate`: accuracy against budget, of any pruners on any task."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ocvtp.choices import Task as TaskName
from ocvtp.commands import output
from ocvtp.evaluation.conditions import CONTROLS, Budget
from ocvtp.evaluation.report import results, short_table, write
from ocvtp.evaluation.run import answers_of, evaluate
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.tasks.base import Task
from ocvtp.evaluation.tasks.coverage import CoverageTask
from ocvtp.evaluation.tasks.pope import PopeTask, build_pope
from ocvtp.evaluation.tasks.scenes import SceneTask
from ocvtp.evaluation.tasks.vqa import VqaTask
from ocvtp.hosts.loading import load_model
from ocvtp.pruners.specs import known_settings


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, write and print."""
    folder = output.folder(arguments.output or f"outputs/evaluate/{arguments.task}")
    if arguments.seeds < 1 or arguments.batch_size < 1:
        raise ValueError("--seeds and --batch-size count something; pass at least 1.")
    for spec in arguments.pruners:
        known_settings(spec)  # refuses what is unknown before anything is loaded
    model, processor = load_model(arguments.model, arguments.dtype, arguments.device)
    subject = Subject(model, processor, arguments.model, arguments.text_tower)
    task = TASKS[arguments.task](arguments, processor, folder)
    budgets = [Budget(num_keep=count) for count in arguments.num_keep or ()]
    budgets += [Budget(keep_ratio=share) for share in arguments.keep_ratio or ()]
    report, records = evaluate(
        subject,
        task,
        arguments.pruners,
        budgets,
        folder,
        checkpoints=arguments.checkpoint,
        seeds=range(arguments.seeds),
        batch_size=arguments.batch_size,
        controls=() if arguments.no_controls else CONTROLS,
        skip_unfit=arguments.skip_unfit,
        command=output.command(arguments),
    )
    paths = write(report, folder, answers_of(task, records))
    found = results(report)
    said = [*found["remarks"], *(warning["text"] for warning in found["warnings"])]
    warnings = "".join(f"{text}\n" for text in said)
    wrote = ", ".join(str(path) for path in paths)
    output.emit(found, f"{warnings}{short_table(report)}\nwrote {wrote}", arguments.json)
    return 0


def _scenes(arguments: argparse.Namespace, processor: Any, folder: Path) -> Task:
    del folder
    size = getattr(processor.image_processor, "crop_size", None)
    pixels = size["height"] if size else 96
    return SceneTask(
        arguments.levels,
        arguments.split,
        1000 if arguments.num_images is None else arguments.num_images,
        arguments.questions,
        arguments.seed,
        pixels,
    )


def _pope(arguments: argparse.Namespace, processor: Any, folder: Path) -> Task:
    del processor
    files, limit = arguments.questions_file, arguments.num_images
    if files is None:
        instances = _given(arguments, "instances", "or --questions-file, POPE's own questions")
        files, limit = build_pope(instances, folder / "pope", limit, arguments.seed), None
    images = _given(arguments, "images", "the folders of the images")
    return PopeTask(files, images, arguments.suffix, arguments.instances, limit)


def _vqa(arguments: argparse.Namespace, processor: Any, folder: Path) -> Task:
    del processor, folder
    file = _given(arguments, "questions_file", "a JSON list of {image, question, answers}")
    if len(file) != 1:
        raise ValueError(f"--questions-file {' '.join(file)}: vqa reads one file; pass one.")
    return VqaTask(file[0], arguments.images, arguments.suffix, arguments.num_images)


def _coverage(arguments: argparse.Namespace, processor: Any, folder: Path) -> Task:
    del folder
    images = _given(arguments, "images", "the folder of the images")
    if len(images) != 1:
        raise ValueError(f"--images {' '.join(images)}: coverage reads one folder; pass one.")
    instances = _given(arguments, "instances", "COCO's annotations of them")
    return CoverageTask(images[0], instances, processor, limit=arguments.num_images)


TASKS: dict[TaskName, Callable[[argparse.Namespace, Any, Path], Task]] = {
    "scenes": _scenes,
    "pope": _pope,
    "vqa": _vqa,
    "coverage": _coverage,
}
"""By name: from the flags of `add_task`, the model's processor and the folder to write to."""


def _given(arguments: argparse.Namespace, name: str, what: str) -> Any:
    value = getattr(arguments, name)
    if not value:
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"--task {arguments.task} needs {flag}; pass {what}.")
    return value
