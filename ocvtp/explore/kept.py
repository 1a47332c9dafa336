"""What pruners keep of one image, stage by stage: in a model, or on a vision tower alone.

Cells are places of the grids that the tokens of an image form, one grid after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ocvtp.encoders.clip import ProcessorTransform
from ocvtp.evaluation.towers import TowerEncodings, TowerSubject
from ocvtp.hosts.attach import attached
from ocvtp.hosts.base import Host
from ocvtp.hosts.prompt.checks import refuse_beyond_context
from ocvtp.hosts.prompt.read_call import look
from ocvtp.hosts.prompt.read_prompt import make_reader
from ocvtp.hosts.prompt.select import Select, select
from ocvtp.hosts.prompt.shorten import Prompt
from ocvtp.hosts.registry import check
from ocvtp.pruners import Compose, Pruner
from ocvtp.structures import Selection, VisualTokens
from ocvtp.towers.joined_needs import covers, joined

Grids = tuple[tuple[int, int], ...]
"""Rows and columns of each."""


@dataclass(frozen=True)
class Stage:
    """What is left of the one image.

    Args:
        grids: of its tokens.
        cells: [K] of those that are left, ascending.
        masks: [S, cells] soft masks; None for pruners without.
        merged: [cells] the cell of the token that each was merged into, its own where it stayed,
            -1 where nothing of it is left; None where tokens are not merged, or nobody tells.
        place: follows the pruner's label in titles, where one of several places is meant.
    """

    grids: Grids
    cells: Tensor
    masks: Tensor | None = None
    merged: Tensor | None = None
    place: str = ""


@dataclass(frozen=True, eq=False)
class Looked:
    """One image [H, W, 3] as the tower saw it, and its stages under each pruner, by id."""

    seen: NDArray[np.uint8]
    stages: Mapping[int, Sequence[Stage]]


def check_prompt(pruners: Sequence[Pruner | Compose], prompt: str | None) -> None:
    """Refuse pruners that read the prompt where there is none.

    Raises:
        ValueError: that names them.
    """
    readers = dict.fromkeys(p.name for p in pruners if p.tower_needs.text or p.tower_needs.clip)
    if readers and prompt is None:
        raise ValueError(f"{' and '.join(readers)} reads the prompt; pass --prompt.")


def runs_inside(pruner: Pruner | Compose) -> bool:
    """Whether it takes a run of the model to see what it does."""
    return any(part.stage != "llm_input" for part in pruner.parts)


@torch.no_grad()
def in_model(
    host: Host,
    processor: Any,
    pruners: Sequence[Pruner | Compose],
    text: str,
    picture: Image.Image,
    text_tower: Any = None,
    choose: Select = select,
) -> Looked:
    """What pruners keep of an image in a model.

    The image is encoded once for all pruners that agree on what they read; those that act inside of
    the model run in it.

    Args:
        host: of the model, its tiling as wanted.
        processor: of the model.
        pruners: that fit the model.
        text: the prompt, the chat template around it.
        picture: the image.
        text_tower: see `ocvtp.attach`.
        choose: what runs `select` of pruners that do not act inside.

    Raises:
        ValueError: if a pruner does not fit.
    """
    inputs = processor(images=[picture], text=[text], return_tensors="pt")
    refuse_beyond_context(host, inputs["input_ids"], without_images=True)
    pixels = dict(inputs)
    inputs = inputs.to(host.model.device, host.model.dtype)
    outside = {id(pruner): pruner.parts[0] for pruner in pruners if not runs_inside(pruner)}
    for part in outside.values():
        check(host, part)
    unions = joined(part.needs for part in outside.values())
    stages: dict[int, list[Stage]] = {}
    for needs in unions:
        left = {number: part for number, part in outside.items() if number not in stages}
        reader = make_reader(host, needs, processor, text_tower)
        hooks = host.install(needs)
        try:
            encoded = look(host, needs, inputs, reader).encoded
        finally:
            for hook in hooks:
                hook.remove()
        place = host.grids(encoded), host.cells(encoded)
        for number, part in left.items():
            if covers(needs, part.needs):
                selection = choose(part, encoded.tokens)
                stages[number] = [_of_tokens(part, encoded.tokens, selection, *place)]
    for pruner in filter(runs_inside, pruners):
        stages[id(pruner)] = _by_running(host, processor, pruner, inputs, text_tower)
    return Looked(as_seen(host, processor, pixels), stages)


@torch.no_grad()
def on_tower(
    tower: TowerSubject,
    pruners: Sequence[Pruner | Compose],
    picture: Image.Image,
    shared: TowerEncodings,
    choose: Select = select,
) -> Looked:
    """What pruners keep of an image on a vision tower alone.

    Args:
        tower: that they fit. pruners: of stage `llm_input`. picture: the image.
        shared: of the tower, for these pruners. choose: see `in_model`.
    """
    pixels, stages = tower.pictures([picture]), {}
    for pruner in pruners:
        (part,) = pruner.parts
        tokens = shared.tokens(pixels, pruner.tower_needs)
        cells, grids = torch.arange(tokens.num_tokens)[None], (tokens.grid_hw,)
        selection = choose(part, tokens)
        stages[id(pruner)] = [_of_tokens(part, tokens, selection, grids, cells)]
    transform: Any = tower.encoder.transform
    return Looked(_as_pixels(transform.denormalize(pixels[0].float().cpu())), stages)


def stages_of_run(host: Host, pruner: Pruner | Compose, prompt: Prompt) -> list[Stage]:
    """What is left after each stage of a pruner, of a prompt that it shortened.

    Args:
        host: of the model. pruner: that was attached. prompt: see `on_prune` of `ocvtp.attach`.
    """
    encoded = prompt.encoded
    grids, cells = host.grids(encoded), host.cells(encoded)
    if not runs_inside(pruner):
        (part,) = pruner.parts
        return [_of_tokens(part, encoded.tokens, prompt.selection, grids, cells)]
    stages = []
    if any(part.stage != "llm_layers" for part in pruner.parts):
        merged = _merged(prompt.selection, cells)
        stages.append(Stage(grids, _chosen(cells, prompt.selection), merged=merged))
    for stayed in [] if prompt.layers is None else prompt.layers.kept:
        places = stayed.places if stayed.valid is None else stayed.places[stayed.valid][None]
        own = cells[0].gather(0, places[0][places[0] >= 0].cpu())
        stages.append(Stage(grids, own.sort().values, place=f", layer {stayed.layer}"))
    return stages


def as_seen(host: Host, processor: Any, images: dict[str, Any]) -> NDArray[np.uint8]:
    """[H, W, 3] the first image of a call as the tower saw it.

    Args:
        host: of the model. processor: its own. images: what that made, on the CPU.
    """
    view = host.picture(images).float()
    return _as_pixels(ProcessorTransform(processor.image_processor).denormalize(view))


def _as_pixels(colours: Tensor) -> NDArray[np.uint8]:
    """[3, H, W] in 0..1 -> [H, W, 3]."""
    pixels: NDArray[np.uint8] = (colours * 255).round().byte().permute(1, 2, 0).numpy()
    return pixels


def _by_running(
    host: Host, processor: Any, pruner: Pruner | Compose, inputs: Any, text_tower: Any
) -> list[Stage]:
    prompts: list[Prompt] = []
    settings = {"processor": processor, "text_tower": text_tower, **asdict(host.tiling)}
    with attached(host.model, pruner, on_prune=prompts.append, **settings):
        host.model(**inputs, logits_to_keep=1)
    return stages_of_run(host, pruner, prompts[0])


def _of_tokens(
    pruner: Pruner, tokens: VisualTokens, selection: Selection, grids: Grids, cells: Tensor
) -> Stage:
    """What a pruner keeps of the tokens that would go to the language model.

    Args:
        pruner: any of that stage. tokens: of the image, or its tiles. selection: of these.
        grids: that they form. cells: of each among those of the grids, see `Host.cells`.
    """
    masks = pruner.masks(tokens)
    if masks is not None:
        masks = _on_cells(masks.float().cpu(), cells)
    return Stage(grids, _chosen(cells, selection), masks, _merged(selection, cells))


def _chosen(cells: Tensor, selection: Selection) -> Tensor:
    """Cells of what was selected, ascending."""
    chosen = cells.gather(1, selection.keep_indices.cpu())
    if selection.valid is not None:
        chosen = chosen[selection.valid.cpu()]
    return chosen[chosen >= 0].sort().values


def _merged(selection: Selection, cells: Tensor) -> Tensor | None:
    """See `Stage.merged`: of a token that went to several, where most went, the first of equals."""
    if selection.merge is None:
        return None
    weights = selection.in_raster_order().merge
    assert weights is not None
    weights = weights[:, :, 1:].float().abs().cpu()  # [I, K, N]
    most, row = weights.max(dim=1)
    places = cells.gather(1, selection.keep_indices.cpu()).gather(1, row)  # [I, N]
    places = places.masked_fill(most == 0, -1)
    found = torch.full((int(cells.max()) + 2,), -1)
    found = found.scatter(0, (cells + 1).flatten(), places.flatten())[1:]
    stayed = _chosen(cells, selection)
    found[stayed] = stayed
    return None if bool(((found == torch.arange(len(found))) | (found < 0)).all()) else found


def _on_cells(masks: Tensor, cells: Tensor) -> Tensor:
    """[I, S, N] of the image, or of its tiles, as [I S, cells], 0 where a tile has no token."""
    places = cells[:, None].expand_as(masks)
    drawn = masks.new_zeros(*masks.shape[:2], int(cells.max()) + 2)
    return drawn.scatter(2, places + 1, masks)[:, :, 1:].flatten(0, 1)
