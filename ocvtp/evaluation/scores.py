"""What every item scored under every row, in results.json.

With it rows of several files can be compared in pairs, though the task that scored them is not at
hand. A score of several seeds is their mean: a digit times the number of seeds, mostly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ocvtp.evaluation.tasks.base import Ratio

SCORES = "scores"
"""The key in results.json."""
_DIGITS = 6

Array = NDArray[np.float64]


def packed(figures: Sequence[Mapping[str, Ratio]], seeds: Sequence[int]) -> dict[str, Any]:
    """The scores of rows as JSON.

    Args:
        figures: of every row. seeds: that each is the mean of.

    Returns:
        `owners`: by figure the image of each item; `rows`: of every row by figure `hits`, `of`
        where it is not 1, and `owners` where they are others. Numbers of an array are digits in one
        text, each times the row's seeds, where they can be.
    """
    owners: dict[str, NDArray[np.int64]] = {}
    for row in figures:
        for name, ratio in row.items():
            owners.setdefault(name, ratio.owners)
    rows = []
    for row, count in zip(figures, seeds, strict=True):
        found = {}
        for name, ratio in row.items():
            found[name] = {"hits": _coded(ratio.hits, count)}
            if not (ratio.of == 1).all():
                found[name]["of"] = _coded(ratio.of, count)
            if not np.array_equal(ratio.owners, owners[name]):
                found[name]["owners"] = ratio.owners.tolist()
        rows.append(found)
    return {"owners": {name: some.tolist() for name, some in owners.items()}, "rows": rows}


def unpacked(found: Mapping[str, Any], path: str = "the file") -> list[dict[str, Ratio]] | None:
    """The figures of all rows of a results.json, item by item; None where it has no scores.

    Args:
        found: as `read_results` gives it. path: of the file, for the message.

    Raises:
        ValueError: if the scores are not whole, or do not fit the rows.
    """
    if SCORES not in found:
        return None
    try:
        known = {name: np.asarray(some, int) for name, some in found[SCORES]["owners"].items()}
        rows = [
            {name: _ratio(one, known[name], row["seeds"]) for name, one in scores.items()}
            for row, scores in zip(found["rows"], found[SCORES]["rows"], strict=True)
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is not whole: its scores cannot be read ({error!r}); run the evaluation that"
            " made it again, which asks nothing twice."
        ) from error
    return rows


def _coded(values: Array, seeds: int) -> str | list[float]:
    """Digits in a text where every number times the seeds is one, else numbers."""
    counts = np.rint(values * seeds)
    if (
        len(values)
        and np.allclose(values * seeds, counts)
        and 0 <= counts.min()
        and counts.max() < 10
    ):
        return "".join(map(str, counts.astype(int).tolist()))
    return [float(f"{value:.{_DIGITS}g}") for value in values.tolist()]


def _ratio(one: Mapping[str, Any], owners: NDArray[np.int64], seeds: int) -> Ratio:
    owners = np.asarray(one["owners"], int) if "owners" in one else owners
    hits = _decoded(one["hits"], seeds)
    of = _decoded(one["of"], seeds) if "of" in one else np.ones(len(hits))
    if not len(hits) == len(of) == len(owners):
        raise ValueError(f"{len(hits)}, {len(of)} and {len(owners)} items")
    return Ratio(hits, of, owners)


def _decoded(coded: str | Sequence[float], seeds: int) -> Array:
    if isinstance(coded, str):
        return np.array([int(digit) for digit in coded], float) / seeds
    return np.asarray(coded, float)
