"""Interleaved timing: every round runs each candidate once, so that noise hits all alike."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers


def interleaved(
    candidates: dict[str, Callable[[], Any]],
    rounds: int,
    warmups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after the warm-ups."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(warmups + rounds):
        for name, run in candidates.items():
            start = clock()
            run()
            elapsed = clock() - start
            if index >= warmups:
                seconds[name].append(elapsed)
    return seconds


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> dict[str, float]:
    """Ratio of the medians, and the quartiles of the ratio within rounds."""
    pairs = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
    low, _, high = statistics.quantiles(pairs, n=4)
    medians = statistics.median(seconds[above]) / statistics.median(seconds[below])
    return {"of_medians": round(medians, 4), "q25": round(low, 4), "q75": round(high, 4)}


def medians_ms(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median milliseconds of each candidate."""
    return {name: round(1e3 * statistics.median(s), 3) for name, s in seconds.items()}


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
