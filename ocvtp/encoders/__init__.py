"""Frozen vision towers.

`clip.CLIPEncoder`, `tiles.TiledEncoder` and `qwen.QwenEncoder` of transformers, `timm.TimmEncoder`.
"""
