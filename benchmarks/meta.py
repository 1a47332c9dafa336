"""Running what is too large to run: numbers without values, and how many operations and bytes.

Floating-point tensors are on the device `meta`, whatever device was asked for; whole numbers and
booleans are real, so that what depends on the layout of a prompt takes its true way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import FlopCounterMode

from ocvtp.flops import operations

_META, _CPU = torch.device("meta"), torch.device("cpu")


class WithoutValues(TorchDispatchMode):
    """Inside the block no floating-point number has a value, or takes memory.

    Attributes:
        live: bytes of such tensors made inside of the block that are still held.
        peak: the most of them at any time; set it to `live` to begin again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held: dict[int, weakref.ref[Any]] = {}
        self._patches = (
            patch.object(torch, "autocast", _autocast),
            patch.object(torch, "tensor", partial(_tensor, torch.tensor)),
            patch.object(functional, "scaled_dot_product_attention", _attention),
        )

    def __enter__(self) -> WithoutValues:
        for one in self._patches:
            one.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for one in self._patches:
            one.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by PyTorch for every operation."""
        kwargs = kwargs or {}
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if any(value.is_meta for value in given):
            if "device" in kwargs:
                kwargs = kwargs | {"device": _META}
            found = func(*tree_map(_valueless, args), **tree_map(_valueless, kwargs))
        elif given and "device" not in kwargs:
            found = func(*args, **kwargs)
        else:
            found = func(*tree_map(_valueless, args), **kwargs | {"device": _META})
            if not found.is_floating_point():
                found = func(*args, **kwargs | {"device": _CPU})
        for value in tree_iter(found):
            if isinstance(value, Tensor) and value.is_meta:
                self._hold(value.untyped_storage())
        return found

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._held:
            return

        def gone(_: Any) -> None:
            del self._held[key]
            self.live -= size

        self._held[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _autocast(device: str, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
    """That of PyTorch, which refuses `meta`."""
    return nullcontext() if device == "meta" else torch.amp.autocast(device, *args, **kwargs)


def _tensor(make: Callable[..., Tensor], data: Any, **kwargs: Any) -> Tensor:
    """A tensor of given numbers, which PyTorch makes without an operation."""
    if torch.device(kwargs.get("device") or _CPU) != _META:
        return make(data, **kwargs)
    found = make(data, **kwargs | {"device": _CPU})
    valueless: Tensor = _valueless(found) if found.is_floating_point() else found
    return valueless


def _valueless(value: Any) -> Any:
    """The same on `meta`, where it is a tensor."""
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention in kernels of CUDA that do not hold its matrix."""
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    if attn_mask is None:
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )
    else:
        found = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )
    return found[0]


class Operations:
    """Floating point operations by the part of a step that they are of.

    Attributes:
        parts: by name.
    """

    def __init__(self) -> None:
        self.parts: dict[str, int] = {}
        self._counter: FlopCounterMode = operations.counter()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """What runs inside the block, and is of no other block there."""
        before, others = self.total, sum(self.parts.values())
        yield
        inner = sum(self.parts.values()) - others
        self.parts[name] = self.parts.get(name, 0) + self.total - before - inner

    @property
    def total(self) -> int:
        """Of all that ran so far."""
        return int(self._counter.get_total_flops())

    def __enter__(self) -> Operations:
        self._counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._counter.__exit__(*error)


class Kept:
    """Bytes that autograd keeps for the backward pass, each storage once.

    Args:
        apart: tensors that are there anyway, e.g. weights.

    Attributes:
        num_bytes: of them.
    """

    def __init__(self, apart: Iterator[Tensor]) -> None:
        self._seen = {tensor.untyped_storage()._cdata for tensor in apart}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept)
        self._all: list[torch.UntypedStorage] = []  # so that no address is used twice
        self.num_bytes = 0

    def _pack(self, kept: Tensor) -> Tensor:
        storage = kept.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._all.append(storage)
            self.num_bytes += storage.nbytes()
        return kept

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
