"""Cut a request into spans, each of one stage, without gaps between them.

A stage that begins inside another one takes its time away from it: a pruner that chooses inside the
vision tower is not the tower's time. So all spans together are the whole request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

from ocvtp.bench.samples import (
    AFTER,
    AROUND,
    DECODE,
    MODEL,
    PROJECT,
    SELECT,
    SPANS,
    TOWER,
)
from ocvtp.hosts.base import Host
from ocvtp.hosts.runtime.attachment import attachment_of
from ocvtp.pruners import Pruner


class Marks:
    """Readings of a clock, or of memory, wherever a stage begins or ends.

    Args:
        read: what is noted at every mark: a time, a CUDA event, or the peak since the last mark.
    """

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read
        self._stages: list[str] = []
        self.first: Any = None
        self.readings: list[tuple[str, Any]] = []
        """Of every span its stage, and the reading at its end."""
        self.reads_prompt = False
        """False once there is a token: every further pass is `decode`."""

    @property
    def stage(self) -> str:
        """What runs now."""
        return self._stages[-1] if self._stages else AROUND

    def start(self) -> None:
        """A request begins."""
        self.readings.clear()
        self._stages, self.reads_prompt = [AROUND], True
        self.first = self._read()

    def enter(self, stage: str) -> None:
        """A stage begins, inside the one that runs."""
        if self.reads_prompt:
            self._cut()
            self._stages.append(stage)

    def leave(self) -> None:
        """The innermost stage ends."""
        if self.reads_prompt:
            self._cut()
            self._stages.pop()

    def token(self, is_last: bool) -> None:
        """A token is there: what follows is `decode`, or `after` the last one."""
        self._cut()
        self._stages, self.reads_prompt = [AFTER if is_last else DECODE], False

    def stop(self) -> None:
        """The request is answered."""
        self._cut()

    def _cut(self) -> None:
        self.readings.append((self._stages[-1], self._read()))


def seconds(marks: Marks) -> dict[str, float]:
    """Seconds of every stage of a request; CUDA events must have happened."""
    found = dict.fromkeys(SPANS, 0.0)
    before = marks.first
    for stage, reading in marks.readings:
        found[stage] += _between(before, reading)
        before = reading
    return found


def peaks(marks: Marks) -> dict[str, int]:
    """The largest reading of every stage, 0 for stages that did not run."""
    found = dict.fromkeys(SPANS, 0)
    for stage, reading in marks.readings:
        found[stage] = max(found[stage], reading)
    return found


def clock(device: torch.device) -> Callable[[], Any]:
    """What to read for times on a device: CUDA events, which do not wait, or the wall clock."""
    return _event if device.type == "cuda" else time.perf_counter


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def wall_clock(device: torch.device, into: list[float]) -> Iterator[None]:
    """Add the seconds of a block to a list, the device idle before and after it."""
    synchronize(device)
    begin = time.perf_counter()
    yield
    synchronize(device)
    into.append(time.perf_counter() - begin)


def cost_of_a_mark(device: torch.device, repeats: int = 1000) -> float:
    """Seconds that a mark takes of the host's time."""
    marks = Marks(clock(device))
    marks.start()
    begin = time.perf_counter()
    for _ in range(repeats):
        marks.enter(TOWER)
        marks.leave()
    return (time.perf_counter() - begin) / (2 * repeats)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    if isinstance(start, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1e3
    return float(end - start)


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
