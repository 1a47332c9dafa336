"""Where stages begin and end in a model: hooks on its modules, a wrapper around the pruner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

from ocvtp.bench.timeline import MODEL, PROJECT, SELECT, TOWER, Marks
from ocvtp.hosts.base import Host
from ocvtp.hosts.runtime.attachment import attachment_of
from ocvtp.pruners import Pruner

_CHOOSE = ("select", "select_at", "rows")
"""Methods in which pruners choose: in the tower, in the language model's layers, by merging."""


class Tokens(StoppingCriteria):  # type: ignore[misc]
    """Marks every token of an answer, and never stops it.

    Args:
        marks: of the request.
        num_tokens: of an answer.
        batch_size: answers at a time.
        device: of the model.
    """

    def __init__(
        self, marks: Marks, num_tokens: int, batch_size: int, device: torch.device
    ) -> None:
        self._marks, self._num_tokens, self.count = marks, num_tokens, 0
        self._never = torch.zeros(batch_size, dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """All False: go on."""
        self.count += 1
        if self.count == 1 or self.count == self._num_tokens:
            self._marks.token(self.count == self._num_tokens)
        return self._never


def modules_of(host: Host) -> dict[str, list[nn.Module]]:
    """The modules of every stage.

    The projector makes the language model's rows of the tower's tokens: a module after the tower,
    or its merger, which is inside.
    """
    head = host.model.get_output_embeddings()
    models = [host.language_model, *([] if head is None else [head])]
    return {TOWER: [host.tower], PROJECT: list(host.projectors), MODEL: models}


@contextmanager
def watching(host: Host, parts: Sequence[Pruner], marks: Marks) -> Iterator[None]:
    """Mark the stages of what a model runs inside the block.

    Args:
        host: of the model, a pruner attached or not.
        parts: the pruners that are attached.
        marks: what is marked.
    """

    def enter(stage: str, *_: Any) -> None:
        marks.enter(stage)

    def leave(*_: Any) -> None:
        marks.leave()

    hooks = []
    for stage, modules in modules_of(host).items():
        for module in modules:
            begin = partial(enter, stage)
            hooks.append(module.register_forward_pre_hook(begin, prepend=True))
            hooks.append(module.register_forward_hook(leave))
    inside = [part for part in parts if part.stage != "llm_input"]
    wrapped: list[tuple[Any, str]] = [(p, name) for p in inside for name in _CHOOSE]
    if (attachment := attachment_of(host.model)) is not None:
        wrapped.append((attachment, "select"))  # around what is compiled, not inside
    wrapped = [(owner, name) for owner, name in wrapped if hasattr(owner, name)]
    before = [vars(owner).get(name) for owner, name in wrapped]
    for owner, name in wrapped:
        vars(owner)[name] = _timed(getattr(owner, name), marks)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for (owner, name), own in zip(wrapped, before, strict=True):
            if own is None:
                del vars(owner)[name]
            else:
                vars(owner)[name] = own


def _timed(choose: Callable[..., Any], marks: Marks) -> Callable[..., Any]:
    @wraps(choose)
    def run(*args: Any, **kwargs: Any) -> Any:
        marks.enter(SELECT)
        try:
            return choose(*args, **kwargs)
        finally:
            marks.leave()

    return run
