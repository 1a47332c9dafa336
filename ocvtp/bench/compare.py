"""Two benchmarks of the same cells: what became slower or faster, beyond noise.

Each row's median in b over that in a, with an interval from the resamples of both. The bare model's
row tells what machine, PyTorch or transformers did; of other rows it is told apart from that: the
ratio over the bare model's in the same round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from ocvtp.bench.report import cell_name, ratio_text, table
from ocvtp.bench.samples import KIND, PARTS, SCHEMA
from ocvtp.bench.statistics import Array, deviations
from ocvtp.bench.summary import series
from ocvtp.choices import TOLERANCE
from ocvtp.reporting.results_files import lack, read_json

Facts = Mapping[str, Any]
_SHOWN = ("ttft", "tpot", "request")
_SURE, _LEVEL = 1.959964, 0.05


_SIZES = ("batch_size", "text_length", "images_per_prompt", "image_tokens", "text_tokens")
_SERIES = [(int, float), ...]
_ENVIRONMENT = ("device", "dtype", "threads", "torch", "transformers", "python")
_SHAPE = {
    "schema": int,
    "settings": {"new_tokens": int, "model": str, "attention": dict},
    "environment": dict.fromkeys(_ENVIRONMENT, str),
    "cells": [
        {
            **dict.fromkeys((*_SIZES, "block"), int),
            "rows": [{"key": str, "samples": dict.fromkeys(PARTS, _SERIES)}, ...],
        },
        ...,
    ],
}


@dataclass(frozen=True)
class Change:
    """One metric of one row.

    Args:
        cell: its name. row: its key. metric: its name.
        plain: b over a: `value`, `low`, `high`. relative: the same over the bare model's; None for
            that.
        flag: `slower`, `faster` or "".
    """

    cell: str
    row: str
    metric: str
    plain: dict[str, float]
    relative: dict[str, float] | None
    flag: str


def load(path: str | Path) -> dict[str, Any]:
    """A results.json of `ocvtp bench`.

    Raises:
        ValueError: if it is none, or of another schema.
    """
    what = "a results.json of `ocvtp bench`"
    found: dict[str, Any] = read_json(path, what)
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise ValueError(f"{path} is no result of `ocvtp bench`; pass its results.json.")
    if problem := lack(found, _SHAPE) or _uneven(found):
        raise ValueError(f"{path} is not whole: {problem}; pass {what}.")
    if found["schema"] != SCHEMA:
        raise ValueError(
            f"{path} has schema {found['schema']}, this version reads {SCHEMA}; time it again."
        )
    return found


def compare(a: Facts, b: Facts, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """All changes from a to b, and what to be warned of.

    Args:
        a, b: as `load` returns them.
        tolerance: changes below are not flagged.

    Returns:
        `changes`: see `Change`, JSON; `warnings`: texts; `slower`, `faster`: how many are flagged.

    Raises:
        ValueError: if they hold different cells, rows or answers.
    """
    _check(a, b)
    pairs = list(_pairs(a, b))
    count = sum(len(cell_a["rows"]) for cell_a, _ in pairs) * len(_SHOWN)
    sureness = NormalDist().inv_cdf(1 - _LEVEL / 2 / count) / _SURE
    new_tokens = a["settings"]["new_tokens"]
    changes = [
        _change(cell_a, cell_b, index, metric, new_tokens, sureness, tolerance)
        for cell_a, cell_b in pairs
        for index in range(len(cell_a["rows"]))
        for metric in _SHOWN
    ]
    return {
        "warnings": list(_warnings(a, b)),
        "tolerance": tolerance,
        "slower": sum(change.flag == "slower" for change in changes),
        "faster": sum(change.flag == "faster" for change in changes),
        "changes": [vars(change) for change in changes],
    }


def text(found: Facts) -> str:
    """The warnings, and a table of every cell."""
    lines = [f"> **Warning.** {warning}" for warning in found["warnings"]]
    for cell in dict.fromkeys(change["cell"] for change in found["changes"]):
        rows = [
            [
                change["row"],
                change["metric"],
                ratio_text(change["plain"]),
                ratio_text(change["relative"]),
                change["flag"],
            ]
            for change in found["changes"]
            if change["cell"] == cell
        ]
        lines += [cell, table(["pruner", "metric", "b / a", "over unpruned's", ""], rows)]
    lines.append(
        f"{found['slower']} slower, {found['faster']} faster: changes above"
        f" {100 * found['tolerance']:g}% whose interval is on one side of 1, widened so that one in"
        " 20 comparisons of equal files flags anything at all; of pruners by the ratio over the"
        " unpruned model's. In brackets: 95% intervals of each alone."
    )
    return "\n\n".join(lines)


def _change(
    cell_a: Facts,
    cell_b: Facts,
    index: int,
    metric: str,
    new_tokens: int,
    sureness: float,
    tolerance: float,
) -> Change:
    pairs = [(cell, cell["rows"][index], cell["rows"][0]) for cell in (cell_a, cell_b)]
    times = []
    for cell, row, bare in pairs:  # a row of a later sitting was timed beside another bare model
        beside = row.get("beside", {"block": cell["block"], "samples": bare["samples"]})
        own, other = (series(of["samples"], metric, new_tokens) for of in (row, beside))
        times.append((beside["block"], own, other))
    plain = judged = _moved(*((own, block) for block, own, _ in times))
    relative = None
    if index > 0:
        judged = _moved(*((own / bare, block) for block, own, bare in times))
        relative = _interval(*judged)
    return Change(
        cell=cell_name(cell_a),
        row=pairs[0][1]["key"],
        metric=metric,
        plain=_interval(*plain),
        relative=relative,
        flag=_flag(*judged, sureness, tolerance),
    )


def _moved(a: tuple[Array, int], b: tuple[Array, int]) -> tuple[float, Array]:
    """Logarithm of the ratio of medians, and [R] how far resamples lie from it.

    Resamples of b are turned by half, so that files of equal rounds are resampled independently.

    Args:
        a, b: figures of every round, and the rounds in a block.
    """
    value = math.log(float(np.median(b[0])) / float(np.median(a[0])))
    moved_a, moved_b = (deviations(figures.tolist(), block) for figures, block in (a, b))
    moved: Array = np.roll(moved_b, len(moved_b) // 2) - moved_a
    return value, moved


def _interval(value: float, moved: Array) -> dict[str, float]:
    low, high = np.exp(value + np.quantile(moved, (0.025, 0.975)))
    return {"value": math.exp(value), "low": float(low), "high": float(high)}


def _flag(value: float, moved: Array, sureness: float, tolerance: float) -> str:
    """Whether a change is beyond noise and tolerance; quantiles are widened by `sureness`."""
    low, high = value + sureness * np.quantile(moved, (0.025, 0.975))
    if low > 0 and value > math.log1p(tolerance):
        return "slower"
    if high < 0 and value < -math.log1p(tolerance):
        return "faster"
    return ""


def _pairs(a: Facts, b: Facts) -> Iterator[tuple[Facts, Facts]]:
    """Equal cells, their rows in the order of a."""
    of_b = {_sizes(cell): cell for cell in b["cells"]}
    for cell in a["cells"]:
        other = of_b[_sizes(cell)]
        rows = {row["key"]: row for row in other["rows"]}
        yield cell, {**other, "rows": [rows[row["key"]] for row in cell["rows"]]}


def _sizes(cell: Facts) -> tuple[int, ...]:
    return tuple(cell[name] for name in _SIZES[:4])


def _uneven(found: Facts) -> str:
    """Which row has more rounds of one part than of another."""
    for cell in found["cells"]:
        for row in cell["rows"]:
            if len(set(map(len, row["samples"].values()))) > 1:
                return f"rounds of {row['key']!r} are missing"
    return ""


def _check(a: Facts, b: Facts) -> None:
    problems = [
        f"{name} is {a['settings'][name]!r} in a and {b['settings'][name]!r} in b"
        for name in ("new_tokens", "model")
        if a["settings"][name] != b["settings"][name]
    ]
    held = [{(cell_name(c), r["key"]) for c in f["cells"] for r in c["rows"]} for f in (a, b)]
    for name, missing in (("a", held[1] - held[0]), ("b", held[0] - held[1])):
        rows = "; ".join(f"{cell}: {row}" for cell, row in sorted(missing))
        problems += [f"{name} lacks {rows}"] if missing else []
    if problems:
        raise ValueError(
            f"these cannot be compared: {'. '.join(problems)}. Time both with the same flags."
        )


def _warnings(a: Facts, b: Facts) -> Iterator[str]:
    for name in _ENVIRONMENT:
        one, other = a["environment"][name], b["environment"][name]
        if one != other:
            yield f"{name}: {one} in a, {other} in b."
    if a["settings"]["attention"] != b["settings"]["attention"]:
        yield f"attention: {a['settings']['attention']} in a, {b['settings']['attention']} in b."
