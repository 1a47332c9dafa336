"""Figures without right answers: how often a pruned model says what the whole model says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ocvtp.evaluation.tasks.answers import normalise_vqa
from ocvtp.evaluation.tasks.base import Item, Ratio, Record, Task, TokenTask, shares

AGREEMENT = "agreement"
REMARK = (
    "figures are agreement with the unpruned model, right or wrong: what it says to every question"
    " counts as the answer."
)


def agreement(
    items: Sequence[Item], records: Sequence[Record], unpruned: Sequence[Record]
) -> dict[str, Ratio]:
    """Which answers are those of the unpruned model, both in VQA's normal form.

    Args:
        items: of the task. records: of all items. unpruned: the same under the unpruned model.

    Returns:
        `all/agreement` and, where items have kinds, `KIND/agreement`.
    """
    pairs = zip(records, unpruned, strict=True)
    same = [normalise_vqa(a["answer"]) == normalise_vqa(b["answer"]) for a, b in pairs]
    return {f"{group}/{AGREEMENT}": ratio for group, ratio in shares(items, same).items()}


class Agreement(Task):
    """Any task of questions, by agreement with the unpruned model in place of its right answers.

    Args:
        asked: the task.

    Raises:
        ValueError: if it asks nothing.
    """

    def __init__(self, asked: Task) -> None:
        if isinstance(asked, TokenTask):
            raise ValueError(
                f"task {asked.name!r} asks the model nothing that it could agree on; pass one of"
                f" its own metrics: {', '.join(asked.metrics)}."
            )
        self._asked = asked
        self.items, self.metrics = asked.items, (f"all/{AGREEMENT}",)
        self.remarks = (REMARK,)
        for name in ("name", "max_new_tokens", "counts", "keeps_cache"):
            setattr(self, name, getattr(asked, name))

    def shown(self, owner: int) -> tuple[int, ...]:
        return self._asked.shown(owner)

    def image(self, owner: int) -> Image.Image:
        return self._asked.image(owner)

    def masks(self, owner: int) -> NDArray[np.bool_] | None:
        return self._asked.masks(owner)

    def ratios(self, records: Sequence[Record]) -> dict[str, Ratio]:
        return self.compared(records, records)

    def compared(self, records: Sequence[Record], unpruned: Sequence[Record]) -> dict[str, Ratio]:
        return agreement(self.items, records, unpruned)

    def describe(self) -> dict[str, Any]:
        return self._asked.describe()
