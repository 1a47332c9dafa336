"""The trained model in two folders: without the tower's weights, and whole.

The first may be passed on; the second is what transformers reads. Weights of the tower come from
the folder that timm wrote, each time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging as hf_logging

from tools.photo_vlm.tower import convert, read_timm

_TOWER = "vision_tower."


def save_reader(model: Any, processor: Any, folder: Path) -> None:
    """Write projector, language model (fp16 safetensors), settings, tokenizer and processor.

    Args:
        model: LlavaForConditionalGeneration; its tower is left out.
        processor: its own.
        folder: made where absent.
    """
    state = {
        name: value.to(torch.float16)
        for name, value in model.state_dict().items()
        if _TOWER not in name
    }
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)


def assemble(reader: str | Path, tower: str | Path, output: str | Path) -> Any:
    """Write the whole model, in float32, as a folder that transformers reads.

    Args:
        reader: folder of `save_reader`.
        tower: folder that timm wrote; the one that the reader was trained with.
        output: made where absent.

    Returns:
        the model.

    Raises:
        ValueError: if a folder is not what it should be, or the tower is of other sizes.
    """
    model = _read(Path(reader))
    vision = model.config.vision_config
    found = convert(read_timm(tower, vision.image_size))
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size"):
        given, known = getattr(found.config, name), getattr(vision, name)
        if given != known:
            raise ValueError(
                f"the tower of {tower} has {name}={given}, but {reader} was trained with {known};"
                " pass the tower that it was trained with."
            )
    model.model.vision_tower.load_state_dict(found.state_dict())
    model.save_pretrained(output)
    AutoProcessor.from_pretrained(reader).save_pretrained(output)
    return model


def _read(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model; pass the folder `reader` of a training.")
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # the tower's weights are left out on purpose
    try:
        model, info = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    finally:
        hf_logging.set_verbosity(before)
    if lost := sorted(name for name in info["missing_keys"] if _TOWER not in name):
        raise ValueError(f"{folder} lacks {len(lost)} weights, e.g. {lost[0]}; train it again.")
    return model.eval()
