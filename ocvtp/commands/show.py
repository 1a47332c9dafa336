"""`ocvtp show`: what pruners keep of an image, and slot masks.

N visual tokens, K kept, S slots.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ocvtp.commands import options
from ocvtp.commands import output as printing
from ocvtp.encoders.clip import ProcessorTransform
from ocvtp.hosts.attach import find_host
from ocvtp.hosts.loading import load_model, open_image
from ocvtp.pruners import Pruner
from ocvtp.structures import Needs
from ocvtp.visualize import Panel, figure, save_figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    options.add_model(parser)
    options.add_pruner(parser, several=True)
    parser.add_argument("--image", required=True, help="image file")
    parser.add_argument("--output", required=True, help="PNG or PDF to write")
    printing.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Draw and say where."""
    result = show(
        arguments.model,
        [options.build(spec, arguments) for spec in arguments.pruner],
        arguments.image,
        arguments.output,
        arguments.dtype,
        arguments.device,
    )
    printing.emit(result, f"wrote {result['output']}", arguments.json)
    return 0


def show(
    model: str,
    pruners: Sequence[Pruner],
    image: str,
    output: str,
    dtype: str = "auto",
    device: str = "cpu",
) -> dict[str, Any]:
    """Draw what pruners keep of an image, and slot masks where there are any.

    The image is drawn as the vision tower saw it. It is encoded once for all pruners.

    Args:
        model: see `load_model`.
        pruners: one or more.
        image: file. output: PNG or PDF to write.
        dtype: see `load_model`. device: where to run.

    Returns:
        `output`, and of each pruner the number of tokens kept.

    Raises:
        ValueError: if something cannot be read, or a pruner does not fit the model.
    """
    picture = open_image(image)
    vlm, processor = load_model(model, dtype, device)
    host = find_host(vlm)
    needs = Needs()
    for pruner in pruners:
        host.check(pruner.needs)
        needs |= pruner.needs
    pixels = processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    hooks = host.install(needs)
    try:
        with torch.no_grad():
            encoded = host.encode({"pixel_values": pixels.to(device, vlm.dtype)}, needs)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = encoded.tokens
    panels, kept = [], {}
    with torch.no_grad():
        for pruner in pruners:
            selection = pruner.select(tokens)
            masks = pruner.masks(tokens)
            kept[pruner.name] = int(selection.counts()[0])
            indices = selection.keep_indices[0, : kept[pruner.name]].cpu()
            soft = None if masks is None else masks[0].float().cpu()
            panels.append(Panel(pruner.name, indices, soft, tokens.grid_hw))
    colours = ProcessorTransform(processor.image_processor).denormalize(pixels[0].float())
    seen = (colours * 255).round().byte().permute(1, 2, 0).numpy()  # [H, W, 3]
    save_figure(figure(seen, panels), Path(output))
    return {"output": output, "visual_tokens": tokens.num_tokens, "kept": kept}
