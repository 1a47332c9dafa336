"""What a request does, not timed: memory by kind, floating point operations, attention kernels.

On CUDA the caching allocator tells of memory. On the CPU a dispatch mode follows the storages that
PyTorch's operations return while they live; it does not see what a kernel takes and gives back
inside itself. Operations are as `ocvtp.flops.operations` counts them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ocvtp.flops import operations

_ATTENTION = "scaled_dot_product"


class Watch(TorchDispatchMode):  # type: ignore[misc]
    """Sees every operation: bytes that live, operations and attention kernels of every stage.

    Args:
        known: tensors that were there before; their storages do not count.
        stage: tells what runs now.
    """

    def __init__(self, known: Iterable[Tensor], stage: Callable[[], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes, self.peak = 0, 0
        self.kernels: dict[str, set[str]] = {}
        self.operations: dict[str, int] = {}
        self._stage = stage
        self._formulas = operations.formulas()
        self._references: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._follow(tensor, counts=False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        stage = self._stage()
        if _ATTENTION in (name := func.name()):
            self.kernels.setdefault(stage, set()).add(name.removeprefix("aten::"))
        if (count := self._formulas.get(func.overloadpacket)) is not None:
            made = count(*args, **(kwargs or {}), out_val=result)
            self.operations[stage] = self.operations.get(stage, 0) + made
        for item in tree_iter(result):
            if isinstance(item, Tensor):
                self._follow(item, counts=True)
        return result

    def take_peak(self) -> int:
        """The most bytes since the last call."""
        peak, self.peak = self.peak, self.bytes
        return peak

    def _follow(self, tensor: Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        number = id(storage)  # PyTorch keeps the object as long as the memory
        if number in self._references:
            return
        size = storage.nbytes() if counts else 0

        def gone(_: Any) -> None:
            self.bytes -= size
            self._references.pop(number, None)

        self._references[number] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


class CudaPeaks:
    """The same figures from CUDA's caching allocator.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def take_peak(self) -> tuple[int, int]:
        """The most bytes allocated, and reserved, since the last call."""
        found = (
            torch.cuda.max_memory_allocated(self._device),
            torch.cuda.max_memory_reserved(self._device),
        )
        torch.cuda.reset_peak_memory_stats(self._device)
        return found


def weight_bytes(*modules: torch.nn.Module) -> int:
    """Of all parameters and buffers, shared ones once."""
    return sum({s.data_ptr(): s.nbytes() for s in map(_storage, tensors_of(*modules))}.values())


def tensors_of(*modules: torch.nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [t for module in modules for t in (*module.parameters(), *module.buffers())]


def cache_bytes(cache: Any) -> int:
    """Keys and values of a transformers cache; 0 without one."""
    layers = [] if cache is None else cache.layers
    found = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
    return sum(tensor.nbytes for tensor in found)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
