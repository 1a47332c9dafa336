"""The task `composites`: questions about a drawn test set that lies in a folder.

`ocvtp --import tools/photo_vlm/task.py evaluate --task composites --composites FOLDER ...`
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray

from ocvtp.evaluation.tasks import Ratio, Record, register_task, shares
from ocvtp.evaluation.tasks.coco_instances import CocoInstances
from ocvtp.evaluation.tasks.question_files import Asked, Entry, ListedTask, read_entries

IMAGES = "test2017"
INSTANCES = "annotations/instances_test2017.json"
QUESTIONS = "questions.jsonl"


@register_task("composites")
class CompositeTask(ListedTask):
    """Existence, number, comparison and relation of pasted objects; the answer is one word.

    Args:
        composites: folder that `python -m tools.photo_vlm` has drawn: `test2017`,
            `annotations/instances_test2017.json` and `questions.jsonl`.
        num_images: the first ones; None for all.
        questions: on each image, at most; None for all.

    Raises:
        ValueError: if a file is missing or broken, or a number is below 1.
    """

    max_new_tokens: ClassVar[int] = 4

    def __init__(
        self,
        composites: Annotated[str, "folder of the drawn test set"],
        num_images: Annotated[int | None, "the first ones (default: all)"] = None,
        questions: Annotated[int | None, "on each image, at most (default: all)"] = None,
    ) -> None:
        if questions is not None and questions < 1:
            raise ValueError(f"questions={questions} asks nothing; pass at least 1, or None.")
        root, asked = Path(composites), []
        times: dict[str, int] = {}
        for entry in read_entries(root / QUESTIONS):
            image = entry.text("image")
            times[image] = times.get(image, 0) + 1
            if questions is None or times[image] <= questions:
                asked.append(_asked(entry, image, times[image]))
        super().__init__(asked, root / IMAGES, limit=num_images)
        self._instances = CocoInstances(root / INSTANCES)
        if unknown := [n for n in self.image_names if not self._instances.knows_masks(n)]:
            raise ValueError(
                f"{root / INSTANCES} has no masks of {unknown[0]}; draw the set again."
            )
        kinds = dict.fromkeys(item.kind for item in self.items)
        self.metrics = ("all", *kinds)

    def ratios(self, records: Sequence[Record]) -> dict[str, Ratio]:
        pairs = zip(self.items, self.answers(records), strict=True)
        return shares(self.items, [answer.strip() in item.answers for item, answer in pairs])

    def masks(self, owner: int) -> NDArray[np.bool_]:
        return self._instances.masks(self.image_names[owner], self.image(owner).size)


def _asked(entry: Entry, image: str, number: int) -> Asked:
    question, answer, kind = (entry.text(key) for key in ("text", "answer", "kind"))
    return Asked(f"{Path(image).stem}/{number}", image, question, (answer,), kind)
