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
from ocvtp.evaluation.labels import ORACLE, RANDOM, SHUFFLED, UNPRUNED
from ocvtp.hosts.loading import load_model
from ocvtp.reporting.files import replacing
from tools.demo_vlm.learner import Learner
from tools.demo_vlm.measure import SHARE, measure
from tools.demo_vlm.processor import build_processor
from tools.demo_vlm.retrieval import measure_text_tower
from tools.demo_vlm.settings import DemoSettings, StageSettings
from tools.demo_vlm.text_tower import FOLDER
from tools.demo_vlm.training import STATE_FOLDER

FIGURES_FILE = "figures.json"

_TEMPLATE = Path(__file__).with_name("card.md")
_TEXT_TOWER = Path(__file__).with_name("card_text_tower.md")
_DROPPING = """\
In {}, the language model often read a random part of an image's tokens: a 24th to three quarters
of them, drawn towards a random direction of the features, at neighbouring positions.
Without it a model needs the background to say no, and keeping only the objects does worse than
keeping tokens at random. No pruner took part, but this model bears pruning better than one that
always read whole images."""


def save_model(learner: Learner, settings: DemoSettings) -> None:
    """Write weights (fp16 safetensors), settings, tokenizer and processor; the learner is spent."""
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    learner.model.to(torch.float16).save_pretrained(folder)
    build_processor(settings.model).save_pretrained(folder)


def report(settings: DemoSettings, config: str) -> dict[str, Any]:
    """Measure the saved model; write the figures and the card.

    Args:
        settings: the recipe.
        config: its file, for the card.

    Returns:
        See `measure`; with `text_tower`, see `measure_text_tower`, where there is one.
    """
    folder = Path(settings.output)
    figures = measure(settings, folder / STATE_FOLDER / "answers")
    if settings.text_tower is not None:
        figures["text_tower"] = measure_text_tower(settings)
    with replacing(folder / FIGURES_FILE) as temporary:
        temporary.write_text(json.dumps({"config": config, **figures}, indent=1) + "\n")
    model, _ = load_model(settings.output, "float32")
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(card(settings, config, figures, _parameters(model)))
    return figures


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def figure_table(facts: Mapping[str, Any]) -> str:
    """Accuracies in percent with their intervals, in Markdown: a row a level."""
    columns = [*KINDS, "all"]
    whole, shuffled = figures_of(facts, UNPRUNED), figures_of(facts, SHUFFLED)
    head = [*columns, "all, shuffled"]
    rows = ["| scenes | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for metric in facts["metrics"]:
        level = metric.partition("/")[0]
        cells = [cell(whole.get(f"{level}/{name}")) for name in columns]
        rows.append(f"| {level} | " + " | ".join([*cells, cell(shuffled[metric])]) + " |")
    return "\n".join(rows)


def control_table(facts: Mapping[str, Any]) -> str:
    """The same of an 18th of the tokens: chosen at random, and by the oracle."""
    few = [figures_of(facts, label) for label in (RANDOM, ORACLE)]
    rows = ["| scenes | random | oracle | oracle minus random |", "|---|---|---|---|"]
    for metric in facts["metrics"]:
        cells = [
            cell(figures[metric]) for figures in (*few, {metric: few[1][metric]["minus_random"]})
        ]
        rows.append(f"| {metric.partition('/')[0]} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def figures_of(facts: Mapping[str, Any], label: str) -> dict[str, Any]:
    """By name, those of the first row of a label."""
    found: dict[str, Any] = next(row for row in facts["rows"] if row["label"] == label)["figures"]
    return found


def cell(figure: Mapping[str, float] | None) -> str:
    """A share with its interval, in percent; `-` where there is none."""
    if figure is None:
        return "-"
    value, low, high = (100 * figure[name] for name in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


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
    figures: Mapping[str, Any],
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
        share=SHARE,
        controls=control_table(figures),
        text_tower=_text_tower(settings, figures),
        figures_file=FIGURES_FILE,
        state_folder=STATE_FOLDER,
    )


def _dropping(stages: list[StageSettings]) -> str:
    names = [stage.name for stage in stages if stage.drop]
    if not names:
        return "None: this model has only read whole images, so do not compare pruners on it."
    return _DROPPING.format(", ".join(names))


def _text_tower(settings: DemoSettings, figures: Mapping[str, Any]) -> str:
    """The section of the text tower; nothing where there is none."""
    if settings.text_tower is None:
        return ""
    names = ("caption", "chance", "patches")
    rows = ["| scenes | caption | by lot | patches |", "|---|---|---|---|"]
    for level, found in figures["text_tower"].items():
        rows.append(f"| {level} | " + " | ".join(cell(found[name]) for name in names) + " |")
    facts = asdict(settings.text_tower)
    template = Template(_TEXT_TOWER.read_text())
    return template.substitute(folder=FOLDER, figures="\n".join(rows), **facts)
