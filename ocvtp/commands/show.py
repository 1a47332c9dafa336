"""`ocvtp show`: what pruners keep of an image, and slot masks.

N visual tokens, K kept, S slots.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ocvtp.commands import options
from ocvtp.commands import output as printing
from ocvtp.encoders.clip import ProcessorTransform
from ocvtp.hosts.attach import find_host
from ocvtp.hosts.base import Tiling
from ocvtp.hosts.loading import load_model, open_image
from ocvtp.hosts.reading import make_reader
from ocvtp.hosts.rewrite import look
from ocvtp.pruners import Pruner
from ocvtp.structures import Needs, VisualTokens
from ocvtp.visualize import Panel, figure, save_figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    options.add_model(parser)
    options.add_pruner(parser, several=True)
    parser.add_argument("--image", required=True, help="image file")
    parser.add_argument("--prompt", help="plain text, for pruners that read it")
    options.add_budget(parser)
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
        arguments.prompt,
        arguments.text_tower,
        Tiling(arguments.budget),
    )
    printing.emit(result, f"wrote {result['output']}", arguments.json)
    return 0


@torch.no_grad()
def show(
    model: str,
    pruners: Sequence[Pruner],
    image: str,
    output: str,
    dtype: str = "auto",
    device: str = "cpu",
    prompt: str | None = None,
    text_tower: str | None = None,
    tiling: Tiling | None = None,
) -> dict[str, Any]:
    """Draw what pruners keep of an image, and slot masks where there are any.

    The image is drawn as the vision tower saw it; where a model cuts it into tiles, once under the
    grid of its view of the whole and once under that of the tiles put together. It is encoded once
    for all pruners that agree on what they read.

    Args:
        model: see `load_model`.
        pruners: one or more.
        image: file. output: PNG or PDF to write.
        dtype: see `load_model`. device: where to run.
        prompt: plain text for pruners that read it; the model's chat template is put around it.
        text_tower: see `ocvtp.attach`.
        tiling: its `budget`, see there too.

    Returns:
        `output`, and of each pruner the number of tokens kept.

    Raises:
        ValueError: if something cannot be read, or a pruner does not fit the model.
    """
    picture = open_image(image)
    vlm, processor = load_model(model, dtype, device)
    host = find_host(vlm, tiling)
    text = options.with_template(processor, prompt or "", 1)
    inputs = processor(images=[picture], text=[text], return_tensors="pt")
    pixels = dict(inputs)
    inputs = inputs.to(device, vlm.dtype)
    _check_stages(pruners)
    groups = _agreeing(pruners)
    for needs, group in groups:
        host.check(needs)
        readers = [p.name for p in group if p.needs.text or p.needs.clip]
        if readers and prompt is None:
            raise ValueError(f"{' and '.join(readers)} reads the prompt; pass --prompt.")
    drawn: dict[int, tuple[list[Panel], int]] = {}
    for needs, group in groups:
        reader = make_reader(host, needs, processor, text_tower)
        hooks = host.install(needs)
        try:
            encoded = look(host, needs, inputs, reader).encoded
        finally:
            for hook in hooks:
                hook.remove()
        grids, cells = host.grids(encoded), host.cells(encoded)
        drawn |= {id(pruner): _panels(pruner, encoded.tokens, grids, cells) for pruner in group}
    panels = [panel for pruner in pruners for panel in drawn[id(pruner)][0]]
    kept = {pruner.name: drawn[id(pruner)][1] for pruner in pruners}
    view = host.picture(pixels).float()
    colours = ProcessorTransform(processor.image_processor).denormalize(view)
    seen = (colours * 255).round().byte().permute(1, 2, 0).numpy()  # [H, W, 3]
    save_figure(figure(seen, panels), Path(output))
    count = sum(rows * columns for rows, columns in grids)
    return {"output": output, "visual_tokens": count, "kept": kept}


def _check_stages(pruners: Sequence[Pruner]) -> None:
    for pruner in pruners:
        if len(pruner.parts) > 1 or pruner.stage != "llm_input":
            stages = " and ".join(part.stage for part in pruner.parts)
            raise ValueError(
                f"{pruner.name} acts at {stages}; `show` draws what pruners of stage llm_input"
                " keep (see `ocvtp list`)."
            )


def _agreeing(pruners: Sequence[Pruner]) -> list[tuple[Needs, list[Pruner]]]:
    """Groups that can be shown the same tokens, and what they need."""
    groups: list[tuple[Needs, list[Pruner]]] = []
    for pruner in pruners:
        for number, (needs, group) in enumerate(groups):
            try:
                groups[number] = (needs | pruner.needs, [*group, pruner])
                break
            except ValueError:  # they mean different things by the same name
                continue
        else:
            groups.append((pruner.needs, [pruner]))
    return groups


def _panels(
    pruner: Pruner, tokens: VisualTokens, grids: Sequence[tuple[int, int]], cells: Tensor
) -> tuple[list[Panel], int]:
    """What a pruner does with the one image, on each grid that its tokens are, and how many stay.

    Args:
        pruner: what prunes.
        tokens: of the image, or of its tiles.
        grids: one behind the other.
        cells: see `Host.cells`.
    """
    selection, masks = pruner.select(tokens), pruner.masks(tokens)
    chosen = cells.gather(1, selection.keep_indices.cpu())
    if selection.valid is not None:
        chosen = chosen[selection.valid.cpu()]
    indices = chosen[chosen >= 0].sort().values
    if masks is not None:
        masks = _on_cells(masks.float().cpu(), cells)
    panels, first = [], 0
    for rows, columns in grids:
        last = first + rows * columns
        here = indices[(indices >= first) & (indices < last)] - first
        soft = None if masks is None else masks[:, first:last]
        title = pruner.name if len(grids) == 1 else f"{pruner.name} {rows} x {columns}"
        panels.append(Panel(title, here, soft, (rows, columns)))
        first = last
    return panels, len(indices)


def _on_cells(masks: Tensor, cells: Tensor) -> Tensor:
    """[I, S, N] of the image, or of its tiles, as [I S, cells], 0 where a tile has no token."""
    places = cells[:, None].expand_as(masks)
    drawn = masks.new_zeros(*masks.shape[:2], int(cells.max()) + 2)
    return drawn.scatter(2, places + 1, masks)[:, :, 1:].flatten(0, 1)
