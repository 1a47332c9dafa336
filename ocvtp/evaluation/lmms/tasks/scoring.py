"""What the tasks of this folder do with rows and answers, by this package's own parsers.

A row is `{"image": PATH, "question": TEXT, "answers": [TEXT, ...], "kind": TEXT}`; `kind` may be
missing. Each answer becomes a record; a figure is made of all records, as in `ocvtp evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ocvtp.evaluation.tasks.answers import exact_yes_no, pope_yes_no, vqa_accuracy, vqa_exact
from ocvtp.evaluation.tasks.base import Item
from ocvtp.evaluation.tasks.pope import pope_ratios
from ocvtp.images import open_image

Row = Mapping[str, Any]
Result = Mapping[str, Any]


def checked(rows: Any) -> Any:
    """The rows, if each has an image, a question and answers.

    Raises:
        ValueError: that names the first that does not.
    """
    for number, row in enumerate(rows):
        answers = row.get("answers")
        texts = [row.get("image"), row.get("question"), *(answers or [None])]
        if not isinstance(answers, list) or not all(isinstance(t, str) and t for t in texts):
            raise ValueError(
                f"row {number} of the task is {dict(row)}; give each an 'image' (a path), a"
                " 'question' and 'answers', a list of texts."
            )
    return rows


def checked_yes_no(rows: Any) -> Any:
    """The same, for questions whose answer is yes or no."""
    for number, row in enumerate(checked(rows)):
        if row["answers"] not in (["yes"], ["no"]):
            raise ValueError(
                f"row {number} of the task has answers={row['answers']}; POPE has yes or no alone."
            )
    return rows


def images(row: Row) -> list[Image.Image]:
    """The image of a row; a relative path starts in the working directory."""
    return [open_image(row["image"])]


def pope_records(row: Row, results: Sequence[str]) -> dict[str, Result]:
    """One record for all of POPE's figures, and one for the accuracy of its split."""
    right = float(pope_yes_no(results[0]) == row["answers"][0])
    exact = float(exact_yes_no(results[0]) == row["answers"][0])
    record = _record(row, results)
    found = {name: record for name in ("precision", "recall", "f1", "yes_ratio")}
    found |= {"accuracy": record | {"score": right}, "exact": record | {"score": exact}}
    return found | _of_kind(row, found["accuracy"])


def vqa_records(row: Row, results: Sequence[str]) -> dict[str, Result]:
    """One record for the soft accuracy, one for exact match."""
    record = _record(row, results)
    return {
        "accuracy": record | {"score": vqa_accuracy(results[0], row["answers"])},
        "exact": record | {"score": float(vqa_exact(results[0], row["answers"]))},
    }


def scene_records(row: Row, results: Sequence[str]) -> dict[str, Result]:
    """One record for all questions, and one for those of the scene's level."""
    record = _record(row, results) | {"score": float(results[0].strip() in row["answers"])}
    return {"accuracy": record} | _of_kind(row, record)


def score(records: Sequence[Result]) -> float:
    """The share of what is right."""
    return float(np.mean([record["score"] for record in records]))


def _pope_figure(name: str) -> Callable[[Sequence[Result]], float]:
    """One of `pope_ratios`, from records."""

    def figure(records: Sequence[Result]) -> float:
        items = [Item("", 0, r["question"], tuple(r["answers"])) for r in records]
        return pope_ratios(items, [record["said"] for record in records])[f"all/{name}"].value

    return figure


pope_precision = _pope_figure("precision")
pope_recall = _pope_figure("recall")
pope_f1 = _pope_figure("f1")
pope_yes_ratio = _pope_figure("yes_ratio")


def _record(row: Row, results: Sequence[str]) -> dict[str, Any]:
    return {
        "image": row["image"],
        "question": row["question"],
        "answers": list(row["answers"]),
        "said": results[0],
    }


def _of_kind(row: Row, record: Result) -> dict[str, Result]:
    """A record under the first word of the row's kind: POPE's split, the level of a scene."""
    group = (row.get("kind") or "").partition("/")[0]
    return {group: record} if group else {}
