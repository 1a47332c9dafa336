"""The finished model as a folder that transformers reads, with a card of measured figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

import torch

from ocvtp.data.questions import KINDS
from ocvtp.data.scenes import LEVELS
from ocvtp.demo_vlm.learner import Learner
from ocvtp.demo_vlm.measure import Figure, measure
from ocvtp.demo_vlm.processor import build_processor
from ocvtp.demo_vlm.settings import DemoSettings, StageSettings
from ocvtp.demo_vlm.training import STATE_FOLDER
from ocvtp.files import replacing
from ocvtp.hosts.loading import load_model

FIGURES_FILE = "figures.json"

_TEMPLATE = Path(__file__).with_name("card.md")
_DROPPING = """\
In {}, the language model often read a random part of an image's tokens: a 24th to three quarters
of them, drawn towards a random direction of the features, at neighbouring positions.
Without it a model needs the background to say no, and keeping only the objects does worse than
keeping tokens at random. No pruner took part, but this model bears pruning better than one that
always read whole images."""

_Figures = dict[str, dict[str, Figure]]


def save_model(learner: Learner, settings: DemoSettings) -> None:
    """Write weights (fp16 safetensors), settings, tokenizer and processor; the learner is spent."""
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    learner.model.to(torch.float16).save_pretrained(folder)
    build_processor(settings.model).save_pretrained(folder)


def report(settings: DemoSettings, config: str) -> _Figures:
    """Measure the saved model; write the figures and the card.

    Args:
        settings: the recipe.
        config: its file, for the card.

    Returns:
        by level, then by what was asked.
    """
    folder = Path(settings.output)
    model, processor = load_model(str(folder), "float32", settings.device)
    size, seed = settings.model.image_size, settings.seed
    figures: _Figures = {
        level: measure(model, processor, level, settings.report, size, seed)
        for level in settings.report.levels
    }
    numbers = {
        "config": config,
        "report": asdict(settings.report),
        "figures": {
            level: {name: asdict(figure) for name, figure in found.items()}
            for level, found in figures.items()
        },
    }
    with replacing(folder / FIGURES_FILE) as temporary:
        temporary.write_text(json.dumps(numbers, indent=1) + "\n")
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(card(settings, config, figures, _parameters(model)))
    return figures


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def figure_table(figures: Mapping[str, Mapping[str, Figure]]) -> str:
    """Accuracies in percent with their intervals, in Markdown."""
    columns = [*KINDS, "all", "shuffled"]
    rows = ["| scenes | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for level, found in figures.items():
        cells = [_cell(found[name]) if name in found else "-" for name in columns]
        rows.append(f"| {level} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cell(figure: Figure) -> str:
    return f"{100 * figure.accuracy:.1f} ({100 * figure.low:.1f} to {100 * figure.high:.1f})"


def stage_table(stages: list[StageSettings]) -> str:
    """The recipe in Markdown."""
    rows = [
        "| stage | steps x images | learns | questions | tokens dropped |",
        "|---|---|---|---|---|",
    ]
    for stage in stages:
        losses = [name for name in ("dense", "align", "answer") if getattr(stage, name)]
        tower = "with the tower" if stage.tower_learning_rate else "tower frozen"
        asked = f"{stage.questions} an image, {stage.prompts}" if stage.questions else "-"
        dropped = f"in {stage.drop:.0%} of the steps" if stage.drop else "-"
        rows.append(
            f"| {stage.name} | {stage.steps} x {stage.batch_size} |"
            f" {' + '.join(losses)}, {tower} | {asked} | {dropped} |"
        )
    return "\n".join(rows)


def card(
    settings: DemoSettings,
    config: str,
    figures: Mapping[str, Mapping[str, Figure]],
    num_parameters: int,
) -> str:
    """The model card, `card.md` filled in."""
    model, shown, stages = settings.model, settings.report, settings.stages
    hard = LEVELS["hard"]
    return Template(_TEMPLATE.read_text()).substitute(
        image_size=model.image_size,
        num_tokens=model.side**2,
        millions=f"{num_parameters / 1e6:.2f}",
        tower=f"width {model.tower_dim} and {model.tower_layers} layers",
        patch_size=model.patch_size,
        reader=f"width {model.text_dim} and {model.text_layers} layers",
        hard_objects=f"{hard.num_objects[0]} to {hard.num_objects[1]}",
        config=config,
        seed=settings.seed,
        stages=stage_table(stages),
        hard_shares=", ".join(f"{stage.name} {stage.hard:.0%}" for stage in stages),
        dropping=_dropping(stages),
        num_images=shown.num_images,
        split=shown.split,
        num_questions=shown.questions,
        figures=figure_table(figures),
        figures_file=FIGURES_FILE,
        state_folder=STATE_FOLDER,
    )


def _dropping(stages: list[StageSettings]) -> str:
    names = [stage.name for stage in stages if stage.drop]
    if not names:
        return "None: this model has only read whole images, so do not compare pruners on it."
    return _DROPPING.format(", ".join(names))
