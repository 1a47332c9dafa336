"""What the whole model says of training questions, computed once and kept in files.

    DIR/extraction.json             what it is made with; written first
    DIR/teacher-00000.safetensors   whole shards, each written at once under its name
    DIR/teacher.json                written last: the same, and the names of the shards

Of the questions of a shard, one after the other,

    states              [T, D'] normed states at the columns that predict answers: logits are the
                        model's head of these
    state_counts        [R] how many of these each question has
    attention.LAYER     [M] attention of that layer to each visual token
    token_counts        [R] how many visual tokens each question's image has

and its metadata `images`, a JSON list of names. A question is named by a hash of all tokens that
are read, its answer's too, and of its key: other prompts or answers are other questions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import move_data_to_device
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from ocvtp.data.feature_files import (
    ShardWriter,
    claim,
    describe_shard,
    differences,
    ends,
    plain,
    shard_name,
    weights_hash,
)
from ocvtp.data.image_names import check_inside
from ocvtp.encoders.clip import ProcessorTransform
from ocvtp.field_types import checked, read_fields
from ocvtp.hosts.asking import Answered, Asked, Raters, attention_rows, read
from ocvtp.reporting.files import replacing
from ocvtp.reporting.progress import progress_bar

SETTINGS = "teacher.json"
_BATCH = 16  # questions at once


@dataclass(frozen=True)
class TeacherNeeds:
    """What losses read of the whole model.

    Args:
        answers: its logits or states where answers are predicted.
        layers: whose attention to the visual tokens.
        rows: of which text, see `ocvtp.hosts.asking.attention_rows`.
    """

    answers: bool
    layers: tuple[int, ...]
    rows: Raters


def question_names(batch: dict[str, Any]) -> list[str]:
    """The name of each question of a batch of `ocvtp.training.prompts.PromptTransform`."""
    ids, mask = batch["inputs"]["input_ids"].cpu(), batch["inputs"]["attention_mask"].cpu()
    names = []
    for key, row, real in zip(batch["keys"], ids, mask, strict=True):
        read = row[real.bool()].to(torch.int64).numpy().tobytes()
        names.append(hashlib.sha256(key.encode() + b"\0" + read).hexdigest()[:24])
    return names


class Teacher:
    """Reads a folder of `ocvtp teacher`.

    Args:
        folder: to read.
        needs: of the losses.
        model: the frozen one of the run that reads it. processor: what makes its inputs.

    Raises:
        ValueError: if it is not there, not finished, damaged, of other weights or images that were
            prepared in another way, or lacks what is needed.
    """

    def __init__(
        self, folder: str | Path, needs: TeacherNeeds, model: nn.Module, processor: Any
    ) -> None:
        self.folder = Path(folder)
        path = self.folder / SETTINGS
        try:
            self.settings = json.loads(path.read_text(encoding="utf-8"))
            stored = read_fields(TeacherNeeds, self.settings["needs"])
            weights = self.settings["weights"]
            names = checked("shards", self.settings["shards"], tuple[str, ...])
            for name in names:
                check_inside(name, self.folder, "file")
            self._shards = [_Shard(self.folder / name, stored) for name in names]
        except Exception as error:  # readers have errors of their own
            raise ValueError(
                f"{self.folder} holds nothing of `ocvtp teacher` that is finished and whole"
                f" ({type(error).__name__}: {error}); run `ocvtp teacher --config CONFIG --output"
                " DIR` first, in a folder without damaged files."
            ) from error
        self._check(needs, stored)
        if weights != weights_hash(model):
            raise ValueError(
                f"{self.folder} was made by a model of other weights, or of another dtype, than"
                " model.host; pass the host that `ocvtp teacher` asked, or make the folder again."
            )
        before, now = self.settings.get("processor"), plain(_prepared(processor))
        if before is not None and (told := list(differences("processor", before, now))):
            raise ValueError(
                f"{self.folder} was made of images that were prepared in another way:"
                f" {'; '.join(told)}. Pass the processor that `ocvtp teacher` read, or make the"
                " folder again."
            )
        self._places: dict[str, tuple[int, int]] = {}
        for number, shard in enumerate(self._shards):
            self._places |= {name: (number, row) for row, name in enumerate(shard.names)}

    def _check(self, needs: TeacherNeeds, stored: TeacherNeeds) -> None:
        lacks = [f"layer {layer}" for layer in needs.layers if layer not in stored.layers]
        lacks += ["answers"] * (needs.answers and not stored.answers)
        if needs.layers and needs.rows != stored.rows:
            lacks.append(f"attention of {needs.rows!r} rows")
        if lacks:
            raise ValueError(
                f"{self.folder} lacks {', '.join(lacks)}, which the losses read; make it with"
                " `ocvtp teacher` and the settings of this run."
            )

    def attention(
        self, batch: dict[str, Any], layers: Sequence[int], asked: Asked
    ) -> dict[int, Tensor]:
        """Layer -> [B, N] fp32, 0 on padding.

        Args:
            batch: of questions. layers: of the language model. asked: the same questions.

        Raises:
            ValueError: for a question that is not there, or there of other visual tokens.
        """
        if not layers:
            return {}
        real = (asked.columns >= 0).cpu()
        found = {layer: torch.zeros(real.shape) for layer in layers}
        for number, (shard, row) in enumerate(self._find(batch)):
            for layer, values in found.items():
                stored = shard.attention(layer, row)
                if len(stored) != (here := int(real[number].sum())):
                    raise ValueError(
                        f"question {batch['keys'][number]} has {len(stored)} visual tokens in"
                        f" {self.folder}, and {here} here: it was asked before another layer; run"
                        " `ocvtp teacher` with the settings of this run."
                    )
                values[number, real[number]] = stored
        return {layer: values.to(asked.columns.device) for layer, values in found.items()}

    def answered(
        self, batch: dict[str, Any], asked: Asked, layers: Sequence[int], model: Any
    ) -> Answered:
        """What the language model made of the questions with all tokens.

        Args:
            batch: of questions. asked: the same. layers: whose attention is wanted.
            model: whose head makes logits of the stored states.

        Raises:
            ValueError: for a question that is not there.
        """
        owner, columns = (asked.labels[:, 1:] >= 0).nonzero().unbind(dim=1)
        states = torch.cat([shard.states(row) for shard, row in self._find(batch)])
        head = model.get_output_embeddings()
        states = states.to(owner.device, head.weight.dtype)
        targets = asked.labels[owner, columns + 1]
        attention = self.attention(batch, layers, asked)
        return Answered(head(states), states, owner, targets, attention)

    def _find(self, batch: dict[str, Any]) -> list[tuple[_Shard, int]]:
        names = question_names(batch)
        for name, key in zip(names, batch["keys"], strict=True):
            if name not in self._places:
                raise ValueError(
                    f"question {key} is not in {self.folder}, which was made of other questions or"
                    " prompts; run `ocvtp teacher` with the settings of this run."
                )
        places = (self._places[name] for name in names)
        return [(self._shards[number], row) for number, row in places]


class _Shard:
    """One file, opened when it is first read."""

    def __init__(self, path: Path, stored: TeacherNeeds) -> None:
        file: Any = safe_open(path, "pt")
        self._file = file
        wanted = {f"attention.{layer}" for layer in stored.layers} | {"token_counts"}
        wanted |= {"states", "state_counts"} if stored.answers else {"state_counts"}
        if absent := sorted(wanted - {*file.keys()}):
            raise ValueError(f"{path.name} lacks {', '.join(absent)}")
        self.names = checked("images", json.loads(file.metadata()["images"]), list[str])
        self._tokens = _ends_of(file, "token_counts", len(self.names))
        self._states = _ends_of(file, "state_counts", len(self.names))
        for name in wanted - {"token_counts", "state_counts"}:
            shape, rows = file.get_slice(name).get_shape(), self._tokens
            if name == "states":
                rows, shape = self._states, shape[:1] if len(shape) == 2 else shape
            if list(shape) != [int(rows[-1])]:
                raise ValueError(f"{path.name}: {name} has shape {list(shape)}")

    def attention(self, layer: int, row: int) -> Tensor:
        part = slice(int(self._tokens[row]), int(self._tokens[row + 1]))
        values: Tensor = self._file.get_slice(f"attention.{layer}")[part]
        return values.float()

    def states(self, row: int) -> Tensor:
        part = slice(int(self._states[row]), int(self._states[row + 1]))
        values: Tensor = self._file.get_slice("states")[part]
        return values


def _ends_of(file: Any, name: str, questions: int) -> Tensor:
    """Where the rows of each question end, see `ends`, of how many each has."""
    counts = file.get_tensor(name)
    if counts.shape != (questions,) or counts.is_floating_point() or bool((counts < 0).any()):
        raise ValueError(f"{name} are not the numbers of {questions} questions")
    return ends(counts)


@dataclass(frozen=True)
class TeacherReport:
    """What `write_teacher` left.

    Args:
        questions: in the folder. written: shards that this call wrote. skipped: `FILE: reason` of
            questions that could not be read. bytes: of all shards.
    """

    questions: int
    written: int
    skipped: tuple[str, ...]
    bytes: int


def write_teacher(
    module: Any,
    questions: Dataset[Any],
    collate: Callable[[list[Any]], dict[str, Any]],
    folder: str | Path,
    shard_size: int = 2000,
) -> TeacherReport:
    """Ask the whole model all training questions, and write what losses read of it.

    The same call continues after the shards that are there.

    Args:
        module: `ocvtp.training.selector.SelectorModule` of the run that will read them, on its
            device.
        questions: the training set. collate: makes its batches.
        folder: to write. shard_size: questions of a file.

    Raises:
        ValueError: if no loss reads anything of the whole model, for a folder that was begun with
            other settings, and for a full disk.
    """
    needs: TeacherNeeds = module.says()
    if not needs.answers and not needs.layers:
        raise ValueError(
            "no loss of these settings reads what the whole model says, so there is nothing to"
            " store; train without model.teacher."
        )
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size}; pass at least 1.")
    total, folder = len(questions), Path(folder)  # type: ignore[arg-type]
    settings = plain(
        {
            "weights": weights_hash(module.vlm),
            "processor": _prepared(module.processor),
            "host": asdict(module.host),
            "needs": asdict(needs),
            "questions": total,
            "shard_size": shard_size,
        }
    )
    claim(folder, settings)
    paths = [folder / shard_name("teacher", n) for n in range(-(-total // shard_size))]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    with progress_bar() as progress:
        bar = progress.add_task("questions", total=len(missing) * shard_size)
        for number in missing:
            part = range(number * shard_size, min((number + 1) * shard_size, total))
            batches = DataLoader(Subset(questions, part), _BATCH, collate_fn=collate)
            _write_shard(module, needs, paths[number], batches, lambda n: progress.advance(bar, n))
    shards = [path.name for path in paths]
    with replacing(folder / SETTINGS) as temporary:
        temporary.write_text(json.dumps({**settings, "shards": shards}), encoding="utf-8")
    told = [describe_shard(path) for path in paths]
    return TeacherReport(
        questions=sum(len(shard["images"]) for shard in told),
        written=len(missing),
        skipped=tuple(error for shard in told for error in shard["skipped"]),
        bytes=sum(shard["bytes"] for shard in told),
    )


def _prepared(processor: Any) -> dict[str, Any]:
    """How images become pixels."""
    return ProcessorTransform(getattr(processor, "image_processor", processor)).describe()


@torch.no_grad()
def _write_shard(
    module: Any,
    needs: TeacherNeeds,
    path: Path,
    batches: Iterator[dict[str, Any]] | DataLoader[Any],
    advance: Callable[[int], None],
) -> None:
    names, skipped = list[str](), list[str]()
    with ShardWriter(path, {}) as shard:
        for batch in batches:
            skipped += batch["errors"]
            if batch["keys"]:
                names += question_names(batch)
                for name, values in _said(module, needs, batch):
                    shard.add(name, values)
            advance(len(batch["keys"]) + len(batch["errors"]))
        shard.metadata |= {"images": json.dumps(names), "skipped": json.dumps(skipped)}


def _said(module: Any, needs: TeacherNeeds, batch: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What is stored of a batch, by the names of tensors."""
    asked = module.ask(move_data_to_device(batch, module.device))
    host, real = module.frozen_host, asked.columns >= 0
    states = torch.zeros(0, 1)
    if needs.answers:
        answered = read(host, asked, layers=needs.layers, raters=needs.rows)
        states, attention = answered.states, answered.attention
        yield "states", states.half()
    else:
        attention = attention_rows(host, asked, needs.layers, needs.rows)
    answers = (asked.labels[:, 1:] >= 0).sum(dim=1)
    yield "state_counts", (answers if needs.answers else answers * 0).int()
    yield "token_counts", real.sum(dim=1).int()
    for layer, values in attention.items():
        yield f"attention.{layer}", values[real].half()
