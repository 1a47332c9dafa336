"""What pruning at each stage saves of the tower and of the prefill, on one CPU thread.

    python -m benchmarks.stages                    # about 7 minutes

A LLaVA of random weights (CLIP ViT-L/14-336, 8 layers of width 2048, prompt of 40 text tokens)
reads one image of 576 tokens. `whole` is the time to the first token, tower and pruner included
(`ocvtp.bench`). Beside it stands the bound: the share of its floating point operations that is
left. Goal at K = 64: the saving is 80% of what the bound allows, at least.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import ocvtp
from benchmarks.timing import environment, write
from ocvtp.bench import samples
from ocvtp.bench.measure import Bench
from ocvtp.bench.summary import series
from ocvtp.bench.variants import Variant
from ocvtp.bench.workload import Request
from ocvtp.evaluation.runner import Subject
from ocvtp.hosts.base import Savings
from ocvtp.random_models.clip_config import vision_config
from ocvtp.slots import OCPruner

TOWER = "random:clip-vit-large-patch14-336"
LAYERS, IMAGE_TOKEN, GOAL = 8, 32000, 0.8
BUDGETS = (192, 64)
DEFAULT_OUTPUT = Path(__file__).parent / "results" / "stages-cpu.json"


def build_model() -> tuple[Any, dict[str, Any]]:
    """The model and one prompt."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    config = LlavaConfig(
        vision_config=vision_config(TOWER), text_config=text, image_token_id=IMAGE_TOKEN
    )
    model = LlavaForConditionalGeneration(config).eval()
    words = torch.arange(100, 140)
    ids = torch.cat([torch.tensor([1]), torch.full((576,), IMAGE_TOKEN), words])[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 336, 336),
    }
    return model, inputs


def candidates() -> dict[str, Any]:
    """One method of each stage, by budget; None is the bare model."""
    network = OCPruner().eval()
    found: dict[str, Any] = {"bare": None}
    for count in BUDGETS:
        build: dict[str, Callable[[], Any]] = {
            "pixels: vprune": lambda k=count: ocvtp.build_pruner("vprune", num_keep=k),
            "encoder: tome": lambda k=count: ocvtp.build_pruner("tome", num_keep=k),
            "encoder: ocvtp, early": lambda k=count: ocvtp.build_pruner(
                "ocvtp", num_keep=k, network=network, early=True
            ),
            "llm_input: ocvtp": lambda k=count: ocvtp.build_pruner(
                "ocvtp", num_keep=k, network=network
            ),
            "llm_input: fastervlm": lambda k=count: ocvtp.build_pruner("fastervlm", num_keep=k),
            "llm_layers: fastv, from layer 2 on": lambda k=count: ocvtp.build_pruner(
                "fastv", stages=((2, k),)
            ),
        }
        found |= {f"{name}, K={count}": make() for name, make in build.items()}
    return found


@dataclass(frozen=True)
class Prompt(Request):
    """A prompt that is tensors already.

    Args:
        tensors: the model's inputs.
    """

    tensors: dict[str, Any] = field(default_factory=dict)

    def prepare(self, processor: Any, model: Any) -> dict[str, Any]:
        """The tensors."""
        del processor, model
        return self.tensors


def measure(rounds: int) -> dict[str, Any]:
    """Times and operations of every candidate, all of them once in every round."""
    model, inputs = build_model()
    timer = Bench(Subject(model, None, "random"), new_tokens=2)
    rows = [
        Variant(name) if pruner is None else Variant(name, None, pruner, Savings())
        for name, pruner in candidates().items()
    ]
    seen = {row.key: timer.look(row, inputs)["operations"] for row in rows}
    prompt = Prompt([], [], inputs)
    times = timer.rounds(prompt, rows, warmup=0, repetitions=rounds, tick=lambda _: None)
    return {row.key: _row(times, seen, row.key) for row in rows}


def _operations(of_stages: dict[str, int]) -> tuple[int, int]:
    """Of the tower, and of everything before the first token."""
    prompt = sum(count for stage, count in of_stages.items() if stage != samples.DECODE)
    return of_stages[samples.TOWER], prompt


def _row(
    times: dict[str, dict[str, list[float]]], seen: dict[str, dict[str, int]], name: str
) -> dict[str, Any]:
    """Milliseconds, shares of the bare model, and how much of the possible saving was reached."""
    tower = times[name]["tower"]
    whole, bare = (series(times[key], "ttft", 2) for key in (name, "bare"))
    flops, all_flops = _operations(seen[name]), _operations(seen["bare"])
    shares = (whole / bare).tolist()
    low, middle, high = statistics.quantiles(shares, n=4)
    bound = flops[1] / all_flops[1]
    row = {
        "ms": {
            "tower": round(statistics.median(tower), 1),
            "whole": round(statistics.median(whole), 1),
        },
        "GFLOPs": {"tower": flops[0] / 1e9, "whole": flops[1] / 1e9},
        "share of time": {"median": middle, "q25": low, "q75": high},
        "share of operations": bound,
    }
    if name != "bare":
        row["saving / bound"] = (1 - middle) / (1 - bound)
    return row


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = measure(arguments.rounds)
    write(arguments.output, environment() | {"goal": GOAL, "rows": rows})


if __name__ == "__main__":
    main()
