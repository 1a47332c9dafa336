"""What pruning at each stage saves of the tower and of the prefill, on one CPU thread.

    python -m benchmarks.stages                    # about 7 minutes

A LLaVA of random weights (CLIP ViT-L/14-336, 8 layers of width 2048, prompt of 40 text tokens)
reads one image of 576 tokens. Beside each measured time stands the bound: the share of its floating
point operations that is left. Goal at K = 64: the saving is 80% of what the bound allows, at least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import ocvtp
from benchmarks.timing import environment, write
from ocvtp.encoders.clip import vision_config
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
        "logits_to_keep": 1,
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


class Clock:
    """Times the vision tower inside a forward."""

    def __init__(self, tower: Any) -> None:
        self.seconds, self.start = 0.0, 0.0
        tower.register_forward_pre_hook(self._before)
        tower.register_forward_hook(self._behind)

    def _before(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def _behind(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.start


@torch.no_grad()
def measure(rounds: int) -> dict[str, Any]:
    """Times and operations of every candidate, all of them once in every round."""
    model, inputs = build_model()
    pruners, clock = candidates(), Clock(model.model.vision_tower)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pruners}
    flops: dict[str, tuple[int, int]] = {}
    for index in range(1 + rounds):
        for name, pruner in pruners.items():
            handle = None if pruner is None else ocvtp.attach(model, pruner)
            if index == 0:  # also warms up
                with FlopCounterMode(model, display=False) as counter:
                    model(**inputs)
                flops[name] = _operations(counter)
            else:
                start = time.perf_counter()
                model(**inputs)
                times[name].append((clock.seconds, time.perf_counter() - start))
            if handle is not None:
                handle.remove()
    return {name: _row(times, flops, name) for name in pruners}


def _operations(counter: FlopCounterMode) -> tuple[int, int]:
    """Of the tower, and of everything."""
    counts = counter.get_flop_counts()
    tower = next(c for name, c in counts.items() if name.endswith("vision_tower"))
    return sum(tower.values()), counter.get_total_flops()


def _row(
    times: dict[str, list[tuple[float, float]]], flops: dict[str, tuple[int, int]], name: str
) -> dict[str, Any]:
    """Milliseconds, shares of the bare model, and how much of the possible saving was reached."""
    tower, whole = ([pair[i] for pair in times[name]] for i in (0, 1))
    bare = [pair[1] for pair in times["bare"]]
    shares = [own / other for own, other in zip(whole, bare, strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    bound = flops[name][1] / flops["bare"][1]
    row = {
        "ms": {
            "tower": round(1e3 * statistics.median(tower), 1),
            "whole": round(1e3 * statistics.median(whole), 1),
        },
        "GFLOPs": {"tower": flops[name][0] / 1e9, "whole": flops[name][1] / 1e9},
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
