"""What lmms-eval's `--model_args` and `--gen_kwargs` say, checked, in this package's own terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ocvtp.evaluation.conditions import Budget, Place, pruner_conditions
from ocvtp.field_types import no_such
from ocvtp.pruners import Pruner
from ocvtp.pruners.specs import build_spec, names_budget, refuse_unread

MAX_NEW_TOKENS = 1024
"""Length of an answer at most, where a task does not say; that of lmms-eval's LLaVA."""

_PASSED_ON = (
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "length_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
_SAMPLING = ("temperature", "top_p", "top_k")
_READ = (*_PASSED_ON, *_SAMPLING, "do_sample", "until")


@dataclass(frozen=True)
class ModelArgs:
    """`--model_args`, with what lmms-eval adds to them.

    Args:
        pretrained: folder or hub id of the model, or random weights; see `load_model`.
        pruner: `NAME:KEY=VALUE,...`, see `build_spec`; in quotes where it has several settings.
        num_keep: tokens kept of every image. keep_ratio: their share; at most one of the two.
        max_keep: the most of an image; alone, or of a share.
        checkpoint: exported OC-pruner. text_tower: see `ocvtp.attach`.
        seed: of pruners that draw.
        dtype: see `load_model`.
        device: None for the first GPU, or the CPU where there is none.
        batch_size: requests at a time.

    Raises:
        ValueError: for an argument that is unknown, missing or out of range.
    """

    pretrained: str
    pruner: str = "none"
    num_keep: int | None = None
    keep_ratio: float | None = None
    max_keep: int | None = None
    checkpoint: str | None = None
    text_tower: str | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str | None = None
    batch_size: int = 1

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> ModelArgs:
        """From arguments as lmms-eval parses them: numbers are numbers, quotes stay in texts."""
        given = {name: _unquoted(value) for name, value in given.items() if value is not None}
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(
                    f"model_args has {name!r}, which is none of them{no_such(name, known)} Known"
                    f" are {', '.join(known)}. Settings of a pruner go after its name:"
                    ' pruner="NAME:KEY=VALUE,KEY=VALUE".'
                )
        if "pretrained" not in given:
            raise ValueError("model_args lacks pretrained=; pass a folder or hub id of a model.")
        return cls(**given | {"batch_size": _batch_size(given.get("batch_size", 1))})

    def pruner_maker(self) -> Callable[[int], Pruner]:
        """Makes the pruner for a batch, from the number of its first question.

        One pruner serves all batches; one that draws is made for each, as in `ocvtp evaluate`.

        Raises:
            ValueError: for what `build_spec` refuses, for two budgets, and for what would not
                count.
        """
        if self.num_keep is not None and self.keep_ratio is not None:
            raise ValueError(
                f"num_keep={self.num_keep} and keep_ratio={self.keep_ratio}; pass one of them."
            )
        budget = Budget(self.num_keep, self.keep_ratio, self.max_keep).checked("model_args")
        told = budget.settings()
        if told and self.num_keep is None and names_budget(self.pruner):
            raise ValueError(
                f"pruner={self.pruner!r} has a K, which stands for num_keep; pass that in place of"
                f" {budget.said}."
            )
        refuse_unread([self.pruner], checkpoint=self.checkpoint, **told)
        if not told:
            pruner = build_spec(self.pruner, checkpoint=self.checkpoint)
            return lambda start: pruner
        checkpoints = [] if self.checkpoint is None else [self.checkpoint]
        (condition,) = pruner_conditions(self.pruner, [budget], [self.seed], checkpoints, 0)
        return lambda start: condition.make(Place(start, list))


@dataclass(frozen=True)
class GenerationArgs:
    """The `generation_kwargs` of a task.

    Args:
        passed: arguments of `model.generate`.
        until: an answer ends before the first of these.
        unused: names of those that mean nothing here.
    """

    passed: dict[str, Any]
    until: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> GenerationArgs:
        """Greedy unless `temperature` is above 0, or `do_sample` is true without one.

        Raises:
            ValueError: if `until` is neither a text nor a list of texts.
        """
        until = given.get("until") or ()
        until = [until] if isinstance(until, str) else until
        if not isinstance(until, Sequence) or not all(isinstance(t, str) and t for t in until):
            raise ValueError(f"generation_kwargs has until={until!r}; pass a text, or several.")
        temperature = given.get("temperature")
        sampled = bool(given.get("do_sample")) if temperature is None else temperature > 0
        names = (*_PASSED_ON, *_SAMPLING) if sampled else _PASSED_ON
        passed = {name: given[name] for name in names if given.get(name) is not None}
        passed = {"max_new_tokens": MAX_NEW_TOKENS, **passed, "do_sample": sampled}
        return cls(passed, tuple(until), tuple(sorted(set(given) - set(_READ))))

    def cut(self, answer: str) -> str:
        """An answer up to the first of `until`."""
        for mark in self.until:
            answer = answer.partition(mark)[0]
        return answer


def _unquoted(value: Any) -> Any:
    """A text without the quotes that kept its commas together."""
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return value


def _batch_size(given: Any) -> int:
    """A batch size as lmms-eval hands it on: a number or its digits."""
    if isinstance(given, int | str) and str(given).isdecimal() and int(given) > 0:
        return int(given)
    raise ValueError(f"batch_size={given!r}; pass how many requests to answer at a time, e.g. 4.")
