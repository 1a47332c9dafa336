"""The model card of an exported network: what its config.json says, and what others must know."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ocvtp.reporting.markdown_table import table
from ocvtp.reporting.plain_text import markdown, one_line

Facts = Mapping[str, Any]
CARD_NAME = "README.md"
WRITTEN = "<!-- Written by ocvtp from config.json. -->"
"""In cards that may be written again."""
_UNKNOWN = "not stated"
_ENDINGS = ("untrained", "random")
_POINTS = 12  # of a curve
_COLUMNS = 6
_RUN = (
    "steps",
    "epochs",
    "images",
    "batch_size",
    "devices",
    "precision",
    "lr",
    "weight_decay",
    "seed",
)


@dataclass(frozen=True)
class About:
    """What a config.json does not say.

    Args:
        pruner: name of the pruner that takes the network. title: of its method. paper: its URL.
        data: what it was trained on. license: of the weights, as the hub names it.
        weights: sha256 of model.safetensors. parameters: how many there are.
        figures: how good it is, in Markdown, of an evaluation.
    """

    pruner: str = ""
    title: str = ""
    paper: str | None = None
    data: str | None = None
    license: str | None = None
    weights: str | None = None
    parameters: int | None = None
    figures: str = ""


def model_card(config: Facts, about: About, tags: Sequence[str] = ()) -> str:
    """The card in Markdown, with the header that the hub reads.

    Args:
        config: what config.json holds.
        about: see there.
        tags: of the hub.
    """
    training = config.get("training") or {}
    title, _, does = about.title.partition(": ")
    name = about.pruner or "NAME"
    budgets = sorted(set(config.get("num_slots") or ()))
    parts = [
        _header(about, tags),
        WRITTEN,
        f"# {title or 'The network of a visual-token pruner'}",
        f"The trained network of the pruner `{name}`, which keeps a few of an image's visual tokens"
        f" for a vision-language model{f': {does}' if does else '.'} `config.json` holds its"
        " settings, `model.safetensors` its weights.",
        _usage(name, budgets, config),
        "## What it reads",
        _list(_reads(config, budgets)),
        "## Training",
        _list(_trained(config, training, about)),
        *_curve(training.get("curve") or ()),
        "## How good it is",
        *_figures(training.get("validation") or {}, about, name),
        "## Weights",
        _list(_weights(about, config)),
        "## Licence",
        _licence(about),
        "## How to cite",
        _citation(about, (training.get("versions") or {}).get("ocvtp")),
    ]
    return "\n\n".join(parts) + "\n"


def _header(about: About, tags: Sequence[str]) -> str:
    lines = ["---", "library_name: ocvtp"]
    lines += [f"license: {json.dumps(about.license)}"] if about.license else []
    found = dict.fromkeys(["visual-token-pruning", *tags])
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in found), "---"]
    return "\n".join(lines)


def _usage(name: str, budgets: Sequence[float], config: Facts) -> str:
    some = [budget for budget in budgets if isinstance(budget, int)] or budgets or [64]
    kept = some[len(some) // 2]
    budget = f"num_keep={kept}" if isinstance(kept, int) else f"keep_ratio={kept}"
    layer = config.get("layer")
    if config.get("stage") == "llm_layers" and isinstance(layer, int):
        budget = f"stages=(({layer}, {kept}),)"  # num_keep would be the average over all layers
    text = f"""\
```python
import ocvtp

pruner = ocvtp.build_pruner("{name}", {budget}, checkpoint="THIS_FOLDER_OR_HUB_ID")
with pruner(model):  # a transformers VLM with the tower below
    model.generate(**inputs)
```"""
    if name == "NAME":
        text += "\n\n`NAME` is the pruner whose networks have the format below."
    return text


def _reads(config: Facts, budgets: Sequence[float]) -> Iterator[tuple[str, Any]]:
    yield "format", config.get("format")
    yield "vision tower", config.get("tower")
    yield "language model", (config.get("host") or {}).get("model")
    yield "layer", config.get("layer")
    grid = config.get("grid_hw")
    yield "token grid in training", f"{grid[0]} x {grid[1]}" if grid else None
    yield "how images became tokens", config.get("layout")
    yield "budgets in training", ", ".join(map(str, budgets)) or None
    yield (
        "preprocessing",
        json.dumps(config.get("preprocessing")) if config.get("preprocessing") else None,
    )


def _trained(config: Facts, training: Facts, about: About) -> Iterator[tuple[str, Any]]:
    data = about.data or training.get("data")
    yield "data", (data if isinstance(data, str) else json.dumps(data)) if data else _UNKNOWN
    yield "objective", config.get("objective")
    for name in _RUN:
        yield name.replace("_", " "), training.get(name)
    versions = training.get("versions") or {}
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def _curve(points: Sequence[Facts]) -> Iterator[str]:
    """Figures of the validations, a row each, evenly taken."""
    if len(points) < 2:
        return
    step = -(-len(points) // _POINTS)
    shown = [*points[:-1:step], points[-1]]
    names = [name for name in points[-1] if name != "step"]
    names = [name for name in names if not name.endswith(_ENDINGS)][:_COLUMNS]
    rows = [[str(p["step"]), *(_number(p.get(name)) for name in names)] for p in shown]
    yield f"Validation in training ({len(points)} times):"
    yield _table(["step", *names], rows)


def _figures(validation: Facts, about: About, name: str) -> Iterator[str]:
    """Of the last validation beside its controls, and of an evaluation."""
    figures = {k: v for k, v in validation.items() if k != "num_slots"}
    plain = [k for k in figures if not k.endswith(tuple(f"_{e}" for e in _ENDINGS))]
    known = [e for e in _ENDINGS if any(f"{k}_{e}" in figures for k in plain)]
    if plain:
        count = validation.get("num_slots")
        budget = "" if count is None else f", with {markdown(str(count))} tokens"
        yield f"The last validation of the run{budget}:"
        rows = [
            [k, _number(figures[k]), *(_number(figures.get(f"{k}_{e}")) for e in known)]
            for k in plain
        ]
        yield _table(["figure", "trained", *known], rows)
    if about.figures:
        yield about.figures
    elif not known:
        yield (
            "Nothing here compares it with an untrained network. `ocvtp evaluate --pruners"
            f" {name} --checkpoint THIS_FOLDER` does, and `ocvtp card --results` takes what it"
            " found."
        )


def _weights(about: About, config: Facts) -> Iterator[tuple[str, Any]]:
    yield "sha256 of model.safetensors", about.weights and f"`{about.weights}`"
    yield "parameters", None if about.parameters is None else f"{about.parameters:,}"
    yield "format version", config.get("format_version")


def _licence(about: About) -> str:
    own = (
        f"Of these weights: {about.license}."
        if about.license
        else ("Of these weights: not stated; who publishes them says (`ocvtp card --license`).")
    )
    return (
        f"{own} The vision tower is not part of them and has its own licence, as has the data. The"
        " code of ocvtp is under the Apache License 2.0."
    )


def _citation(about: About, version: str | None) -> str:
    method = f"The method: {about.paper}. " if about.paper else ""
    lines = [
        "@software{ocvtp,",
        "  title = {ocvtp: train, export, plug in and measure visual-token pruners},",
        *([f"  version = {{{one_line(str(version)).replace('`', '')}}},"] if version else []),
        "}",
    ]
    return f"{method}The software:\n\n" + "\n".join(["```bibtex", *lines, "```"])


def _list(pairs: Iterator[tuple[str, Any]]) -> str:
    """Those that are known."""
    known = ((name, value) for name, value in pairs if value not in (None, "", {}))
    return "\n".join(f"- {name}: {markdown(str(value))}" for name, value in known)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head, *rows = ([markdown(text) for text in line] for line in (head, *rows))
    return table(head, rows)


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
