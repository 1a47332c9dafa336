"""What a vision tower gave of the images of a call, as a model hands it back with its output.

R rows that the language model would read of all images, R' that it read, E decoder layers that add
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.base import Kept
from ocvtp.transformers_names import asks_tower, hands_back_towers

_ASKED = ("output_hidden_states", "output_attentions")


def asked(inputs: dict[str, Any], kind: str, whole: bool = False) -> dict[str, bool]:
    """Arguments by which a vision tower gives all that the model hands back of it.

    Args:
        inputs: of forward().
        kind: the model's `model_type`.
        whole: whether that is wanted, if the call itself asks for nothing inside of the model.
    """
    if not (whole or any(map(inputs.get, _ASKED))):
        return {}
    found = {name: asks_tower(kind) and bool(inputs.get(name)) for name in _ASKED}
    return found if hands_back_towers() and (whole or any(found.values())) else {}


def is_asked(images: dict[str, Any]) -> bool:
    """Whether `asked` is among the arguments of the images."""
    return any(name in images for name in _ASKED)


def known(output: Any, first_unread: int | None = None, is_whole: bool = True) -> Any:
    """The part of a tower's output that is true, and may be handed back.

    Args:
        output: of `get_image_features`.
        first_unread: half of a block from which on nothing ran, see `skip_unread.first_unread`;
            None if all did.
        is_whole: whether the tower ran on all of the images.
    """
    if not hands_back_towers():  # only the rows are
        return type(output)(pooler_output=output.pooler_output)
    if first_unread is None and is_whole:
        return output
    ran = -1 if first_unread is None or not is_whole else first_unread // 2
    states = output.hidden_states
    if states is not None:
        states = tuple(state if layer <= ran else None for layer, state in enumerate(states))
    return _changed(output, last_hidden_state=None, hidden_states=states, attentions=None)


def of_kept(output: Any, kept: Kept, num_rows: int) -> Any:
    """The output of a tower with the rows that the language model read.

    Args:
        output: see `known`; its rows may be zeros.
        kept: the R' rows.
        num_rows: R.
    """
    rows = output.pooler_output
    sizes = [len(one) for one in rows]
    if isinstance(rows, Tensor):
        sizes = [rows.shape[1]] * len(rows)
    found: dict[str, Any] = {}
    if len(kept.positions) < num_rows:
        sizes = _counts(sizes, kept.positions)
        states = output.hidden_states
        if states is not None and any(layer is None for layer in states):
            found["hidden_states"] = None  # nobody asked for it; Trainer cannot gather holes
    found |= {"pooler_output": _alike(rows, kept.embeddings.split(sizes))}
    layers = getattr(output, "deepstack_features", None)
    if layers is not None and kept.deepstack is not None:
        pairs = zip(layers, kept.deepstack, strict=True)
        deep = [_alike(layer, rows.split(sizes)) for layer, rows in pairs]
        found["deepstack_features"] = type(layers)(deep)
    return _changed(output, **found)


def _changed(output: Any, **values: Any) -> Any:
    """A copy of a ModelOutput with other values, in its own order, which tuples of it have."""
    made = type(output)()
    for name, value in (dict(output) | values).items():
        if value is not None:
            made[name] = value
    return made


def _counts(sizes: Sequence[int], positions: Tensor) -> list[int]:
    """How many of the rows at `positions` are of each part."""
    ends = torch.tensor(sizes).cumsum(dim=0)
    part = torch.searchsorted(ends, positions.cpu(), right=True)
    counts: list[int] = part.bincount(minlength=len(sizes)).tolist()
    return counts


def _alike(given: Any, parts: Sequence[Tensor]) -> Any:
    """Parts in a container like the given one; a tensor becomes a list if rows are missing."""
    if not isinstance(given, Tensor):
        return type(given)(parts)
    if len(given) == len(parts) and all(len(part) == given.shape[1] for part in parts):
        return torch.stack(list(parts))
    return list(parts)
