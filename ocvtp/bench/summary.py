"""From raw samples to figures: medians, intervals, ratios to the bare model, sums of stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ocvtp.bench import statistics
from ocvtp.bench.samples import METRICS, MODEL, PROJECT, SELECT, STAGES, TOWER

Facts = Mapping[str, Any]
Array = NDArray[np.float64]

_PROMPT = (TOWER, SELECT, PROJECT, "prefill")
_OF_TTFT = (TOWER, SELECT, PROJECT, MODEL, "around")
_DIGITS = 6


def series(samples: Mapping[str, Sequence[float]], metric: str, new_tokens: int) -> Array:
    """Milliseconds of a metric in every round.

    Args:
        samples: of a row, by `ocvtp.bench.samples.PARTS`.
        metric: `ttft` (tensors on the device to the first token: tower, pruner, projector and
            prefill), `tpot` (each token after the first), `request` (tensors on the device to the
            end), `other` (what no stage has, of `whole`), or one of the parts.
        new_tokens: of every answer.
    """
    part = {name: np.asarray(values, dtype=np.float64) for name, values in samples.items()}
    found: Array
    if metric == "ttft":
        found = sum((part[name] for name in _PROMPT), np.zeros(1))
    elif metric == "tpot":
        found = part["decode"] / (new_tokens - 1)
    elif metric == "request":
        found = part["whole"] - part["preprocess"]
    elif metric == "other":
        found = part["whole"] - sum((part[name] for name in STAGES), np.zeros(1))
    else:
        found = part[metric]
    return found


def label_of(row: Facts) -> str:
    """A pruner, and what was changed of its savings: which line of a plot a row is a point of."""
    return f"{row['label']} [{row['changed']}]" if row["changed"] else str(row["label"])


def is_control(row: Facts) -> bool:
    """Whether a row is there to be compared with."""
    from ocvtp.pruners import list_pruners, pruner_class

    name = row["label"].partition(":")[0]
    return name in list_pruners() and pruner_class(name).status == "control"


def cell(found: Facts, new_tokens: int) -> dict[str, Any]:
    """One cell of results.json.

    Args:
        found: of a cell, raw, as `ocvtp.bench.run` keeps it.
        new_tokens: of every answer.
    """
    bare = found["rows"][0]
    block = statistics.block_length(
        [series(row["samples"], "request", new_tokens).tolist() for row in found["rows"]]
    )
    sizes = {k: found["header"][k] for k in ("batch_size", "text_length", "images_per_prompt")}
    rows = [_row(row, bare, sizes, block, new_tokens) for row in found["rows"]]
    return {**sizes, **found["sizes"], "block": block, "unfit": found["unfit"], "rows": rows}


def _row(
    row: Facts, bare: Facts, sizes: Mapping[str, int], block: int, new_tokens: int
) -> dict[str, Any]:
    """A row with its figures.

    `figures`: of every metric median, p10, p90, interval, ratio to the bare model with interval.
    `stages`: medians, with `other`. `accounted`: the share of the whole that the stages are.
    `operations_left`: of the bare model's before the first token, and in the prefill alone.
    """
    samples = row["samples"]
    figures = {name: _figure(samples, bare["samples"], name, block, new_tokens) for name in METRICS}
    stages = {name: _median(samples, name, new_tokens) for name in (*STAGES, "around", "other")}
    whole = series(samples, "whole", new_tokens)
    accounted = 1 - series(samples, "other", new_tokens) / whole
    seconds = figures["request"]["median"] / 1e3
    requests = sizes["batch_size"] / seconds
    facts: dict[str, Any] = {
        "figures": figures,
        "stages": stages,
        "accounted": float(np.median(accounted)),
        "throughput": {
            "requests_per_second": requests,
            "images_per_second": requests * sizes["images_per_prompt"],
            "tokens_per_second": requests * new_tokens,
        },
        "operations_left": _left(row, bare),
    }
    facts["saved_of_possible"] = _saved(facts)
    facts["select_share_of_ttft"] = facts["stages"][SELECT] / figures["ttft"]["median"]
    rounded: dict[str, Any] = _rounded(facts)
    return {**row, **rounded}


def _figure(
    samples: Facts, bare: Facts, metric: str, block: int, new_tokens: int
) -> dict[str, Any]:
    own, other = (series(of, metric, new_tokens).tolist() for of in (samples, bare))
    if min(own) <= 0 or min(other) <= 0:  # the stage did not run
        return {"median": float(np.median(own))}
    low, high = np.quantile(own, (0.1, 0.9))
    middle = statistics.median(own, block)
    return {
        "median": middle.value,
        "p10": float(low),
        "p90": float(high),
        "low": middle.low,
        "high": middle.high,
        "ratio": asdict(statistics.ratio(own, other, block)),
    }


def _left(row: Facts, bare: Facts) -> dict[str, float]:
    """Shares of the bare model's operations: what time could fall to if it followed them."""
    own, all_ = row["operations"], bare["operations"]
    return {
        "ttft": sum(own.get(k, 0) for k in _OF_TTFT) / sum(all_.get(k, 0) for k in _OF_TTFT),
        "prefill": own.get(MODEL, 0) / all_[MODEL],
    }


def _saved(facts: Facts) -> dict[str, float | None]:
    """Time saved over what operations allow; None where they allow nothing."""
    found: dict[str, float | None] = {}
    for name, left in facts["operations_left"].items():
        ratio = facts["figures"][name].get("ratio")
        found[name] = None if left >= 1 or ratio is None else (1 - ratio["value"]) / (1 - left)
    return found


def _median(samples: Facts, metric: str, new_tokens: int) -> float:
    return float(np.median(series(samples, metric, new_tokens)))


def _rounded(value: Any) -> Any:
    """Floats to a few digits, at any depth."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
