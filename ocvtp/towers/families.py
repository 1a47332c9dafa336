"""The vision towers of transformers: where their blocks are, and what is in one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ocvtp.towers.taps import BlockParts, Tower, Turn
from ocvtp.transformers_names import DINO_TOWERS, dino_blocks, dino_query_key, rotate_heads


def look(tower: Any) -> Tower:
    """Where things are in one of transformers' `VISION_TOWERS`."""
    return _dino_tower(tower) if tower.config.model_type in DINO_TOWERS else clip_tower(tower)


def clip_tower(tower: Any) -> Tower:
    """Where things are in a CLIP, SigLIP or SigLIP2 tower."""
    return Tower(
        blocks=tower.encoder.layers,
        num_heads=tower.config.num_attention_heads,
        query_key=_query_key_of_clip,
        encoder=tower.encoder,
        parts=_parts_of_clip,
    )


def _query_key_of_clip(block: Any) -> tuple[nn.Module, nn.Module]:
    return block.self_attn.q_proj, block.self_attn.k_proj


def _parts_of_clip(block: Any) -> BlockParts:
    return BlockParts(block.self_attn, block.layer_norm2, block.mlp)


def _dino_tower(tower: Any) -> Tower:
    """DINOv3's patches are turned by their positions, its CLS and registers are not."""
    encoder, blocks = dino_blocks(tower)
    return Tower(
        blocks=blocks,
        num_heads=tower.config.num_attention_heads,
        query_key=dino_query_key,
        encoder=encoder,
        parts=_parts_of_dino,
        turn=_TURN_OF_DINOV3 if tower.config.model_type == "dinov3_vit" else None,
    )


def _turned(attention: Any, heads: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    return rotate_heads(attention, heads, *tables)


_TURN_OF_DINOV3 = Turn(lambda block: block.attention, "position_embeddings", _turned)


def _parts_of_dino(block: Any) -> BlockParts:
    return BlockParts(block.attention, block.norm2, block.drop_path)
