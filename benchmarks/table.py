"""The documentation's tables of what was measured and tested, from benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ocvtp.pruners import list_pruners

RESULTS = Path(__file__).parent / "results"


def _row(what: str, figure: dict[str, Any], goal: str) -> str:
    spread = f"{figure['q25']:.2f} to {figure['q75']:.2f}"
    return f"| {what} | {figure['of_medians']:.2f} | {spread} | {goal} |"


def table() -> str:
    """Ratios with their quartiles, and the training step."""
    results = json.loads((RESULTS / "road-cpu.json").read_text())
    tower, pruner, attached = results["tower"], results["pruner"], results["attached"]
    step = results["training"]
    lines = [
        f"{results['device']}, {results['threads']} thread, torch {results['torch']}, transformers"
        f" {results['transformers']}.",
        "",
        "| ratio | median | quartiles | goal |",
        "|---|---|---|---|",
        _row("tower cut after layer 9 / whole CLIP ViT-L/14-336", tower["cut / full"], "0.45"),
    ]
    for batch in ("B=1", "B=8"):
        what = f"encode + assign + select, K=64 of 576, {batch} / its bare matrix products"
        lines.append(_row(what, pruner[batch]["select / bare"], "1.3"))
    what = "tower + prefill, every token kept under a pruner / bare model (CLIP-L, 4 x 2048 LLM)"
    lines.append(_row(what, attached["keep all / bare"], "1.03"))
    for name in ("ocvtp K=64", "fastervlm K=64"):
        figure = attached[f"{name} / bare"]
        lines.append(_row(f"tower + pruner + prefill, {name} / bare model", figure, "-"))
    lines += [
        "",
        "A training step at LLaVA-1.5 size (tower on the fly, S = 64, fp32,"
        f" batch {step['batch']}): {step['images per second']:.2f} images/s,"
        f" {step['peak resident GiB']:.1f} GiB peak resident memory.",
    ]
    return "\n".join(lines) + "\n"


def stages_table() -> str:
    """What one method of each stage saves of tower and prefill, next to what operations allow."""
    results = json.loads((RESULTS / "stages-cpu.json").read_text())
    rows: dict[str, dict[str, Any]] = results["rows"]
    bare = rows["bare"]["ms"]
    lines = [
        f"{results['device']}, {results['threads']} thread, torch {results['torch']}; medians of"
        f" one interleaved run. The bare model: tower {_ms(bare['tower'])} ms, whole forward"
        f" {_ms(bare['whole'])} ms.",
        "",
        "| stage and method | tower, ms | whole, ms | share of the time (quartiles) | share of the"
        " operations | saved / possible |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if name == "bare":
            continue
        share = row["share of time"]
        spread = f"{share['median']:.2f} ({share['q25']:.2f} to {share['q75']:.2f})"
        cells = [name, _ms(row["ms"]["tower"]), _ms(row["ms"]["whole"]), spread]
        cells += [f"{row['share of operations']:.2f}", f"{row['saving / bound']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _head(results: dict[str, Any], cases: Iterable[str], figures: str) -> list[str]:
    """What was measured where, and a column a case."""
    names = list(cases)
    return [
        f"{results['device']}, {results['threads']} thread, torch {results['torch']}; {figures}",
        "",
        f"| | {' | '.join(names)} |",
        "|---|" + "---|" * len(names),
    ]


def select_table() -> str:
    """Milliseconds of every pruner's `select`, next to the tower's."""
    results = json.loads((RESULTS / "select-cpu.json").read_text())
    cases: dict[str, dict[str, float]] = results["ms"]
    lines = _head(results, cases, "milliseconds, medians of one interleaved run.")
    for name in dict.fromkeys(name for case in cases.values() for name in case):
        label = f"`{name}`" if name in list_pruners() else name
        figures = [_ms(case[name]) if name in case else "-" for case in cases.values()]
        lines.append(f"| {label} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def forms_table() -> str:
    """Greedy methods beside the same picks as official code computes them."""
    results = json.loads((RESULTS / "select-official-cpu.json").read_text())
    cases: dict[str, dict[str, Any]] = results["cases"]
    lines = _head(
        results,
        cases,
        "milliseconds of the official form / of `select`, medians of rounds in turns; their ratio"
        " (quartiles).",
    )
    for name in next(iter(cases.values())):
        cells = []
        for case in cases.values():
            ms, times = case[name]["ms"], case[name]["official / ours"]
            spread = f"{times['q25']:.2f} to {times['q75']:.2f}"
            cells.append(
                f"{_ms(ms['official'])} / {_ms(ms['ours'])} = {times['of_medians']:.2f} ({spread})"
            )
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    for width in (1024, 4096):
        same = [[one for one in case.values() if one["width"] == width] for case in cases.values()]
        cells = [_ms(min(one["ms"]["product"] for one in found)) for found in same]
        lines.append(f"| the product of all pairs alone, width {width} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _notes(outcomes: list[tuple[str, str]], numbers: dict[str, int]) -> str:
    """One cell of the versions' outcomes, whose reasons get numbers."""
    said = [f"transformers {name}: {outcome}" for name, outcome in outcomes if outcome != "yes"]
    if len({outcome for _, outcome in outcomes}) == 1:
        said = [outcome for _, outcome in outcomes[:1] if outcome != "yes"]
    marks = [f"({numbers.setdefault(note, len(numbers) + 1)})" for note in said]
    works = any(outcome == "yes" for _, outcome in outcomes)
    return " ".join(["yes" if works else "no", *marks])


def hosts_tables() -> str:
    """What every host does, and what it supplies, on all versions that were tested."""
    results = json.loads((RESULTS / "hosts.json").read_text())
    versions = [result["transformers"] for result in results]
    newest, numbers = results[0], dict[str, int]()
    hosts = list(newest["features"])
    lines = [
        f"Random tiny models, on transformers {' and '.join(versions)}.",
        "",
        f"| generate() and forward(), pruned | {' | '.join(f'`{host}`' for host in hosts)} |",
        "|---|" + "---|" * len(hosts),
    ]
    for title in newest["features"][hosts[0]]:
        cells = []
        for host in hosts:
            outcomes = [(r["transformers"], r["features"][host][title]) for r in results]
            cells.append(_notes(outcomes, numbers))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    notes = [f"({number}) {note}." for note, number in numbers.items()]
    return "\n".join([*lines, *["", " ".join(notes)] * bool(notes), "", *_supplies(results)]) + "\n"


def _supplies(results: list[dict[str, Any]]) -> list[str]:
    titles = list(next(iter(results[0]["supplies"].values())))
    lines = [
        f"| host, vision tower: what pruners may read | {' | '.join(titles)} |",
        "|---|" + "---|" * len(titles),
    ]
    for name in results[0]["supplies"]:
        host, tower = name.split(", ")
        known = [result["supplies"][name] for result in results]
        cells = ["yes" if all(row[title] for row in known) else "-" for title in titles]
        lines.append(f"| `{host}`, {tower} | {' | '.join(cells)} |")
    return lines
