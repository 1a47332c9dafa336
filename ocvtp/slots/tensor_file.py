"""Reading what `torch.save` wrote, without running code of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load_tensors(path: str | Path) -> dict[str, Any]:
    """Read a file of torch.save that holds tensors and plain values; runs no code of it.

    Raises:
        ValueError: if it is missing, damaged, or holds anything else.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; pass the path of a file, e.g. of its last.ckpt.")
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; pass the path of a file.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise anything
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values, which is never loaded"
            f" ({type(error).__name__})."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; pass a dictionary of tensors.")
    return content
