"""Any task of this package as one of lmms-eval: a YAML file, its rows and its images."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import yaml

from ocvtp.evaluation.tasks.base import Task
from ocvtp.images import encoded
from ocvtp.reporting.files import replacing, write_whole

_ROWS = "questions.jsonl"


def shipped_tasks() -> list[str]:
    """What scores answers in lmms-eval, by `Task.lmms`: a YAML file each."""
    folder = files("ocvtp.evaluation.lmms").joinpath("tasks")
    names = (Path(entry.name) for entry in folder.iterdir())
    return sorted(
        name.stem.removeprefix("ocvtp_").removesuffix("_local")
        for name in names
        if name.suffix == ".yaml"
    )


def export_task(task: Task, folder: str | Path) -> Path:
    """Write a task for `lmms-eval --include_path FOLDER --tasks ocvtp_NAME_local`.

    The folder gets the images as PNG, `questions.jsonl` with their absolute paths, and the YAML
    file; what is there is written over. Questions, their order and the length of answers are those
    of `ocvtp evaluate`.

    Args:
        task: one of which `lmms` says who scores it.
        folder: made where absent.

    Returns:
        the YAML file.

    Raises:
        ValueError: if lmms-eval has no such task, or its questions have no answers.
    """
    if task.lmms not in shipped_tasks():
        raise ValueError(
            f"task {task.name!r} is none that lmms-eval can ask; pass one of"
            f" {', '.join(shipped_tasks())}."
        )
    if not all(item.answers for item in task.items):
        raise ValueError(
            f"task {task.name!r} has questions without right answers, which lmms-eval scores by;"
            " add them, or ask with `ocvtp evaluate`, which judges by agreement with the unpruned"
            " model."
        )
    folder = Path(folder).absolute()
    images: dict[int, str] = {}
    for owner in dict.fromkeys(item.owner for item in task.items):
        path = folder / "images" / f"{owner:06}.png"
        write_whole(path, encoded(task.image(owner), "PNG"))
        images[owner] = str(path)
    rows = [
        {
            "image": images[item.owner],
            "question": item.question,
            "answers": list(item.answers),
            "kind": item.kind,
        }
        for item in task.items
    ]
    with replacing(folder / _ROWS) as temporary:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")
    name = f"ocvtp_{task.name}_local"
    shipped = Path(str(files("ocvtp.evaluation.lmms"))) / "tasks" / f"ocvtp_{task.lmms}_local.yaml"
    config = {
        "include": str(shipped),
        "task": name,
        "dataset_kwargs": {"data_files": {"test": _ROWS}},
    }
    if task.name != task.lmms:  # whose own length of answers is in that file
        length = {"max_new_tokens": task.max_new_tokens, "do_sample": False}
        config["generation_kwargs"] = length
    with replacing(folder / f"{name}.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return folder / f"{name}.yaml"
