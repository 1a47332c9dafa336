"""What there is to know about every registered pruner, for tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ocvtp.pruners.base import Pruner
from ocvtp.pruners.registry import list_pruners, pruner_class


@dataclass(frozen=True)
class Entry:
    """One pruner.

    Args:
        name: in the registry.
        title: `Pruner.title`.
        stage: where it acts, e.g. `llm_input + llm_layers`.
        needs: what the host must supply, `Pruner.reads`.
        budget: `exact`, `exact or adaptive`, `exact or quality`, `average` and the like.
        merges: whether kept tokens are mixtures.
        settings: names of the published ones, `Pruner.named_settings`.
        status: `Pruner.status`.
        paper: URL.
    """

    name: str
    title: str
    stage: str
    needs: str
    budget: str
    merges: bool
    settings: tuple[str, ...]
    status: str
    paper: str | None

    @property
    def paper_id(self) -> str:
        """Number on arXiv, or the empty string."""
        return (self.paper or "").removeprefix("https://arxiv.org/abs/")


def entry(name: str) -> Entry:
    """The facts about one pruner, all of them attributes of its class and of its parts.

    Raises:
        ValueError: if no pruner has this name.
    """
    cls = pruner_class(name)
    parts = _parts(cls)
    return Entry(
        name=name,
        title=cls.title,
        stage=" + ".join(part.stage for part in parts),
        needs=cls.reads,
        budget=" or ".join(cls.budgets),
        merges=cls.merging or any(part.merging for part in parts),
        settings=tuple(cls.named_settings),
        status=cls.status,
        paper=cls.paper,
    )


def _parts(cls: type[Pruner]) -> Sequence[type[Pruner] | Pruner]:
    """The class; of a method of several stages, its parts as it is built by default."""
    if cls.parts is Pruner.parts:
        return (cls,)
    try:
        return cls(num_keep=1).parts
    except (TypeError, ValueError):  # it takes more than a budget; what its class says holds
        return (cls,)


def catalog() -> list[Entry]:
    """All pruners, sorted by name."""
    return [entry(name) for name in list_pruners()]


def markdown_table() -> str:
    """The README's table of pruners."""
    lines = [
        "| pruner | method | stage | needs | budget | merges | settings | status | paper |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in catalog():
        cells = asdict(row)
        cells["name"] = f"`{row.name}`"
        cells["merges"] = "yes" if row.merges else "no"
        cells["settings"] = ", ".join(f"`{name}`" for name in row.settings) or "-"
        cells["paper"] = f"[{row.paper_id}]({row.paper})" if row.paper else "-"
        lines.append("| " + " | ".join(str(value) for value in cells.values()) + " |")
    return "\n".join(lines) + "\n"
