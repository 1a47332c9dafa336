"""The figures of docs/reliability.md, from what `python -m benchmarks.reliability` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).parent / "results" / "reliability.json"
GIB = 2**30


def faults(found: Mapping[str, Any]) -> list[str]:
    """All faults of `fuzz`, with their kinds."""
    said = [f"{kind}: {fault}" for kind, one in found["kinds"].items() for fault in one["faults"]]
    if found["memory_bytes"] > GIB:
        said.append(f"memory grew by {found['memory_bytes']} bytes")
    return said


def tables(path: Path = OUTPUT) -> str:
    """The figures in Markdown."""
    found = json.loads(path.read_text())
    return "\n\n".join([_fuzz_table(found["fuzz"]), _kills_table(found["kills"]), _rest(found)])


def _fuzz_table(found: Mapping[str, Any]) -> str:
    rows = ["| malformed | tried | success | one clear error | other | longest, s |"]
    rows += ["|---|---:|---:|---:|---:|---:|"]
    for kind, one in found["kinds"].items():
        counts = one["counts"]
        tried, good = sum(counts.values()), counts.get("success", 0)
        error = counts.get("one error", 0)
        seconds = f"{one['seconds']:.2f}"
        rows.append(f"| {kind} | {tried} | {good} | {error} | {tried - good - error} | {seconds} |")
    more = found["memory_bytes"] / 2**20
    return "\n".join(rows) + (
        f"\n\n{found['inputs']} inputs of seed {found['seed']}. Beside what was there at the start"
        f" the process needed {more:.0f} MiB more at most; none may have more than 1024. Faults:"
        f" {len(faults(found))}."
    )


def _kills_table(found: Mapping[str, Any]) -> str:
    rows = ["| killed | points | while it ran | continued | ends alike | whole run, s |"]
    rows += ["|---|---:|---:|---:|---:|---:|"]
    for name, one in found.items():
        numbers = (one["points"], one["hit"], one["continued"], one["alike"])
        cells = " | ".join(map(str, numbers))
        rows.append(f"| `{name}` | {cells} | {one['seconds']:.1f} |")
    return "\n".join(rows)


def _rest(found: Mapping[str, Any]) -> str:
    raised, asked, grown = found["exceptions"], found["threads"], found["memory"]
    return (
        f"- {raised['count']} exceptions raised in {len(raised['raised'])} places of a pruned call,"
        f" in tower, projector, pruner and language model: {len(raised['faults'])} left anything"
        " behind (the next pruned call and the bare model are equal bit for bit).\n"
        f"- {asked['threads']} threads on one pruned model: {asked['alike']} of {asked['calls']}"
        " answers equal to those of one thread.\n"
        f"- {grown['calls']} pruned calls, each attached and removed: from the middle to the end"
        f" the process grew by {grown['growth'] / 2**20:.1f} MiB.\n"
    )
