"""Reading what `torch.save` wrote, without running code of it."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_tensors(path: str | Path) -> dict[str, Any]:
    """Read a file of torch.save that holds tensors and plain values; runs no code of it.

    Raises:
        ValueError: if it is missing, damaged, packed, or holds anything else; and if a tensor of it
            says that it is larger than its memory.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; pass the path of a file, e.g. of its last.ckpt.")
    if not Path(path).is_file():
        beside = sorted(p.name for p in Path(path).parent.glob(f"*{Path(path).suffix or '.ckpt'}"))
        there = f" (beside it: {', '.join(beside)})" if beside else ""
        raise ValueError(f"{path} does not exist{there}; pass the path of a file.")
    try:
        _refuse_packed(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise anything
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values, which is never loaded"
            f" ({type(error).__name__})."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; pass a dictionary of tensors.")
    if name := _larger_than_held(content):
        raise ValueError(f"{path} is damaged: {name} says that it is larger than what it holds.")
    return content


def _refuse_packed(path: str | Path) -> None:
    """A few bytes can unpack to any number of them; torch.save packs nothing."""
    if not zipfile.is_zipfile(path):  # of the old format
        return
    with zipfile.ZipFile(path) as file:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
            raise ValueError("it is packed")


def _larger_than_held(content: Mapping[Any, Any]) -> str:
    """The name of a tensor, at the top or one below, that repeats its memory; empty without one.

    What is copied from such a tensor needs the memory that it says.
    """
    for name, value in content.items():
        inner = value.items() if isinstance(value, Mapping) else [(name, value)]
        for own, tensor in inner:
            if isinstance(tensor, Tensor) and not tensor.is_sparse:
                if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                    return repr(own)
    return ""
