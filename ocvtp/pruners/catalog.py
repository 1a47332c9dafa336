"""What there is to know about every registered pruner, for tables."""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict, dataclass

from ocvtp.pruners.base import Pruner
from ocvtp.pruners.registry import list_pruners, pruner_class
from ocvtp.structures import STAGES


@dataclass(frozen=True)
class Entry:
    """One pruner.

    Args:
        name: in the registry. title: the paper's branding and one line about the method.
        stage: where it acts, e.g. `llm_input + llm_layers`. needs: what the host must supply.
        budget: `exact` or `exact or adaptive`. merges: whether kept tokens are mixtures.
        status: see `Pruner.status`. paper: URL.
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
        ValueError: if the docstring lacks its line `Stage: ...  Needs: ...`, which a pruner of
            status `yours` may, or names other stages than the class.
    """
    cls = pruner_class(name)
    text = inspect.getdoc(cls) or ""
    line = re.search(r"^Stage: ([\w +]+)\.  Needs: (.+?)\.  Deterministic: ", text, re.MULTILINE)
    if line is None and cls.status == "yours":
        return _entry(name, cls, text, cls.stage, "not said")
    if line is None:
        raise ValueError(
            f"the docstring of {cls.__name__} lacks its line"
            " `Stage: STAGE.  Needs: NEEDS.  Deterministic: yes|no`."
        )
    stages = line[1].split(" + ")
    if cls.stage not in stages or not set(stages) <= set(STAGES):
        raise ValueError(
            f"the docstring of {cls.__name__} names stage {line[1]!r}, the class {cls.stage!r};"
            f" write one or several of {', '.join(STAGES)}, joined by ' + '."
        )
    return _entry(name, cls, text, line[1], line[2])


def _entry(name: str, cls: type[Pruner], text: str, stage: str, needs: str) -> Entry:
    return Entry(
        name=name,
        title=text.partition("\n")[0],
        stage=stage,
        needs=needs,
        budget=" or ".join(cls.budgets),
        merges=cls.merging or (" + " in stage and _merges_later(cls)),
        status=cls.status,
        paper=cls.paper,
    )


def _merges_later(cls: type[Pruner]) -> bool:
    """Whether a method of several stages mixes tokens at any of them."""
    return any(part.merging for part in cls(num_keep=1).parts)


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
