"""What a pruned forward() hands back: the output of the model, lined up with what the caller has.

L columns of the caller's prompt, L' of the short one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor

from ocvtp.hosts.prompt.shorten import Prompt, Shortened
from ocvtp.transformers_names import with_images

Logits = Literal["short", "full"]


def check_logits(logits: str) -> None:
    """Refuse other values.

    Raises:
        ValueError: that names them.
    """
    if logits not in get_args(Logits):
        raise ValueError(f"logits={logits!r}; pass 'short' or 'full'.")


def finish(output: Any, short: Shortened, lengthen: bool) -> Any:
    """The output for the caller.

    Args:
        output: of the model on the short prompt.
        short: what the model was given.
        lengthen: whether its states get the caller's columns.
    """
    if isinstance(output, tuple):
        return output
    output = with_images(output, short.images, short.prompt.embeddings)
    if lengthen:
        output = replace(output, **_lengthened(output, short.prompt))
    if (labels := short.inputs.get("labels")) is not None:
        output.labels = labels
    return output


def _lengthened(output: Any, prompt: Prompt) -> dict[str, Any]:
    found: dict[str, Any] = {"last_hidden_state": prompt.lengthen(output.last_hidden_state)}
    if output.hidden_states is not None:
        found["hidden_states"] = tuple(_states(states, prompt) for states in output.hidden_states)
    return found


def _states(states: Tensor, prompt: Prompt) -> Tensor:
    """States [B, L', D'] of all columns; as they are, where later layers dropped some."""
    return prompt.lengthen(states) if states.shape[1] == prompt.short_length else states
