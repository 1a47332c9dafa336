"""What an artifact says of the model whose visual tokens a scorer reads."""

from __future__ import annotations

from typing import Any

from ocvtp.hosts.base import Host
from ocvtp.selectors.scorer import Widths


def origin_of(host: Host, name: str) -> dict[str, Any]:
    """Fields of `ocvtp.selectors.network.SelectorConfig`: widths, host, tower, grid.

    Args:
        host: of the model, which may be without numbers.
        name: of the model: a folder, or a hub id.
    """
    config = host.model.config
    vision, text = getattr(config, "vision_config", None), config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)
    # Qwen2-VL calls the width of the language model `hidden_size` there.
    tower = getattr(vision, "embed_dim", 0) or getattr(vision, "hidden_size", 0)
    return {
        "widths": Widths(text.hidden_size, tower, heads),
        "host": {
            "model": name,
            "model_type": config.model_type,
            "width": text.hidden_size,
            "num_layers": len(host.language_model.layers),
        },
        "tower": name,
        "grid_hw": host.grid_hw or (1, host.usual_tokens or 1),
    }
