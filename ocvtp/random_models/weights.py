"""Random weights for a configuration of a vision-language model."""

from __future__ import annotations

from typing import Any

import torch


def materialise(config: Any, dtype: str = "auto", device: str = "cpu", seed: int = 0) -> Any:
    """A model of a configuration with random weights, in evaluation mode.

    Weights are drawn on the device in `dtype`; buffers keep the precision that loading a checkpoint
    gives them (rotary frequencies stay in float32).

    Args:
        config: of a vision-language model, of transformers.
        dtype: of the weights; `auto` for the configuration's.
        device: e.g. `cpu`, `cuda`; `meta` takes no memory and holds no numbers.
        seed: of the weights; torch's own random numbers are left as they are.
    """
    from transformers import AutoModelForImageTextToText

    name = (config.dtype or torch.float32) if dtype == "auto" else dtype
    kind = name if isinstance(name, torch.dtype) else getattr(torch, name)
    place = torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=kind)
    text = config.get_text_config()
    model.generation_config.eos_token_id = text.eos_token_id
    model.generation_config.pad_token_id = text.pad_token_id
    return model.eval()
