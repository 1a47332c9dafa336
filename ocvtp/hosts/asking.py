"""Questions with their answers, as a frozen language model reads them: embeddings, labels, places.

The way of a call ends before the language model; what it would read is handed on as tensors that a
gate may change, and that gradients may run through.

L columns of a prompt with its answer, R rows that the language model reads of all images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.answering import Answered as Answered
from ocvtp.hosts.answering import Raters as Raters
from ocvtp.hosts.answering import after_column as after_column
from ocvtp.hosts.answering import attention_rows as attention_rows
from ocvtp.hosts.answering import before_layer as before_layer
from ocvtp.hosts.answering import read as read
from ocvtp.hosts.asked import Asked as Asked
from ocvtp.hosts.asked import drop as drop
from ocvtp.hosts.base import Encoded, Host
from ocvtp.hosts.in_llm.deepstack import Deepstack
from ocvtp.hosts.prompt.checks import check_inputs
from ocvtp.hosts.prompt.clip_text import TextTower
from ocvtp.hosts.prompt.line_up import Lined, line_up
from ocvtp.hosts.prompt.read_call import Seen, look
from ocvtp.hosts.prompt.read_prompt import make_reader
from ocvtp.hosts.registry import find_host
from ocvtp.ops.merging import keep_all
from ocvtp.structures import Needs
from ocvtp.towers.hooks import Removable


class Asker:
    """Turns what a processor returned into what a language model reads.

    In a `with` block it has its hooks in the model; outside, the model is as it was.

    Args:
        model: a supported VLM, see `find_host`; or a `Host`.
        processor: what makes its inputs, for scorers that read the prompt; None looks for the one
            saved with the model.
        needs: of the scorer.
        text_tower: see `ocvtp.attach`.

    Raises:
        ValueError: if the model cannot supply what is needed.
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        needs: Needs | None = None,
        text_tower: TextTower = None,
    ) -> None:
        self.host = model if isinstance(model, Host) else find_host(model)
        self.needs = Needs() if needs is None else needs
        self.host.check(self.needs)
        self._reader = make_reader(self.host, self.needs, processor, text_tower)
        self._installed: list[Removable] = []

    def __enter__(self) -> Asker:
        self._installed = self.host.install(self.needs)
        return self

    def __exit__(self, *error: object) -> None:
        while self._installed:
            self._installed.pop().remove()

    @torch.no_grad()
    def ask(self, inputs: Mapping[str, Any], answers: Tensor) -> Asked:
        """Questions with their answers, all visual tokens in place.

        Args:
            inputs: what the processor returned, on the model's device: one prompt a row with one
                image in it, and the answer's tokens after it; padded on the right, better than on
                the left. Questions about one image, one after the other, share its encoding.
            answers: [B, L] bool, True on the tokens of answers. A scorer does not read them.

        Raises:
            ValueError: if rows have no image or several, or `answers` are not of the prompts.
            RuntimeError: outside of a `with` block.
        """
        if not self._installed and self.host.hooks(self.needs):
            raise RuntimeError("an Asker asks inside its `with` block, which has its hooks.")
        host, given = self.host, dict(inputs)
        if given.get("attention_mask") is None:
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        ids, mask = check_inputs(host, given)
        assert mask is not None
        _check_answers(answers, ids, mask, host.image_token_id)
        answers, real = answers.to(ids.device), mask.bool()
        given |= {"input_ids": ids, "attention_mask": mask}
        given["labels"] = torch.where(answers, ids, -100)
        placeholder = (ids == host.image_token_id) & real
        images = {k: given[k] for k in host.image_keys if given.get(k) is not None}
        own = _distinct(images, placeholder)
        first = own.nonzero()[:, 0]
        prompts = {"input_ids": ids[first], "attention_mask": (mask * ~answers)[first]}
        seen = look(host, self.needs, given | _rows_of(images, placeholder, own) | prompts)
        _check_images(seen)
        twins = own.long().cumsum(dim=0) - 1
        asked = self._of(given, images, seen, placeholder, twins)
        if self._reader is None:
            return asked
        rows = torch.arange(len(ids), device=ids.device)
        encoded = Encoded(asked.tokens, seen.encoded.embeddings, starts=rows)
        said = real & ~answers  # a scorer reads no answer
        return replace(asked, tokens=self._reader.read(host, encoded, ids, said, rows).tokens)

    def _of(
        self,
        inputs: dict[str, Any],
        images: dict[str, Any],
        seen: Seen,
        placeholder: Tensor,
        twins: Tensor,
    ) -> Asked:
        """The questions, of the images that were encoded.

        Args:
            inputs: of all questions. images: those of them that are of the images.
            seen: the first question of every image.
            placeholder: [B, L] bool.
            twins: [B] which of the encoded images each question is about.
        """
        host, encoded, real = self.host, seen.encoded, inputs["attention_mask"].bool()
        kept = host.apply(encoded, keep_all(encoded.tokens))
        rows = _numbers(seen, placeholder, twins)  # [B, L] among the R
        order = torch.full((len(encoded.embeddings) + 1,), -1, device=rows.device)
        order[kept.positions.to(rows.device)] = torch.arange(len(kept.positions)).to(rows.device)
        keep = real & (~placeholder | (order[rows] >= 0))  # ends of lines may not be read
        lined = self._lined(inputs, images, keep, real)
        rows = rows.gather(1, lined.index).masked_fill(lined.padding, -1)
        image, read = rows >= 0, order[rows[rows >= 0]]

        def spread(values: Tensor) -> Tensor:
            """[R] of the rows, for the columns [B, L]."""
            return values.to(rows.device)[rows].masked_fill(~image, -1)

        places = spread(host.tokens_of_rows(encoded))
        lines = ends = host.lines(encoded)
        if lines is not None:
            lines = spread(lines)
            ends, lines = lines.masked_fill(places >= 0, -1), lines.masked_fill(places < 0, -1)
        columns = torch.full((len(rows), encoded.tokens.num_tokens), -1, device=rows.device)
        owners, at = (places >= 0).nonzero().unbind(dim=1)
        columns[owners, places[owners, at]] = at
        text: Tensor = host.model.get_input_embeddings()(lined.inputs["input_ids"])
        found = kept.embeddings[read.to(kept.embeddings.device)].to(text.device, text.dtype)
        deepstack = kept.deepstack
        return Asked(
            embeddings=text.masked_scatter(image[:, :, None].to(text.device), found),
            mask=~lined.padding,
            positions=lined.inputs.get("position_ids"),
            labels=lined.inputs["labels"],
            columns=columns,
            tokens=encoded.tokens.map(lambda values: values[twins.to(values.device)]),
            image=image,
            lines=lines,
            ends=ends,
            deepstack=None
            if deepstack is None
            else Deepstack.at(image, deepstack[:, read.to(deepstack.device)]),
        )

    def _lined(
        self, inputs: dict[str, Any], images: dict[str, Any], keep: Tensor, real: Tensor
    ) -> Lined:
        """The columns that are read."""
        coordinates = self.host.rope_positions(inputs, images)
        return line_up(
            {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")},
            keep=keep,
            real=real,
            given=inputs.get("position_ids") if coordinates is None else None,
            coordinates=coordinates,
            packed=None,
            positions="original",
            layers=None,
            pad_id=0,
        )


def _distinct(images: Mapping[str, Any], placeholder: Tensor) -> Tensor:
    """[B] bool, questions about another image than the question before: each is encoded once.

    Where rows may have no image, or it is not known where those of each are, that is all of them.
    """
    counts = placeholder.sum(dim=1).tolist()
    own = torch.ones(len(counts), dtype=torch.bool, device=placeholder.device)
    parts = [_by_row(values, counts) for values in images.values()]
    if min(counts) == 0 or None in parts or not any(parts):
        return own
    for row in range(1, len(counts)):
        own[row] = not all(torch.equal(part[row], part[row - 1]) for part in parts if part)
    return own


def _by_row(values: Any, counts: Sequence[int]) -> list[Tensor] | None:
    """What an argument has for each row; nothing, if it is of all of them, None if nobody knows.

    Args:
        values: of the argument: one of each row, or patches or tiles of all rows one after the
            other.
        counts: placeholders of each row, to which patches and tiles are in proportion.
    """
    if isinstance(values, list | tuple):
        return None
    if not isinstance(values, Tensor) or not values.ndim:
        return []
    if len(values) == len(counts):
        return [*values.split(1)]
    sizes = [len(values) * count / max(1, sum(counts)) for count in counts]
    return None if any(size % 1 for size in sizes) else [*values.split([*map(int, sizes)])]


def _rows_of(images: dict[str, Any], placeholder: Tensor, own: Tensor) -> dict[str, Any]:
    """The images of some questions, see `_distinct`."""
    if bool(own.all()):
        return images
    counts, found = placeholder.sum(dim=1).tolist(), dict(images)
    rows = own.nonzero()[:, 0].tolist()
    for name, values in images.items():
        if parts := _by_row(values, counts):
            found[name] = torch.cat([parts[row] for row in rows])
    return found


def _numbers(seen: Seen, placeholder: Tensor, twins: Tensor) -> Tensor:
    """[B, L] the number of each column's row among those of all encoded images, else -1.

    Raises:
        ValueError: if a question has not the placeholders of its image.
    """
    starts = seen.encoded.first_rows(placeholder.device)[twins]
    wanted, counts = seen.placeholder.sum(dim=1)[twins], placeholder.sum(dim=1)
    if bool((wanted != counts).any()):
        row = int((wanted != counts).nonzero()[0])
        raise ValueError(
            f"row {row} has {int(counts[row])} image placeholders, but its image gives"
            f" {int(wanted[row])} tokens; make both with one call of the processor."
        )
    ranks = placeholder.long().cumsum(dim=1) - 1
    return (starts[:, None] + ranks).masked_fill(~placeholder, -1)


def _check_images(seen: Seen) -> None:
    """Refuse all but one image a row.

    Raises:
        ValueError: for these.
    """
    rows = seen.slots[seen.encoded.first_rows(seen.slots.device), 0].tolist()
    if rows != [*range(len(seen.input_ids))]:
        counts = [rows.count(row) for row in range(len(seen.input_ids))]
        raise ValueError(
            f"the rows of the batch have {counts} images; pass questions about one image each, and"
            " one question a row."
        )


def _check_answers(answers: Tensor, ids: Tensor, mask: Tensor, image_token_id: int) -> None:
    """Refuse answers that are none of the prompts.

    Raises:
        ValueError: for these.
    """
    if answers.shape != ids.shape or answers.dtype != torch.bool:
        raise ValueError(
            f"answers are {list(answers.shape)} of {answers.dtype}, input_ids {list(ids.shape)};"
            " pass equal shapes, of torch.bool."
        )
    answers = answers.to(ids.device)
    wrong = answers & ((ids == image_token_id) | ~mask.to(ids.device).bool())
    wrong[:, 0] |= answers[:, 0]  # nothing predicts the first token
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"answers are True in column {column} of row {row}, which is padding, a placeholder of"
            " an image, or the first of its row; pass True on tokens of answers alone."
        )
