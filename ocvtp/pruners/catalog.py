"""What there is to know about every registered pruner, for tables."""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict, dataclass

from ocvtp.pruners.registry import list_pruners, pruner_class


@dataclass(frozen=True)
class Entry:
    """One pruner.

    Args:
        name: in the registry. title: the paper's branding and one line about the method.
        stage: where it acts. needs: what the host must supply.
        budget: `exact` or `exact or adaptive`. merges: whether kept tokens are mixtures.
        status: `official`, `unofficial` or `control`. paper: URL.
    """

    name: str
    title: str
    stage: str
    needs: str
    budget: str
    merges: bool
    status: str
    paper: str | None

    @property
    def paper_id(self) -> str:
        """Number on arXiv, or the empty string."""
        return (self.paper or "").removeprefix("https://arxiv.org/abs/")


def entry(name: str) -> Entry:
    """The facts about one pruner, from its class and docstring.

    Raises:
        ValueError: if the docstring lacks its line `Stage: ...  Needs: ...`.
    """
    cls = pruner_class(name)
    text = inspect.getdoc(cls) or ""
    line = re.search(r"^Stage: (\w+)\.  Needs: (.+?)\.  Deterministic: ", text, re.MULTILINE)
    if line is None:
        raise ValueError(
            f"the docstring of {cls.__name__} lacks its line"
            " `Stage: STAGE.  Needs: NEEDS.  Deterministic: yes|no`."
        )
    return Entry(
        name=name,
        title=text.splitlines()[0],
        stage=cls.stage,
        needs=line[2],
        budget=" or ".join(cls.budgets),
        merges=cls.merging,
        status=cls.status,
        paper=cls.paper,
    )


def catalog() -> list[Entry]:
    """All pruners, sorted by name."""
    return [entry(name) for name in list_pruners()]


def markdown_table() -> str:
    """The README's table of pruners."""
    lines = [
        "| pruner | method | stage | needs | budget | merges | status | paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in catalog():
        cells = asdict(row)
        cells["name"] = f"`{row.name}`"
        cells["merges"] = "yes" if row.merges else "no"
        cells["paper"] = f"[{row.paper_id}]({row.paper})" if row.paper else "-"
        lines.append("| " + " | ".join(str(value) for value in cells.values()) + " |")
    return "\n".join(lines) + "\n"
