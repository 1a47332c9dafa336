"""The contract of what pruners are judged on: a model that is asked, or a vision tower alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ocvtp.choices import Positions
from ocvtp.evaluation.downsample import Sizer
from ocvtp.evaluation.tasks.base import Item, Record, Task
from ocvtp.pruners import Compose, Pruner


class Judged(ABC):
    """What pruners are judged on.

    Attributes:
        name: folder or id.
    """

    name: str

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it is."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of its weights."""

    @property
    @abstractmethod
    def num_tower_blocks(self) -> int:
        """Blocks of the vision tower."""

    @property
    def sizer(self) -> Sizer | None:
        """What finds the sizes of images that give fewer tokens; None where all have one size."""
        return None

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What all figures depend on besides the task, as JSON."""

    def check(self, task: Task) -> None:
        """Refuse a task that it cannot be judged by.

        Raises:
            ValueError: that names the alternative.
        """
        del task

    @abstractmethod
    def shape(self, task: Task) -> tuple[int, tuple[int, int]]:
        """Visual tokens of the first image, and their grid (of a view, where it is tiles)."""

    @abstractmethod
    def width(self, task: Task, layer: int) -> int:
        """Numbers of a token in a layer of the tower's `hidden_states`."""

    @abstractmethod
    def seen(self, task: Task, owner: int) -> NDArray[np.bool_]:
        """[O, H, W] the objects of an image whose masks are known, in the picture of the tower."""

    @abstractmethod
    def inputs(self, task: Task, items: Sequence[Item], owners: Sequence[int]) -> Any:
        """What is made of items on the images of `owners` before it runs, once for all pruners."""

    @abstractmethod
    def sharing(self, pruners: Sequence[Pruner | Compose]) -> Any:
        """What keeps the images of the last inputs encoded, for all of these pruners."""

    def note(self, pruner: Pruner | Compose) -> str:
        """What a reader must know of the figures of a pruner that can run."""
        del pruner
        return ""

    @abstractmethod
    def attempt(self, pruner: Pruner | Compose, inputs: Any, shared: Any) -> None:
        """Run a pruner once.

        Args:
            pruner: any. inputs: see there. shared: see `sharing`.

        Raises:
            ValueError: if it cannot run.
        """

    @abstractmethod
    def observe(
        self,
        task: Task,
        items: Sequence[Item],
        pruner: Pruner | Compose,
        inputs: Any,
        shared: Any,
        positions: Positions | None = None,
    ) -> list[Record]:
        """What comes of items under a pruner.

        Args:
            task: of the items. pruner: that can run. inputs: of the items. shared: see `sharing`.
            positions: of the tokens that are left, see `ocvtp.attach`.

        Returns:
            of each `answer`, or what the task finds; and `given` and `kept`, visual tokens of its
            image before and after, the latter on average over the layers of the language model.
        """
