"""The card of a trained model: what it knows, and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from ocvtp.evaluation.labels import ORACLE, RANDOM, SHUFFLED, UNPRUNED
from tools.demo_vlm.card import cell, figures_of
from tools.photo_vlm.composites import MOST_OBJECTS
from tools.photo_vlm.cutouts import Cutouts
from tools.photo_vlm.settings import PhotoSettings

_TEMPLATE = Path(__file__).with_name("card.md")


def figure_table(facts: Mapping[str, Any]) -> str:
    """Accuracies in percent with their intervals, in Markdown: a row a condition.

    Args:
        facts: of `ocvtp.evaluation.report.results`.
    """
    metrics = facts["metrics"]
    rows = ["| tokens | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for label in (UNPRUNED, SHUFFLED, RANDOM, ORACLE):
        found = figures_of(facts, label)
        rows.append(f"| {label} | " + " | ".join(cell(found[name]) for name in metrics) + " |")
    return "\n".join(rows)


def card(
    settings: PhotoSettings,
    facts: Mapping[str, Any],
    config: Any,
    num_parameters: int,
    cutouts: Mapping[str, Cutouts],
    share: int,
) -> str:
    """`card.md` filled in.

    Args:
        settings: the recipe. facts: see `figure_table`. config: of the whole model.
        num_parameters: without the tower.
        cutouts: of both splits.
        share: the controls kept one in so many tokens.
    """
    vision, names = config.vision_config, cutouts["train"].categories
    counts = {
        split: " | ".join(str(len(some)) for some in found.by_category.values())
        for split, found in cutouts.items()
    }
    task = facts["settings"]["task"]
    return Template(_TEMPLATE.read_text()).substitute(
        size=settings.size,
        num_tokens=(settings.size // vision.patch_size) ** 2,
        millions=f"{num_parameters / 1e6:.2f}",
        tower=f"width {vision.hidden_size} and {vision.num_hidden_layers} blocks",
        categories=", ".join(names),
        most_objects=MOST_OBJECTS,
        num_train=settings.num_train,
        head=" | ".join(names),
        rule="---|" * len(names),
        train_counts=counts["train"],
        test_counts=counts["test"],
        least_train=settings.rule.least_train,
        least_test=settings.rule.least_test,
        num_images=task["num_images"],
        num_questions=task["num_questions"],
        share=share,
        figures=figure_table(facts),
    )
