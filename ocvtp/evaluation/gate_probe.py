"""How well gates stand in for dropping: what the model predicts, by how far the others are open.

Of every image K random tokens stay open, and the gates of the others are set to g. The measure is
the Kullback-Leibler divergence of what the model then predicts for the answer's first token from
what it predicts once the others are really dropped: 0 is as if dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.asking import Answered, Asked, Asker, before_layer, drop, read
from ocvtp.hosts.base import Host
from ocvtp.hosts.gating import Gate, build_gate, gating
from ocvtp.pruners.specs import parse_spec
from ocvtp.reporting.markdown_table import table
from ocvtp.selectors.relaxations import Gates, hard_top_k
from ocvtp.training.prompts import PromptTransform

Facts = dict[str, Any]
OPEN = (0.5, 0.2, 0.1, 0.03, 0.01, 0.001, 1e-4, 0.0)
"""How far the gates of the others are open."""


def build_gates(specs: Sequence[str]) -> dict[str, Gate]:
    """Gates by their specs, `NAME:KEY=VALUE,...`.

    Raises:
        ValueError: for specs that do not parse, unknown gates and settings, and gates that do
            nothing in a model.
    """
    gates = {}
    for spec in specs:
        name, settings = parse_spec(spec, "gate")
        gates[spec] = build_gate(name, **settings)
        if not gates[spec].reads_model:
            raise ValueError(f"gate {spec!r} does nothing in a model; pass another one.")
    return gates


@torch.no_grad()
def probe(
    model: Any,
    processor: Any,
    gates: Mapping[str, Gate],
    items: Sequence[Mapping[str, Any]],
    num_keep: int | None = None,
    layer: int = 0,
    seed: int = 0,
    opened: Sequence[float] = OPEN,
) -> Facts:
    """Measure gates of a model.

    Args:
        model: a supported VLM. processor: what makes its inputs.
        gates: by the names of their rows. Those that must know the spread of tokens are measured
            on these images.
        items: questions, one image each; see `PromptTransform`.
        num_keep: K, tokens of an image that stay open; None for a ninth of the smallest image's.
        layer: of the language model, before which the gates are.
        seed: of which stay open.
        opened: g of the others.

    Returns:
        `num_images`, `num_keep`, `visual_tokens` of each image, `layer`, `seed`; `full`, the
        divergence of the model with all tokens, and `contiguous`, that of dropping with what is
        left numbered from 0; `opened`, and `divergence`, gate -> that of each g.

    Raises:
        ValueError: for a budget that is not below the smallest image's tokens, and a layer that the
            language model has not.
    """
    host, asked = _ask(model, processor, items, layer)
    real = asked.columns >= 0
    counts = real.sum(dim=1)
    fewest = int(counts.min())
    num_keep = max(1, round(fewest / 9)) if num_keep is None else num_keep
    if not 1 <= num_keep < fewest:
        raise ValueError(f"num_keep={num_keep}; pass 1 to {fewest - 1} of {fewest} visual tokens.")
    drawn = torch.rand(real.shape, generator=torch.Generator().manual_seed(seed)).to(real.device)
    keep = hard_top_k(drawn, num_keep, real)
    with gating(host):
        dropped = _first(read(host, drop(asked, keep, "original")))
        divergence = {}
        for name, gate in gates.items():
            gate.build(host)
            gate.to(real.device).eval()
            gate.measure([asked])
            divergence[name] = [
                _divergence(dropped, _first(read(host, asked, _left(real, keep, g), gate)))
                for g in opened
            ]
        full = _divergence(dropped, _first(read(host, asked)))
        contiguous = _divergence(dropped, _first(read(host, drop(asked, keep))))
    return {
        "num_images": len(items),
        "num_keep": num_keep,
        "visual_tokens": counts.tolist(),
        "layer": layer,
        "seed": seed,
        "full": full,
        "contiguous": contiguous,
        "opened": list(opened),
        "divergence": divergence,
    }


def _ask(
    model: Any, processor: Any, items: Sequence[Mapping[str, Any]], layer: int
) -> tuple[Host, Asked]:
    """The questions before a layer."""
    batch = PromptTransform(processor)([dict(item) for item in items])
    inputs = {
        name: values.to(model.device, model.dtype if values.is_floating_point() else None)
        for name, values in batch["inputs"].items()
    }
    with Asker(model, processor) as asker:
        asked = asker.ask(inputs, batch["answers"])
        return asker.host, before_layer(asker.host, asked, layer) if layer else asked


def _left(real: Tensor, keep: Tensor, others: float) -> Gates:
    """1 for those that stay open, `others` for the rest of the real tokens."""
    return Gates(torch.where(keep, 1.0, others) * real, keep)


def _first(answered: Answered) -> Tensor:
    """[B, V] log-probabilities of the answer's first token."""
    is_first = answered.owner != answered.owner.roll(1)
    is_first[0] = True
    return answered.logits[is_first].float().log_softmax(dim=1)


def _divergence(dropped: Tensor, found: Tensor) -> float:
    """The mean over questions, in nats."""
    nats = (dropped.exp() * (dropped - found)).sum(dim=1).mean()
    return float(nats.clamp(min=0))  # rounding alone is below


def to_markdown(facts: Facts) -> str:
    """The table, and what it is of."""
    head = ["g of the others", *(f"{g:g}" for g in facts["opened"])]
    rows = [
        [f"`{name}`", *(f"{value:.3f}" for value in values)]
        for name, values in facts["divergence"].items()
    ]
    tokens = sorted(set(facts["visual_tokens"]))
    of_all = f"{tokens[0]}" if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
    place = f" before layer {facts['layer']}" if facts["layer"] else ""
    return (
        f"{facts['model']}: {facts['num_images']} images, {facts['num_keep']} random of"
        f" {of_all} visual tokens at g = 1{place}\n"
        "divergence (nats) of the answer's first token from really dropping the others; 0 is as if"
        f" dropped\nall tokens: {facts['full']:.3f}; dropped, and what is left numbered from 0:"
        f" {facts['contiguous']:.3f}\n\n{table(head, rows)}"
    )
