"""Open questions about images, from a plain list: VQA's soft accuracy, and exact match."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from ocvtp.evaluation.tasks.agreement import AGREEMENT, REMARK, agreement
from ocvtp.evaluation.tasks.answers import vqa_accuracy, vqa_exact
from ocvtp.evaluation.tasks.base import Item, Ratio, Record, Supplied, shares
from ocvtp.evaluation.tasks.question_files import (
    Asked,
    Entry,
    Folders,
    ListedTask,
    read_entries,
)
from ocvtp.evaluation.tasks.registry import register_task


@register_task("vqa")
class VqaTask(ListedTask):
    """A list of `{"image": .., "question": .., "answers": [..]}`, or of `"answer": ".."`.

    An optional `"kind"` groups questions. Figures are `all/accuracy`, the soft accuracy of VQA v2
    (`answers.vqa_accuracy`), `all/exact`, whether the answer is any of the right ones, and the same
    of every kind. A list in which no entry has answers is judged by agreement with the unpruned
    model, `all/agreement`.

    Args:
        file: a JSON list, or JSON lines.
        images: folder or folders of the images; None for the folder of the file.
        suffix: put after every question; LLaVA's own evaluation has a new line and "Answer the
            question using a single word or phrase.".
        limit: use only the first `limit` images.
        outside: whether images may lie outside of the folders, see `ListedTask`.

    Raises:
        ValueError: if the file or an image is missing, or an entry lacks a key.
    """

    lmms: ClassVar[str] = "vqa"

    def __init__(
        self,
        file: str | Path,
        images: Folders | None = None,
        suffix: str = "",
        limit: int | None = None,
        outside: bool = False,
    ) -> None:
        entries = read_entries(file)
        asked = [_asked(entry, n) for n, entry in enumerate(entries, start=1)]
        _refuse_mixed(entries, asked)
        folders = Path(file).parent if images is None else images
        super().__init__(asked, folders, suffix, limit, outside)
        self.metrics = ("all/accuracy",)
        self._answered = any(item.answers for item in self.items)
        if not self._answered:
            self.metrics, self.remarks = (f"all/{AGREEMENT}",), (REMARK,)

    @classmethod
    def from_command(
        cls,
        supplied: Supplied,
        *,
        questions_file: Annotated[
            Sequence[str],
            "a JSON list of {image, question, answers}; without any answers, figures are agreement"
            " with the unpruned model",
        ],
        images: Annotated[Sequence[str] | None, "folders of the images"] = None,
        suffix: Annotated[str, "put after every question"] = "",
        num_images: Annotated[int | None, "the first ones (default: all)"] = None,
        outside: Annotated[bool, "names and links may lead out of --images"] = False,
    ) -> VqaTask:
        del supplied
        if len(questions_file) != 1:
            given = " ".join(questions_file)
            raise ValueError(f"--questions-file {given}: vqa reads one file; pass one.")
        return cls(questions_file[0], images, suffix, num_images, outside)

    def ratios(self, records: Sequence[Record]) -> dict[str, Ratio]:
        if not self._answered:
            raise ValueError(
                "these questions have no right answers; call `compared` with what the unpruned"
                " model says to them."
            )
        return vqa_ratios(self.items, self.answers(records))

    def compared(self, records: Sequence[Record], unpruned: Sequence[Record]) -> dict[str, Ratio]:
        if not self._answered:
            return agreement(self.items, records, unpruned)
        return self.ratios(records)


def vqa_ratios(items: Sequence[Item], answers: Sequence[str]) -> dict[str, Ratio]:
    """The figures of answers to items, one answer each.

    Returns:
        `all/accuracy`, `all/exact` and, where items have kinds, `KIND/accuracy`, `KIND/exact`.
    """
    pairs = list(zip(items, answers, strict=True))
    soft = shares(items, [vqa_accuracy(said, item.answers) for item, said in pairs])
    exact = shares(items, [vqa_exact(said, item.answers) for item, said in pairs])
    return {f"{group}/accuracy": ratio for group, ratio in soft.items()} | {
        f"{group}/exact": ratio for group, ratio in exact.items()
    }


def _refuse_mixed(entries: Sequence[Entry], asked: Sequence[Asked]) -> None:
    """Refuse a list of which some entries have answers alone."""
    lacking = [entry for entry, one in zip(entries, asked, strict=True) if not one.answers]
    if 0 < len(lacking) < len(asked):
        have = f"{len(asked) - len(lacking)} of {len(asked)} entries"
        raise ValueError(
            f"{lacking[0].where} lacks 'answers' (or 'answer'), which {have} have; add what is"
            " right, or leave all answers out to judge by agreement with the unpruned model."
        )


def _asked(entry: Entry, number: int) -> Asked:
    if "answers" in entry.content:
        answers = entry.content["answers"]
        if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
            raise ValueError(f"{entry.where} has {answers!r} as 'answers'; pass a list of texts.")
        if not answers:
            raise ValueError(f"{entry.where} has no 'answers'; pass at least one.")
    elif "answer" in entry.content:
        answers = [entry.text("answer")]
    else:
        answers = []
    kind = entry.text("kind") if "kind" in entry.content else ""
    if kind.split("/")[-1] == "all":
        raise ValueError(f"{entry.where} has the kind {kind!r}; 'all' is the sum: rename it.")
    question, image = entry.text("question"), entry.text("image")
    return Asked(str(number), image, question, tuple(answers), kind)
