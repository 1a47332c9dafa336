"""Frozen vision towers by name."""

from __future__ import annotations

import json
from pathlib import Path

from ocvtp.encoders.base import DType, FrozenEncoder
from ocvtp.encoders.clip import CLIPEncoder
from ocvtp.random_models.clip_config import SECOND_TO_LAST, selected_layer
from ocvtp.shipped import find_folder

_TIMM, _TIMM_OWN = "timm:", ("local-dir:", "hf-hub:")


def build_encoder(
    name: str,
    layer: int | None = None,
    img_size: int | None = None,
    dtype: DType = "float32",
) -> FrozenEncoder:
    """The encoder of a tower; no weights are read yet.

    Args:
        name: `local-dir:PATH`, `hf-hub:ID` or `timm:NAME` is a tower of timm, as are a folder that
            timm wrote and a name that timm lists; any other folder, hub id or `random:NAME` is one
            of transformers, what `CLIPEncoder` takes: CLIP, SigLIP, SigLIP2, DINOv2 or DINOv3.
        layer: number of `hidden_states` that its features are; None for the one that the language
            model reads where the name is a VLM's, and for the second to last of any other tower.
        img_size: pixels along the side of the square picture; None for the tower's own. CLIP,
            SigLIP and SigLIP2 of transformers have no other.
        dtype: of weights and computation.

    Raises:
        ValueError: if there is no such tower, layer, size or dtype.
    """
    if img_size is not None and img_size < 1:
        raise ValueError(f"img_size={img_size} counts pixels; pass a multiple of a patch's side.")
    if _is_of_timm(name):
        from ocvtp.encoders.timm import TimmEncoder

        args = {} if img_size is None else {"img_size": img_size}
        own = SECOND_TO_LAST if layer is None else layer
        return TimmEncoder(_name_for_timm(name), own, dtype=dtype, model_args=args)
    own = selected_layer(name) if layer is None else layer
    return CLIPEncoder(name, own, dtype, img_size=img_size)


def source_of(name: str) -> str:
    """The folder that the weights of a tower are read from, or its id."""
    return find_folder(name.removeprefix("local-dir:"))


def _is_of_timm(name: str) -> bool:
    if name.startswith((_TIMM, *_TIMM_OWN)) or _is_written_by_timm(Path(name)):
        return True
    import timm  # takes seconds

    return bool(timm.is_model(name))


def _name_for_timm(name: str) -> str:
    return f"local-dir:{name}" if Path(name).is_dir() else name.removeprefix(_TIMM)


def _is_written_by_timm(folder: Path) -> bool:
    """Whether its config.json names an architecture, and no `model_type` of transformers."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "architecture" in config and "model_type" not in config
