"""Counts of many pruners and budgets, as JSON, as a Markdown table and as bars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from matplotlib.figure import Figure

from ocvtp.flops.count import Count
from ocvtp.flops.formulas import CONVENTIONS, MEANINGS
from ocvtp.reporting.markdown_table import table
from ocvtp.reporting.plain_text import better, markdown
from ocvtp.reporting.plot_style import INK, canvas, label, name_rows

Facts = Mapping[str, Any]
Key = tuple[str, int | None]
"""A pruner and its K; None where it has a budget of its own."""

KIND, SCHEMA = "flops", 1
UNPRUNED, ANY = "unpruned", "any"
_PARTS = {
    "tower": ("vision tower", "#0072b2"),
    "projector": ("projector", "#cc79a7"),
    "select": ("select", "#d55e00"),
    "language_model": ("language model", "#9fd0ef"),
}
_UNITS = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6}
_LEGEND = """\
- Operations of one prompt until its first answered token (FLOPs); a product with its addition is
  two. Causal attention counts whole; norms, activations, softmax and sorting count nothing.
- With grouped-query attention keys and values count with their own width, in all three.
- `select` is the pruner's own `select` with what it reads (attention of single rows or blocks), as
  far as these are matrix products, convolutions or attention. CLIP's text tower is not in it.
- `total` is tower, projector, select and the true language model. `any` has K tokens, whatever
  chooses them, and nothing left out before it.
- `average tokens` is what the language model reads of an image, newlines included, on average over
  its layers, whatever K says.
- K of pruners inside the language model is an average over its layers. Where `stages` or a
  published `setting` say how many tokens stay, K is the number that stands for K in `stages`, if
  any: what each layer reads is in the list of layers. K is `own` where a pruner has a budget of its
  own."""


def results(
    model: str, settings: Facts, counts: Mapping[Key, Count], notes: Sequence[str]
) -> dict[str, Any]:
    """All counts as JSON.

    Args:
        model: its name.
        settings: what else they depend on.
        counts: by pruner and K; the first is the unpruned one.
        notes: what could not be counted, and why.
    """
    whole = next(iter(counts.values())).total
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "model": model,
        "settings": dict(settings),
        "conventions": dict(MEANINGS),
        "rows": [_row(label, k, found, whole) for (label, k), found in counts.items()],
        "notes": list(notes),
    }


def to_markdown(facts: Facts) -> str:
    """The table, a list of layers for methods that drop tokens between them, and a legend."""
    unit, scale = _unit(facts)
    names = [f"`{name}`" for name in CONVENTIONS]
    head = ["pruner", "K", *names, "tower", "projector", "select", "total", "of unpruned"]
    head += ["average tokens"]
    images = facts["settings"]["num_images"]
    body = [_cells(row, scale, images) for row in facts["rows"]]
    title = f"# Operations of {markdown(facts['model'])}, in {unit}FLOPs"
    parts = [title, _settings(facts["settings"]), table(head, body)]
    if stages := [line for row in facts["rows"] for line in _layers(row, unit, scale)]:
        parts += ["Layers that read different numbers of tokens:", "\n".join(stages)]
    if facts["notes"]:
        parts.append("\n".join(f"- {markdown(note)}" for note in facts["notes"]))
    meanings = [
        f"- `{name}`, of the language model alone: {text}" for name, text in MEANINGS.items()
    ]
    return "\n\n".join([*parts, "\n".join([*meanings, _LEGEND])]) + "\n"


def bars(facts: Facts) -> Figure:
    """Operations until the first token, stacked; a bar a pruner and budget."""
    unit, scale = _unit(facts)
    rows = facts["rows"]
    drawing, (axis,) = canvas([1.5 + 0.26 * len(rows)])
    left = [0.0] * len(rows)
    for key, (title, colour) in _PARTS.items():
        widths = [row[key] / scale for row in rows]
        axis.barh(range(len(rows)), widths, left=left, color=colour, label=title, height=0.72)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    for place, (row, end) in enumerate(zip(rows, left, strict=True)):
        text = f" {end:.2f}  ({row['of_unpruned']:.0%})"
        axis.text(end, place, text, va="center", fontsize=8, color=INK)
    name_rows(axis, [_name(row) for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)  # the unpruned one on top
    axis.set_xlim(0, 1.25 * max(left))
    x = better(f"{unit}FLOPs until the first token, true count", lower=True)
    label(axis, facts["model"], x, grid="x")
    drawing.legend(loc="outside lower center", ncols=len(_PARTS), fontsize=8, frameon=False)
    return drawing


def _row(label: str, k: int | None, found: Count, whole: int) -> dict[str, Any]:
    """One count as JSON; `num_keep` is K of an image, `visual` of the prompt, layer by layer."""
    return {
        "label": label,
        "num_keep": k,
        **{key: getattr(found, key) for key in (*_PARTS, "total", "lm_head")},
        "of_unpruned": found.total / whole,
        "conventions": dict(found.conventions),
        "visual": list(found.visual),
        "layers": list(found.layers),
    }


def _cells(row: Facts, scale: float, num_images: int) -> list[str]:
    average = f"{sum(row['visual']) / len(row['visual']) / num_images:.5g}"
    conventions = [f"{row['conventions'][name] / scale:.2f}" for name in CONVENTIONS]
    shares = [f"{row[key] / scale:.4f}" for key in ("tower", "projector", "select")]
    total = f"{row['total'] / scale:.2f}"
    share = f"{100 * row['of_unpruned']:.1f}%"
    name = markdown(row["label"])
    count = "own" if row["num_keep"] is None else str(row["num_keep"])
    return [name, count, *conventions, *shares, total, share, average]


def _settings(settings: Facts) -> str:
    newlines = settings["num_newlines"]
    more = f" and {newlines} newlines" if newlines else ""
    unread = "is left out" if settings["savings"] else "runs too"
    return (
        f"{settings['num_images']} image(s) of {settings['num_visual']} visual tokens{more}, and"
        f" {settings['text_length']} other tokens. With a pruner, what nobody reads of tower and"
        f" projector {unread}."
    )


def _layers(row: Facts, unit: str, scale: float) -> Iterator[str]:
    """A line for a method whose layers do not all read the same; nothing for others."""
    if len(set(row["visual"])) == 1:
        return
    parts, first = [], 0
    for tokens, group in groupby(row["visual"]):
        last = first + len(list(group))
        operations = sum(row["layers"][first:last]) / scale
        parts.append(f"{first} to {last - 1}: {tokens} visual tokens, {operations:.3f} {unit}")
        first = last
    mean = sum(row["visual"]) / len(row["visual"])
    yield f"- {markdown(_name(row))}: layers {'; '.join(parts)}; {mean:.1f} tokens on average."


def _name(row: Facts) -> str:
    is_alone = row["label"] == UNPRUNED or row["num_keep"] is None
    return str(row["label"]) if is_alone else f"{row['label']} K={row['num_keep']}"


def _unit(facts: Facts) -> tuple[str, float]:
    """T for models of real size, less for tiny ones."""
    largest = max(row["total"] for row in facts["rows"])
    return next((item for item in _UNITS.items() if largest >= item[1]), ("M", _UNITS["M"]))
