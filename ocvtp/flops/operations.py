"""Operations of what runs, by PyTorch's own counter, on every device and version.

Matrix products, convolutions and attention: a multiplication and an addition are two, causal
attention is whole. Before 2.15 the counter does not know the kernel of attention on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry


def _attention_of_a_cpu(
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Of queries [B, H, M, D] to keys [B, h, N, D] and values [B, h, N, E]."""
    batch, heads, asking, width = query
    return 2 * batch * heads * asking * key[2] * (width + value[3])


def _backward_of_a_cpu(
    gradient: torch.Size,
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Five products: scores once more, and the gradients of weights, values, queries and keys."""
    batch, heads, asking, width = query
    return 2 * batch * heads * asking * key[2] * (3 * width + 2 * value[3])


_OURS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_of_a_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_of_a_cpu,
}


def counter() -> FlopCounterMode:
    """PyTorch's counter, a context manager, that misses no attention and prints nothing."""
    unknown = {kernel: own for kernel, own in _OURS.items() if kernel not in flop_registry}
    return FlopCounterMode(display=False, custom_mapping=unknown)


def formulas() -> Mapping[Any, Any]:
    """By overload packet a function of the call's arguments and `out_val=` its result."""
    found: Mapping[Any, Any] = counter().flop_registry
    return found
