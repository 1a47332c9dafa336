"""Frozen vision towers: `clip.CLIPEncoder` (transformers) and `timm.TimmEncoder`."""
