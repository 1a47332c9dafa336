"""Looking inside a vision tower of vLLM, without hooks.

T are the tokens of the tower (CLS included), N those of the patches, R the ranks that share the
heads.

Servers capture and compile modules as they like, so nothing is hooked: the tower returns the layers
that are wanted, and the queries and keys of a block are computed again from its input, with its own
weights. That costs one projection of a block that is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ocvtp.serving.layouts import ServedTower
from ocvtp.structures import Needs
from ocvtp.towers import taps

QueryKey = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
"""A block and its input [B, T, D] -> its queries and keys [B, T, D], all heads side by side."""


def layers_wanted(needs: Needs, served: ServedTower) -> tuple[list[int], list[int]]:
    """The numbers of the layers that are read, the selected one included, and of the blocks."""
    blocks = {served.block(n) for n in needs.blocks}
    layers = {served.layer(number) for number in needs.hidden} | blocks | {served.num_built}
    return sorted(layers), sorted(blocks)


def gathered(
    hidden: dict[int, Tensor],
    blocks: list[Any],
    num_heads: int,
    needs: Needs,
    served: ServedTower,
    query_key: QueryKey,
) -> dict[str, Any]:
    """What a pruner reads inside of a tower, as arguments of `VisualTokens`.

    Args:
        hidden: number -> [B, T, D], of the layers of `layers_wanted`.
        blocks: those that are built.
        num_heads: of their attention.
        needs: of the pruner.
        served: what the tower has.
        query_key: of a block.
    """
    record = taps.Recording(hidden=hidden)
    for number in layers_wanted(needs, served)[1]:
        record.queries[number], record.keys[number] = query_key(blocks[number], hidden[number])
    # as if all blocks were built, so that negative numbers count from the tower's end
    left_out = [nn.Identity() for _ in range(served.num_blocks - len(blocks))]
    view = taps.Tower([*blocks, *left_out], num_heads, _no_hooks)
    return taps.gather(record, view, needs, served.num_prefix)


def look(
    tower: Any,
    pixel_values: Tensor,
    needs: Needs,
    served: ServedTower,
    whole_heads: Callable[[Tensor], Tensor],
) -> dict[str, Any]:
    """Run a CLIP or SigLIP of vLLM and gather what a pruner reads of it.

    Args:
        tower: vLLM's vision model.
        pixel_values: [B, 3, H, W].
        needs: of the pruner; what lies after the tower (`projected`) is left out.
        served: what the tower has.
        whole_heads: [B, T, D / R] of this rank's heads -> [B, T, D] of all heads.

    Returns:
        arguments of `VisualTokens`: `features`, the tokens of the last layer that is built, and
        what `needs` names of the tower.
    """

    def query_key(block: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        fused, _ = block.self_attn.qkv_proj(block.layer_norm1(states))
        queries, keys, _ = fused.chunk(3, dim=-1)
        return whole_heads(queries), whole_heads(keys)

    hidden = _layers(tower, pixel_values, layers_wanted(needs, served)[0])
    encoder = tower.vision_model.encoder
    heads = encoder.config.num_attention_heads
    found = gathered(hidden, [*encoder.layers], heads, needs, served, query_key)
    selected = hidden[served.num_built]  # [B, T, D]
    if needs.cls:
        found["cls"] = selected[:, 0]
    return {"features": selected[:, served.num_prefix :], **found}


def _layers(tower: Any, pixel_values: Tensor, numbers: list[int]) -> dict[int, Tensor]:
    """Number -> [B, T, D], the CLS included; the tower returns them side by side."""
    wide = tower(pixel_values, select_layers=numbers, feature_select_strategy="full")
    return dict(zip(numbers, wide.chunk(len(numbers), dim=-1), strict=True))


def _no_hooks(block: Any) -> tuple[nn.Module, nn.Module]:
    raise AssertionError("the tower of a server is not hooked")
