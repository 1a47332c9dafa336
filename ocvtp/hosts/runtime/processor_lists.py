"""Lists of processors and criteria in which those of generate()'s caller read the caller's prompt.

L' + n tokens of the short prompt and the answer, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from ocvtp.hosts.runtime.generate_arguments import Shown

IsCallers = Callable[[Any], bool]


class ProcessorsOfCallers(LogitsProcessorList):  # type: ignore[misc]
    """Logits processors of generate() and its caller.

    Args:
        items: in their order.
        shown: the prompt that the caller's read.
        is_callers: which of the items they are.
    """

    def __init__(self, items: Any, shown: Shown, is_callers: IsCallers) -> None:
        super().__init__(items)
        self.shown, self.is_callers = shown, is_callers

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """[B, V] the scores, after all processors saw [B, L' + n] `input_ids`, or the caller's."""
        whole = self.shown.lengthen(input_ids)
        for item in self:
            ids = whole if self.is_callers(item) else input_ids
            scores = LogitsProcessorList([item])(ids, scores, **kwargs)
        return scores


class CriteriaOfCallers(StoppingCriteriaList):  # type: ignore[misc]
    """The same for stopping criteria."""

    def __init__(self, items: Any, shown: Shown, is_callers: IsCallers) -> None:
        super().__init__(items)
        self.shown, self.is_callers = shown, is_callers

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """[B] bool, whether one of them stops at [B, L' + n] `input_ids`, or the caller's."""
        whole = self.shown.lengthen(input_ids)
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for item in self:
            ids = whole if self.is_callers(item) else input_ids
            done = done | StoppingCriteriaList([item])(ids, scores, **kwargs)
        return done

    @property
    def max_length(self) -> int | None:
        """Of the short prompt and the answer."""
        for item in self:
            if isinstance(item, MaxLengthCriteria):
                lost = self.shown.lost if self.is_callers(item) else 0
                return int(item.max_length) - lost
        return None
