"""What results.json of a benchmark holds of a row, by name.

Apart from `timeline` and `measure`, which note it: reading results needs no PyTorch.
"""

from __future__ import annotations

SCHEMA = 1
KIND = "ocvtp bench"

AROUND, TOWER, SELECT, PROJECT, MODEL, DECODE, AFTER = (
    "around",
    "tower",
    "select",
    "project",
    "model",
    "decode",
    "after",
)
SPANS = (AROUND, TOWER, SELECT, PROJECT, MODEL, DECODE, AFTER)
"""`around`: what generate() and the rewriting of the prompt do before the first token, outside of
all modules. `model`: the language model's pass over the prompt, and its head. `after`: after the
last token."""

PARTS = (
    "preprocess",
    "tower",
    "select",
    "project",
    "prefill",
    "around",
    "decode",
    "after",
    "whole",
)
"""What is noted of every request, in milliseconds. `prefill` holds `around`; all but these two,
`after` and `whole` are exclusive, and `whole` is the wall clock's."""

STAGES = ("preprocess", "tower", "select", "project", "prefill", "decode")
METRICS = ("ttft", "tpot", "request", "prefill", "tower")
"""What has intervals and is compared, in milliseconds: see `ocvtp.bench.summary.series`."""
