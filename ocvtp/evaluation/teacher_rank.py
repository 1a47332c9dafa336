"""Layers of a frozen model, by how well it answers with the tokens that each attends to most."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
from torch import Tensor

from ocvtp.hosts.asking import Raters, attention_rows, drop, read
from ocvtp.reporting.markdown_table import table
from ocvtp.selectors.relaxations import hard_top_k
from ocvtp.training.figures import Figures
from ocvtp.training.selector import SelectorModule, capped_count, compared

Facts = dict[str, Any]
_FIGURES = ("accuracy", "kl")


@torch.no_grad()
def rank_layers(
    module: SelectorModule,
    batches: Iterable[dict[str, Any]],
    advance: Callable[[int], None] = lambda count: None,
) -> Facts:
    """Let the model answer with each layer's own top K, at the budgets of the validation.

    Args:
        module: on its device.
        batches: of questions. advance: is told how many of each were asked.

    Returns:
        `questions`, and `rows`: `layer`, `rows` (whose attention: the text's or the last token's),
        and by budget `accuracy_K` and `kl_K` to the answers with all tokens; the best first, and
        last random tokens, without a layer.

    Raises:
        ValueError: without questions.
    """
    host, found = module.frozen_host, dict[tuple[int | None, str], Figures]()
    total = 0
    for batch in batches:
        size = module.count(batch)
        advance(size + len(batch["errors"]))
        if not size:
            continue
        total += size
        asked = module.ask(module.transfer_batch_to_device(batch, module.device, 0))
        real, whole = asked.tokens.real, read(host, asked)
        layers = range(asked.start, len(host.language_model.layers))
        attention = {
            (layer, rows): values
            for rows in get_args(Raters)
            for layer, values in attention_rows(host, asked, layers, rows).items()
        }
        for budget in module.val_budgets:
            kept: dict[tuple[int | None, str], Tensor] = {
                key: hard_top_k(values, capped_count(budget, asked.tokens), real)
                for key, values in attention.items()
            }
            kept[None, "random"] = module.at_random(asked.tokens, budget, batch["keys"])
            for key, keep in kept.items():
                answered = read(host, drop(asked, keep, module.positions))
                figures = compared(whole, answered, size)
                named = {f"{name}_{budget}": figures[name] for name in _FIGURES}
                found.setdefault(key, Figures()).add(named, size)
    if not total:
        raise ValueError(
            "there is no validation question that could be read; pass data that has some."
        )
    ranked: list[Facts] = [
        {"layer": layer, "rows": name, **figures.pooled()}
        for (layer, name), figures in found.items()
    ]
    right = [f"accuracy_{budget}" for budget in module.val_budgets]
    ranked.sort(key=lambda row: (row["layer"] is None, -sum(row[name] for name in right)))
    return {"questions": total, "budgets": list(module.val_budgets), "rows": ranked}


def to_markdown(facts: Facts) -> str:
    """The table, and what it is of."""
    budgets = facts["budgets"]
    head = [
        "layer",
        "rows",
        *(f"right, K = {k}" for k in budgets),
        *(f"kl, K = {k}" for k in budgets),
    ]
    body = [
        [
            "" if row["layer"] is None else str(row["layer"]),
            row["rows"],
            *(f"{100 * row[f'accuracy_{k}']:.1f}%" for k in budgets),
            *(f"{row[f'kl_{k}']:.3f}" for k in budgets),
        ]
        for row in facts["rows"]
    ]
    return (
        f"{facts['questions']} validation questions, answered with the K tokens that a layer's text"
        " (or its last token) attends to most; kl (nats): to the answers with all tokens\n\n"
        f"{table(head, body)}"
    )
