"""Encode the images of a call once for many pruners and budgets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.base import Encoded, Host
from ocvtp.hosts.lazy_projection import LaterRows
from ocvtp.hosts.prompt.read_call import Encode, encode_now
from ocvtp.hosts.registry import check, find_host
from ocvtp.pruners import Compose, Pruner
from ocvtp.structures import Needs
from ocvtp.towers.joined_needs import covers, joined, only

_IN_TOWER = ("pixels", "encoder")


@dataclass(frozen=True, eq=False)
class _Call:
    """What the encoding of a call depends on.

    Args:
        tensors: its image arguments that are tensors; holding them keeps their ids from others.
        state: everything else, to compare.
    """

    tensors: tuple[Tensor, ...]
    state: tuple[Any, ...]

    def is_like(self, other: _Call) -> bool:
        """Whether both give the same encoding."""
        same = len(self.tensors) == len(other.tensors) and self.state == other.state
        return same and all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))


@dataclass(frozen=True, eq=False)
class _Last:
    """The last call, what was `made` of its images, and the needs that were `refused` for them."""

    call: _Call
    made: tuple[tuple[Needs, Encoded], ...] = ()
    refused: tuple[Needs, ...] = ()


class SharedEncodings:
    """What a vision tower made of the images of the last call, for all pruners that may read it.

    Pass it to `attach` with each of the pruners in turn. The first call with some image tensors
    runs the tower and looks for what any of the pruners reads; calls with the same tensors under
    other pruners, or the same one, reuse that. Each pruner is shown just what it would be shown
    without sharing, so that answers are the same bit for bit. Prompts are read again by every call.

        shared = SharedEncodings.of(model, pruners)
        for pruner in pruners:
            with pruner(model, shared=shared):
                model.generate(**inputs)

    The same tensors are the same objects, not changed in place; other image arguments, the tiling,
    the precision and the weights must be equal too. PyTorch does not count changes through `.data`
    or through a NumPy array that shares a tensor's memory, and the model's config, mode and
    adapters are not compared: call `clear()` after such a change. Only the images of the last call
    are kept. Images are encoded again, and not kept, in calls that record gradients (put forward()
    under `torch.no_grad()`), and where image tensors were made under `torch.inference_mode()`,
    which does not count changes either.

    A pruner that acts before or inside the vision tower shares nothing: it encodes on its own.
    Pruners that mean different things by `received` attention form groups, each with an encoding
    of its own. Where the model cannot supply what all read together for some call,
    that call is encoded for its pruner alone. A compiled tower runs eagerly for all as soon as one
    of the pruners looks into it.

    Args:
        model: the transformers model, unwrapped.
        unions: what to look for at once; see `of`.
    """

    def __init__(self, model: Any, unions: Sequence[Needs]) -> None:
        self.model = model
        self.unions = tuple(unions)
        self.num_encoded = 0
        """How often images were encoded, also by pruners that share nothing."""
        self._last: _Last | None = None

    @classmethod
    def of(cls, model: Any, pruners: Sequence[Pruner | Compose]) -> SharedEncodings:
        """For the pruners of a sweep.

        Args:
            model: a supported transformers VLM, or what holds one.
            pruners: all of them. One that the model refuses is left out here, and refused when
                it is attached.

        Raises:
            ValueError: if the model is not supported.
        """
        host = find_host(model)
        needs = []
        for pruner in pruners:
            if _acts_in_tower(pruner):
                continue
            try:
                check(host, pruner)
            except ValueError:
                continue
            needs.append(pruner.tower_needs)
        return cls(host.model, joined(needs))

    def clear(self) -> None:
        """Forget the images, and give their memory back."""
        self._last = None

    def join(self, model: Any, pruner: Pruner | Compose) -> tuple[Encode, Needs]:
        """How to encode for a pruner, and what to hook for that.

        Args:
            model: the one that the pruner is attached to, unwrapped.
            pruner: one that the model accepts.

        Raises:
            ValueError: for another model, or a pruner that reads more than those of `of`.
        """
        if model is not self.model:
            raise ValueError(
                "shared= was made for another model; make it with SharedEncodings.of(model,"
                " pruners) for the one that is attached to."
            )
        if _acts_in_tower(pruner):
            return self._pass_by, pruner.tower_needs
        union = self._union(pruner.tower_needs)
        if union is None:
            raise ValueError(
                f"pruner {pruner.name!r} reads more of the vision tower than the pruners that"
                " shared= was made for; pass it to SharedEncodings.of(model, pruners) too."
            )
        return self._encode, union

    def _encode(self, host: Host, images: dict[str, Any], needs: Needs) -> Encoded:
        call = _call(host, images)
        if call is None:
            return self._pass_by(host, images, needs)
        last = self._last
        if last is None or not call.is_like(last.call):
            self._last = None  # free the memory before more is taken
            last = _Last(call)
        found = next((encoded for made, encoded in last.made if covers(made, needs)), None)
        if found is None:
            last, found = self._add(last, host, images, needs)
        self._last = last
        found = replace(found, tokens=only(found.tokens, needs))
        if isinstance(found.embeddings, LaterRows) and not needs.projected:
            return replace(found, embeddings=found.embeddings.unmade())
        return found

    def _add(
        self, last: _Last, host: Host, images: dict[str, Any], needs: Needs
    ) -> tuple[_Last, Encoded]:
        """Encode for all pruners; for this one, where the images do not allow what others read."""
        union = self._union(needs)
        assert union is not None, "the pruner has joined"
        if union not in last.refused:
            try:
                encoded = self._pass_by(host, images, union)
                return replace(last, made=(*last.made, (union, encoded))), encoded
            except ValueError:
                last = replace(last, refused=(*last.refused, union))
        encoded = self._pass_by(host, images, needs)
        return replace(last, made=(*last.made, (needs, encoded))), encoded

    def _pass_by(self, host: Host, images: dict[str, Any], needs: Needs) -> Encoded:
        encoded = encode_now(host, images, needs)
        self.num_encoded += 1
        return encoded

    def _union(self, needs: Needs) -> Needs | None:
        return next((union for union in self.unions if covers(union, needs)), None)


def _acts_in_tower(pruner: Pruner | Compose) -> bool:
    return any(part.stage in _IN_TOWER for part in pruner.parts)


def _call(host: Host, images: dict[str, Any]) -> _Call | None:
    """What to compare; None for a call that cannot be shared."""
    tensors = {name: value for name, value in images.items() if isinstance(value, Tensor)}
    if torch.is_grad_enabled() or any(tensor.is_inference() for tensor in tensors.values()):
        return None
    changes = [(name, tensor._version) for name, tensor in tensors.items()]
    rest = [(name, _settings(images[name])) for name in images if name not in tensors]
    kinds = {tensor.device.type for tensor in tensors.values()}
    kinds = {kind for kind in kinds if torch.is_autocast_enabled(kind)}
    precisions = {kind: torch.get_autocast_dtype(kind) for kind in kinds}
    state = (changes, rest, precisions, host.tiling, host.savings, *_weights(host))
    return _Call(tuple(tensors.values()), state)


def _settings(value: Any) -> Any:
    """A number, word or list among the image arguments, as it is now."""
    return value if isinstance(value, str) else torch.as_tensor(value).tolist()


def _weights(host: Host) -> Iterator[tuple[Any, ...]]:
    """What shows that a weight was changed, moved or cast."""
    for weight in host.model.parameters():
        version = None if weight.is_inference() else weight._version
        yield version, weight.dtype, weight.device
