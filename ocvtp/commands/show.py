"""`ocvtp show`: what pruners keep of images, and slot masks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ocvtp.commands import options
from ocvtp.commands import output as printing
from ocvtp.evaluation.towers import TowerSubject
from ocvtp.explore.kept import Looked, Stage, check_prompt, in_model, on_tower
from ocvtp.hosts.base import Tiling
from ocvtp.hosts.loading import check_model, load_model, open_image
from ocvtp.hosts.prompt.chat_template import with_template
from ocvtp.hosts.prompt.checks import refuse_beyond_all
from ocvtp.hosts.registry import find_host
from ocvtp.pruners import Pruner
from ocvtp.pruners.specs import build_specs
from ocvtp.reporting.figure_files import save_figure
from ocvtp.visualize import Panel, figure, figure_of_images


def run(arguments: argparse.Namespace) -> int:
    """Draw and say where."""
    printing.file(arguments.output)
    options.check_tower(arguments)
    pruners = build_specs(arguments.pruner, **options.pruner_settings(arguments))
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
    check_prompt(pruners, prompt)
    check_model(model, dtype, device, pruners, text_tower)
    pictures = list(map(open_image, files))
    vlm, processor = load_model(model, dtype, device)
    host = find_host(vlm, tiling)
    for pruner in pruners:
        refuse_beyond_all(host, pruner)
    text = with_template(processor, prompt or "", 1)
    drawn = [in_model(host, processor, pruners, text, one, text_tower) for one in pictures]
    return _written(drawn, files, pruners, output, hide_image)


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
    shared = tower.sharing(pruners)
    drawn = [on_tower(tower, pruners, picture, shared) for picture in pictures]
    result = _written(drawn, images, pruners, output, hide_image)
    labelled = zip(_labels(pruners), pruners, strict=True)
    if notes := {label: note for label, pruner in labelled if (note := tower.note(pruner))}:
        result["notes"] = notes
    return result


def _written(
    drawn: Sequence[Looked],
    files: Sequence[str],
    pruners: Sequence[Pruner],
    output: str,
    hide_image: bool,
) -> dict[str, Any]:
    """Write the figure, and say what it shows."""
    pictures = [(one.seen, _panels(one, pruners)) for one in drawn]
    if len(pictures) == 1:
        made = figure(*pictures[0], hide_image=hide_image)
    else:
        made = figure_of_images(pictures, hide_image=hide_image)
    save_figure(made, Path(output))
    facts = [_facts(one, pruners) for one in drawn]
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


def _panels(looked: Looked, pruners: Sequence[Pruner]) -> list[Panel]:
    panels = []
    for pruner, label in zip(pruners, _labels(pruners), strict=True):
        for stage in looked.stages[id(pruner)]:
            panels += _panels_of(stage, label)
    return panels


def _facts(looked: Looked, pruners: Sequence[Pruner]) -> dict[str, Any]:
    """Tokens of the image, and those kept by each pruner."""
    count = sum(rows * columns for rows, columns in looked.stages[id(pruners[0])][0].grids)
    labelled = zip(_labels(pruners), pruners, strict=True)
    kept = {label: len(looked.stages[id(pruner)][-1].cells) for label, pruner in labelled}
    return {"visual_tokens": count, "kept": kept}


def _panels_of(stage: Stage, label: str) -> list[Panel]:
    panels, first = [], 0
    for rows, columns in stage.grids:
        last = first + rows * columns
        here = stage.cells[(stage.cells >= first) & (stage.cells < last)] - first
        soft = None if stage.masks is None else stage.masks[:, first:last]
        grid = "" if len(stage.grids) == 1 else f" {rows} x {columns}"
        title = f"{label}{stage.place}{grid}"
        panels.append(Panel(title, here, soft, (rows, columns)))
        first = last
    return panels
