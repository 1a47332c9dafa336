"""The contract of a task: images, what is asked about them, and how answers become figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Record = Mapping[str, Any]
"""What is kept of one item under one condition: JSON, e.g. `{"answer": "yes"}`."""
_V = TypeVar("_V")


@dataclass(frozen=True)
class Item:
    """One question about one image.

    Args:
        key: names it within its task, e.g. `easy/17/3`.
        owner: number of its image within the task, from 0.
        question: plain text, without the model's chat template.
        answers: what is right; the first is the one to show.
        kind: of question, e.g. `existence`; items of a kind are counted together.
        before: what was said on the image before: a question, its answer, and so on.
    """

    key: str
    owner: int
    question: str
    answers: tuple[str, ...]
    kind: str = ""
    before: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Ratio:
    """A share, sum(hits) / sum(of), of n items on some images.

    Accuracy has hits 0 or 1 and `of` 1; precision, recall, F1 and coverage are shares too.

    Args:
        hits: [n] float. of: [n] float, not negative. owners: [n] int, number of each item's image:
            intervals draw whole images.
    """

    hits: NDArray[np.float64]
    of: NDArray[np.float64]
    owners: NDArray[np.int64]

    @property
    def value(self) -> float:
        """The share; nan where nothing counts."""
        total = float(self.of.sum())
        return float(self.hits.sum()) / total if total else float("nan")


@dataclass(frozen=True)
class Supplied:
    """What a command supplies to a task, beside the values of its flags.

    Args:
        task: its name.
        folder: that results are written to.
        load: makes the model's processor; None where no model was named.
    """

    task: str
    folder: Path
    load: Callable[[], Any] | None = None

    def processor(self, what: str) -> Any:
        """The model's processor.

        Args:
            what: to pass where no model was named, e.g. `the VLM whose image size to draw`.

        Raises:
            ValueError: if none was.
        """
        return self.given("model", self.load, what)()

    def given(self, flag: str, value: _V | None, what: str) -> _V:
        """The value of a flag that is needed.

        Args:
            flag: without its dashes.
            value: None, or an empty one, where the flag was not given.
            what: to pass.

        Raises:
            ValueError: if it was not.
        """
        if not value:
            flag = "--" + flag.replace("_", "-")
            raise ValueError(f"--task {self.task} needs {flag}; pass {what}.")
        return value


class Task(ABC):
    """Items and their scoring. Items of one image stand side by side.

    What makes two tasks the same is in `describe()`. `register_task` makes a task known by name;
    then the parameters of its constructor are flags of `ocvtp evaluate`.
    """

    name: ClassVar[str]
    """In the registry."""
    items: Sequence[Item]
    max_new_tokens: ClassVar[int] = 16
    """Length of an answer at most."""
    percent: ClassVar[bool] = True
    """Whether figures are shown in percent."""
    metrics: Sequence[str]
    """The keys of `ratios` that plots and short tables show, one table each."""
    lower_is_better: ClassVar[Sequence[str]] = ()
    """Which of the metrics are errors."""
    not_judged: ClassVar[Sequence[str]] = ()
    """Metrics by which keeping the objects need not win."""
    counts: ClassVar[str] = "questions"
    """What items are called."""
    remarks: Sequence[str] = ()
    """What a reader of every report must know."""
    keeps_cache: bool = False
    """Whether a question with others before it is asked on the KV cache that the first of them
    filled, whose visual tokens stay; else the model reads the whole conversation again."""
    lmms: ClassVar[str | None] = None
    """Who scores the answers where lmms-eval asks: `scenes`, `pope` or `vqa`, see
    `ocvtp/evaluation/lmms/tasks`; None where it cannot ask."""

    @classmethod
    def from_command(cls, supplied: Supplied, *_: Any, **settings: Any) -> Task:
        """The task of a command line.

        A task that needs what the model or the command knows has one of its own; then its
        parameters, all named, are the flags in place of the constructor's.

        Args:
            supplied: the model's processor and the output folder.
            settings: the values of the flags that were given.
        """
        del supplied
        return cls(**settings)

    @abstractmethod
    def image(self, owner: int) -> Image.Image:
        """The RGB image of that number."""

    def shown(self, owner: int) -> tuple[int, ...]:
        """The numbers of the images that an owner's questions show together; itself, for most."""
        return (owner,)

    @abstractmethod
    def ratios(self, records: Sequence[Record]) -> dict[str, Ratio]:
        """The figures, by name, e.g. `easy/colour`, `popular/f1`.

        Args:
            records: of all `items`, in their order.
        """

    def compared(self, records: Sequence[Record], unpruned: Sequence[Record]) -> dict[str, Ratio]:
        """The figures where they depend on what the unpruned model says; `ratios`, for most.

        Args:
            records: as for `ratios`. unpruned: the same under the unpruned model.
        """
        del unpruned
        return self.ratios(records)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The settings, as JSON: two tasks of equal settings ask the same."""

    def masks(self, owner: int) -> NDArray[np.bool_] | None:
        """[O, H, W] what is visible of every object of an image; None where that is not known."""
        del owner
        return None


class TokenTask(Task):
    """A task that looks at the visual tokens of images, and needs no answers."""

    @abstractmethod
    def look(self, host: Any, prompt: Any, items: Sequence[Item]) -> Sequence[Record]:
        """The records of a batch.

        Args:
            host: `ocvtp.hosts.base.Host` of the model.
            prompt: `ocvtp.hosts.prompt.shorten.Prompt`, after the model read it; an image a row.
            items: of the rows.
        """


class PlaceTask(TokenTask):
    """A task that looks at the places that are kept: a vision tower alone can be judged by it."""

    @abstractmethod
    def judge(self, kept: Any, items: Sequence[Item]) -> Sequence[Record]:
        """The records of a batch.

        Args:
            kept: `ocvtp.evaluation.tasks.kept_tokens.KeptTokens`, an image a row.
            items: of the rows.
        """


def shares(items: Sequence[Item], right: Sequence[float]) -> dict[str, Ratio]:
    """What is right of each kind; where kinds are `GROUP/NAME`, of `GROUP/all` too; and of `all`.

    Args:
        items: of a task.
        right: of each item, 0 to 1.
    """
    hits, owners = np.asarray(right, float), np.array([item.owner for item in items])
    belongs: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        group, slash, _ = item.kind.partition("/")
        for name in filter(None, (item.kind, f"{group}/all" if slash else "", "all")):
            belongs.setdefault(name, []).append(number)
    return {
        name: Ratio(hits[numbers], np.ones(len(numbers)), owners[numbers])
        for name, numbers in belongs.items()
    }
