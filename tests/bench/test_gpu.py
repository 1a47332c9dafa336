"""What is run on a GPU: commands that parse, goals that are judged."""

from __future__ import annotations

import argparse

import pytest

from benchmarks import gpu, road
from ocvtp.bench.run import Plan
from ocvtp.bench.variants import variants
from ocvtp.bench.workload import grid
from ocvtp.commands import bench
from ocvtp.slots import OCPruner, OCPrunerConfig


@pytest.mark.parametrize("name", gpu.RUNS)
def test_commands_are_understood(name):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    words = gpu.command(name, 3, 12)
    assert words[0] == "bench"
    found = parser.parse_args(words[1:])
    assert (found.dtype, found.device, found.warmup) == ("bfloat16", "cuda", 3)
    cells = grid(found.batch_size, found.text_length, found.images_per_prompt)
    Plan(found.pruners, found.num_keep, cells, repetitions=found.repetitions)
    network = OCPruner(OCPrunerConfig(noise_rows=4, hidden_dim=8, slot_dim=4, ffn_dim=8))
    made = variants(found.pruners, found.num_keep, 2880, network=network, rows=found.savings)
    assert len(made) > len(found.pruners)


def test_a_training_step_is_one_of_roads_parts():
    for step in gpu.TRAINING:
        words = gpu.training_command(*step)
        assert words[words.index("--only") + 1] in road.PARTS


def test_goals_are_judged():
    def row(label, ratio, left, share):
        return {
            "key": label,
            "label": label,
            "operations_left": {"prefill": left},
            "figures": {"prefill": {"ratio": {"value": ratio}}},
            "select_share_of_ttft": share,
        }

    rows = [row("unpruned", 1, 1, 0), row("ocvtp", 0.2, 0.19, 0.05), row("fopru", 0.3, 0.19, 0.01)]
    cells = [{"batch_size": size, "rows": rows} for size in (1, 8)]
    assert list(gpu.goals({"cells": cells})) == [
        "- met: ocvtp, prefill speed-up / possible 0.950 (>= 0.85)",
        "- NOT met: ocvtp, select / TTFT 0.050 (<= 0.03)",
        "- NOT met: fopru, prefill speed-up / possible 0.633 (>= 0.85)",
    ]
