"""Looking inside a vision tower whose attention projections are fused, without hooks.

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

from ocvtp.serving.plan import ServedTower
from ocvtp.structures import Needs, VisualTokens
from ocvtp.towers import taps


def see(
    tower: Any,
    pixel_values: Tensor,
    needs: Needs,
    served: ServedTower,
    whole_heads: Callable[[Tensor], Tensor],
) -> VisualTokens:
    """Run a tower of vLLM and gather what a pruner reads of it.

    Args:
        tower: vLLM's CLIP or SigLIP vision model.
        pixel_values: [B, 3, H, W].
        needs: of the pruner; what lies after the tower (`projected`) is left out.
        served: what the tower has.
        whole_heads: [B, T, D / R] of this rank's heads -> [B, T, D] of all heads.

    Returns:
        the tokens of the last layer that is built, and what `needs` names of the tower.
    """
    blocks = {served.block(n) for n in (*needs.keys, *(block for block, _ in needs.attention))}
    layers = {served.layer(number) for number in needs.hidden} | blocks | {served.num_built}
    hidden = _layers(tower, pixel_values, sorted(layers))
    record = taps.Recording(hidden=hidden)
    encoder = tower.vision_model.encoder
    for number in sorted(blocks):
        queries, keys = _query_key(encoder.layers[number], hidden[number])
        record.queries[number], record.keys[number] = whole_heads(queries), whole_heads(keys)
    view = _whole_tower(encoder, served)
    found = taps.gather(record, view, needs, served.num_prefix)
    selected = hidden[served.num_built]  # [B, T, D]
    if needs.cls:
        found["cls"] = selected[:, 0]
    return VisualTokens(selected[:, served.num_prefix :], served.grid_hw, **found)


def _layers(tower: Any, pixel_values: Tensor, numbers: list[int]) -> dict[int, Tensor]:
    """Number -> [B, T, D], the CLS included; the tower returns them side by side."""
    wide = tower(pixel_values, select_layers=numbers, feature_select_strategy="full")
    return dict(zip(numbers, wide.chunk(len(numbers), dim=-1), strict=True))


def _query_key(block: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's queries and keys of a block from its input, [B, T, D / R] each."""
    fused, _ = block.self_attn.qkv_proj(block.layer_norm1(states))
    queries, keys, _ = fused.chunk(3, dim=-1)
    return queries, keys


def _whole_tower(encoder: Any, served: ServedTower) -> taps.Tower:
    """The tower as if all blocks were built, so that negative numbers count from its end."""
    left_out = [nn.Identity() for _ in range(served.num_blocks - len(encoder.layers))]
    return taps.Tower(
        blocks=[*encoder.layers, *left_out],
        num_heads=encoder.config.num_attention_heads,
        query_key=_no_hooks,
    )


def _no_hooks(block: Any) -> tuple[nn.Module, nn.Module]:
    raise AssertionError("the tower of a server is not hooked")
