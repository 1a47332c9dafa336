"""What pruned models are asked, and how their answers count."""

from typing import TYPE_CHECKING

from ocvtp.lazy import lazy_names

if TYPE_CHECKING:
    from ocvtp.evaluation.tasks.base import (
        Item,
        PlaceTask,
        Ratio,
        Record,
        Task,
        TokenTask,
        shares,
    )
    from ocvtp.evaluation.tasks.registry import build_task, list_tasks, register_task, task_class

__all__ = [
    "Item",
    "PlaceTask",
    "Ratio",
    "Record",
    "Task",
    "TokenTask",
    "build_task",
    "list_tasks",
    "register_task",
    "shares",
    "task_class",
]

_BASE = ("Item", "PlaceTask", "Ratio", "Record", "Task", "TokenTask", "shares")

__getattr__, __dir__ = lazy_names(
    __name__, {name: "base" if name in _BASE else "registry" for name in __all__}
)
