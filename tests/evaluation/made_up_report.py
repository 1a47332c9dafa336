"""Reports of made-up answers, and what a plot shows of them."""

import numpy as np

from ocvtp.evaluation.report import Report, Row
from ocvtp.evaluation.tasks.base import Ratio


def share(right, of=20):
    """The first `right` of `of` items are right; an image has two, which lie apart."""
    return Ratio((np.arange(of) < right).astype(float), np.ones(of), np.arange(of) % (of // 2))


def row(label, budget, right, of=20, **given):
    num_keep = None if budget is None else round(36 * budget)
    facts = {
        "pruner": label.partition(":")[0],
        "num_keep": num_keep,
        "seeds": 1,
        "control": label in ("unpruned", "random", "shuffled", "oracle"),
        "visual_tokens": num_keep,
        "figures": {} if right is None else {"easy/all": share(right, of)},
    }
    return Row(label=label, budget=budget, **{**facts, **given})


def report(*rows, **given):
    facts = {
        "task": "scenes",
        "model": "demo",
        "metrics": ["easy/all"],
        "percent": True,
        "settings": {"levels": ["easy"], "command": "ocvtp evaluate --task scenes"},
        "environment": {"device": "cpu"},
    }
    return Report(rows=rows, **{**facts, **given})


def usual(of=400):
    """Two pruners, one trained, one refused, and the controls, at two budgets."""

    def at(budget, label, part, **given):
        return row(label, budget, None if part is None else round(part * of), of, **given)

    return report(
        at(1.0, "unpruned", 0.9),
        at(1.0, "shuffled", 0.4),
        *(
            at(budget, label, part - loss, trained=label == "ocvtp")
            for budget, loss in ((0.5, 0.0), (0.25, 0.1))
            for label, part in (
                ("random", 0.6),
                ("fopru:strategy=row", 0.75),
                ("ocvtp", 0.8),
                ("oracle", 0.9),
            )
        ),
        at(0.25, "tome", None, note="needs a tower with blocks."),
    )
