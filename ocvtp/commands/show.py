"""`ocvtp show`: what pruners keep of images, and slot masks."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ocvtp.commands import options
from ocvtp.commands import output as printing
from ocvtp.encoders.clip import ProcessorTransform
from ocvtp.evaluation.towers import TowerSubject
from ocvtp.hosts.attach import attached
from ocvtp.hosts.base import Host, Tiling
from ocvtp.hosts.loading import load_model, open_image
from ocvtp.hosts.prompt.chat_template import with_template
from ocvtp.hosts.prompt.checks import refuse_beyond_all
from ocvtp.hosts.prompt.read_prompt import make_reader
from ocvtp.hosts.prompt.shorten import Prompt, look
from ocvtp.hosts.registry import check, find_host
from ocvtp.pruners import Pruner
from ocvtp.pruners.specs import build_spec
from ocvtp.structures import Selection, VisualTokens
from ocvtp.towers.joined_needs import covers, joined
from ocvtp.visualize import Panel, figure, figure_of_images, save_figure


def run(arguments: argparse.Namespace) -> int:
    """Draw and say where."""
    printing.file(arguments.output)
    options.check_tower(arguments)
    specs, settings = arguments.pruner, options.pruner_settings(arguments)
    pruners = [build_spec(spec, **settings) for spec in specs]
    images, output = arguments.image, arguments.output
    if arguments.tower is not None:
        tower = TowerSubject(**options.tower_settings(arguments))
        result = show_tower(tower, pruners, images, output, arguments.hide_image)
    else:
        result = show(
            arguments.model,
            pruners,
            images,
            output,
            arguments.dtype,
            arguments.device,
            arguments.prompt,
            arguments.text_tower,
            Tiling(arguments.budget),
            arguments.hide_image,
        )
    said = "".join(f"{name}: {note}\n" for name, note in result.get("notes", {}).items())
    printing.emit(result, f"{said}wrote {result['output']}", arguments.json)
    return 0


def show(
    model: str,
    pruners: Sequence[Pruner],
    image: str | Sequence[str],
    output: str,
    dtype: str = "auto",
    device: str = "cpu",
    prompt: str | None = None,
    text_tower: str | None = None,
    tiling: Tiling | None = None,
    hide_image: bool = False,
) -> dict[str, Any]:
    """Draw what pruners keep of images, and slot masks where there are any.

    An image is drawn as the vision tower saw it; where a model cuts it into tiles, once under the
    grid of its view of the whole and once under that of the tiles put together. It is encoded once
    for all pruners that agree on what they read.

    Args:
        model: see `load_model`.
        pruners: one or more.
        image: file, or several. output: PNG or PDF to write.
        dtype: see `load_model`. device: where to run.
        prompt: plain text for pruners that read it; the model's chat template is put around it.
        text_tower: see `ocvtp.attach`.
        tiling: its `budget`, see there too.
        hide_image: see `ocvtp.visualize.figure`.

    Returns:
        `output`, and of each pruner the number of tokens kept; of the first image, and in `images`
        of each of several.

    Raises:
        ValueError: if something cannot be read, or a pruner does not fit the model.
    """
    files = [image] if isinstance(image, str) else list(image)
    pictures = list(map(open_image, files))
    vlm, processor = load_model(model, dtype, device)
    host = find_host(vlm, tiling)
    _check_prompt(pruners, prompt)
    for pruner in pruners:
        refuse_beyond_all(host, pruner)
    text = with_template(processor, prompt or "", 1)
    drawn = [_of_model(host, processor, pruners, text, one, text_tower) for one in pictures]
    return _written(drawn, files, pruners, output, hide_image)


@torch.no_grad()
def show_tower(
    tower: TowerSubject,
    pruners: Sequence[Pruner],
    images: Sequence[str],
    output: str,
    hide_image: bool = False,
) -> dict[str, Any]:
    """The same of a vision tower without a language model.

    Args:
        tower: what the pruners see.
        pruners: those that read no prompt; projected tokens are the tower's own.
        images: files. output: PNG or PDF to write. hide_image: as in `show`.

    Returns:
        as `show`; and `notes` by pruner, where there are any, see `Judged.note`.

    Raises:
        ValueError: if something cannot be read, or a pruner reads more.
    """
    pictures = list(map(open_image, images))
    for pruner in pruners:
        tower.fits(pruner)
    shared, drawn = tower.sharing(pruners), []
    for picture in pictures:
        pixels = tower.pictures([picture])
        stages = {}
        for pruner in pruners:
            tokens = shared.tokens(pixels, pruner.tower_needs)
            cells, grids = torch.arange(tokens.num_tokens)[None], (tokens.grid_hw,)
            stages[id(pruner)] = [_of_tokens(pruner, tokens, grids, cells)]
        transform: Any = tower.encoder.transform
        drawn.append(_Drawn(_seen(transform.denormalize(pixels[0].float().cpu())), stages))
    result = _written(drawn, images, pruners, output, hide_image)
    labelled = zip(_labels(pruners), pruners, strict=True)
    if notes := {label: note for label, pruner in labelled if (note := tower.note(pruner))}:
        result["notes"] = notes
    return result


@torch.no_grad()
def _of_model(
    host: Host,
    processor: Any,
    pruners: Sequence[Pruner],
    text: str,
    picture: Image.Image,
    text_tower: str | None,
) -> _Drawn:
    """What pruners keep of an image in a model."""
    vlm = host.model
    inputs = processor(images=[picture], text=[text], return_tensors="pt")
    pixels = dict(inputs)
    inputs = inputs.to(vlm.device, vlm.dtype)
    outside = [pruner for pruner in pruners if not _runs_inside(pruner)]
    for pruner in outside:
        check(host, pruner)
    unions = joined(pruner.needs for pruner in outside)
    stages: dict[int, list[_Stage]] = {}
    for needs in unions:
        left = [pruner for pruner in outside if id(pruner) not in stages]
        group = [pruner for pruner in left if covers(needs, pruner.needs)]
        reader = make_reader(host, needs, processor, text_tower)
        hooks = host.install(needs)
        try:
            encoded = look(host, needs, inputs, reader).encoded
        finally:
            for hook in hooks:
                hook.remove()
        place = host.grids(encoded), host.cells(encoded)
        stages |= {id(pruner): [_of_tokens(pruner, encoded.tokens, *place)] for pruner in group}
    for pruner in filter(_runs_inside, pruners):
        settings = {"processor": processor, "text_tower": text_tower, **asdict(host.tiling)}
        stages[id(pruner)] = _by_running(vlm, host, pruner, inputs, settings)
    view = host.picture(pixels).float()
    return _Drawn(_seen(ProcessorTransform(processor.image_processor).denormalize(view)), stages)


def _written(
    drawn: Sequence[_Drawn],
    files: Sequence[str],
    pruners: Sequence[Pruner],
    output: str,
    hide_image: bool,
) -> dict[str, Any]:
    """Write the figure, and say what it shows."""
    pictures = [(one.seen, one.panels(pruners)) for one in drawn]
    if len(pictures) == 1:
        made = figure(*pictures[0], hide_image=hide_image)
    else:
        made = figure_of_images(pictures, hide_image=hide_image)
    save_figure(made, Path(output))
    facts = [one.facts(pruners) for one in drawn]
    result = {"output": output, **facts[0]}
    if len(files) > 1:
        pairs = zip(files, facts, strict=True)
        result["images"] = [{"image": file, **counts} for file, counts in pairs]
    return result


def _labels(pruners: Sequence[Pruner]) -> list[str]:
    """Their names; of several of one name, with the settings in which they differ."""
    labels = []
    for pruner in pruners:
        alike = [other for other in pruners if other.name == pruner.name]
        names = [f.name for f in fields(pruner) if f.repr]
        own = {
            name: getattr(pruner, name)
            for name in names
            if any(getattr(other, name) != getattr(pruner, name) for other in alike)
        }
        told = ",".join(f"{name}={value}" for name, value in own.items())
        labels.append(f"{pruner.name}:{told}" if told else pruner.name)
    return labels


@dataclass(frozen=True, eq=False)
class _Drawn:
    """One image [H, W, 3] as the tower saw it, and its stages under each pruner, by id."""

    seen: NDArray[np.uint8]
    stages: Mapping[int, Sequence[_Stage]]

    def panels(self, pruners: Sequence[Pruner]) -> list[Panel]:
        panels = []
        for pruner, label in zip(pruners, _labels(pruners), strict=True):
            for stage in self.stages[id(pruner)]:
                panels += stage.panels(label)
        return panels

    def facts(self, pruners: Sequence[Pruner]) -> dict[str, Any]:
        """Tokens of the image, and those kept by each pruner."""
        count = sum(rows * columns for rows, columns in self.stages[id(pruners[0])][0].grids)
        labelled = zip(_labels(pruners), pruners, strict=True)
        kept = {label: len(self.stages[id(pruner)][-1].cells) for label, pruner in labelled}
        return {"visual_tokens": count, "kept": kept}


@dataclass(frozen=True)
class _Stage:
    """What is left of the one image: `cells` of its `grids`, and soft masks [S, cells].

    `place` follows the pruner's label in titles, where one of several places is meant.
    """

    grids: tuple[tuple[int, int], ...]
    cells: Tensor
    masks: Tensor | None = None
    place: str = ""

    def panels(self, label: str) -> list[Panel]:
        panels, first = [], 0
        for rows, columns in self.grids:
            last = first + rows * columns
            here = self.cells[(self.cells >= first) & (self.cells < last)] - first
            soft = None if self.masks is None else self.masks[:, first:last]
            grid = "" if len(self.grids) == 1 else f" {rows} x {columns}"
            title = f"{label}{self.place}{grid}"
            panels.append(Panel(title, here, soft, (rows, columns)))
            first = last
        return panels


def _runs_inside(pruner: Pruner) -> bool:
    """Whether it takes a run of the model to see what it does."""
    return any(part.stage != "llm_input" for part in pruner.parts)


def _check_prompt(pruners: Sequence[Pruner], prompt: str | None) -> None:
    readers = [p.name for p in pruners if p.tower_needs.text or p.tower_needs.clip]
    if readers and prompt is None:
        raise ValueError(f"{' and '.join(readers)} reads the prompt; pass --prompt.")


def _of_tokens(
    pruner: Pruner, tokens: VisualTokens, grids: tuple[tuple[int, int], ...], cells: Tensor
) -> _Stage:
    """What a pruner keeps of the tokens that would go to the language model.

    Args:
        pruner: any of that stage. tokens: of the image, or its tiles.
        grids: that they form. cells: of each among those of the grids, see `Host.cells`.
    """
    masks = pruner.masks(tokens)
    if masks is not None:
        masks = _on_cells(masks.float().cpu(), cells)
    return _Stage(grids, _chosen(cells, pruner.select(tokens)), masks)


def _seen(colours: Tensor) -> NDArray[np.uint8]:
    """[3, H, W] in 0..1 -> [H, W, 3]."""
    pixels: NDArray[np.uint8] = (colours * 255).round().byte().permute(1, 2, 0).numpy()
    return pixels


def _by_running(
    vlm: Any, host: Host, pruner: Pruner, inputs: Any, settings: dict[str, Any]
) -> list[_Stage]:
    """What is left after each stage of a pruner."""
    prompts: list[Prompt] = []
    with attached(vlm, pruner, on_prune=prompts.append, **settings):
        vlm(**inputs, logits_to_keep=1)
    (prompt,) = prompts
    grids, cells = host.grids(prompt.encoded), host.cells(prompt.encoded)
    stages = []
    if any(part.stage != "llm_layers" for part in pruner.parts):
        stages.append(_Stage(grids, _chosen(cells, prompt.selection)))
    for stayed in [] if prompt.layers is None else prompt.layers.kept:
        places = stayed.places if stayed.valid is None else stayed.places[stayed.valid][None]
        own = cells[0].gather(0, places[0][places[0] >= 0].cpu())
        stages.append(_Stage(grids, own.sort().values, place=f", layer {stayed.layer}"))
    return stages


def _chosen(cells: Tensor, selection: Selection) -> Tensor:
    """Cells of what was selected, ascending."""
    chosen = cells.gather(1, selection.keep_indices.cpu())
    if selection.valid is not None:
        chosen = chosen[selection.valid.cpu()]
    return chosen[chosen >= 0].sort().values


def _on_cells(masks: Tensor, cells: Tensor) -> Tensor:
    """[I, S, N] of the image, or of its tiles, as [I S, cells], 0 where a tile has no token."""
    places = cells[:, None].expand_as(masks)
    drawn = masks.new_zeros(*masks.shape[:2], int(cells.max()) + 2)
    return drawn.scatter(2, places + 1, masks)[:, :, 1:].flatten(0, 1)
