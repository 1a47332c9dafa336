"""What every pruner's `select` costs beside the vision tower, on one CPU thread.

    python benchmarks/select.py                        # about 20 minutes
    python benchmarks/select.py --rounds 2 --no-tower  # a glance
    python benchmarks/select.py --forms                # greedy methods beside official forms alone

Inputs are random and of LLaVA-1.5-7B's sizes: features of width 1024, projected tokens of width
4096. Methods that read projected tokens are measured at width 1024 too, where the goals of the
greedy ones stand. Every round runs every pruner and the tower once. Beside greedy methods and SCOPE
stand the same picks as the official code computes them (`benchmarks.official_forms`), and the bare
matrix product that these cannot do without; the clock is the thread's own there, so that the turns
of other programs do not count.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # the standard library has a `select` too: look in the root, not here
    sys.path[0] = __file__.removesuffix("benchmarks/select.py") or "."

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ocvtp
from benchmarks.official_forms import FORMS
from benchmarks.timing import environment, interleaved, medians_ms, ratio, write
from ocvtp.pruners import Pruner, trainable
from ocvtp.random_models.clip_config import random_tower, vision_config
from ocvtp.structures import VisualTokens

TOWER = "random:clip-vit-large-patch14-336"
DEFAULT_OUTPUT = Path(__file__).parent / "results" / "select-cpu.json"
WIDTH, HEADS, SHARED, BLOCKS = 1024, 16, 768, 24

CASES: dict[str, dict[str, Any]] = {
    "N=576, K=64, B=1": {"grid_hw": (24, 24), "num_keep": 64, "batch": 1, "crops": 1},
    "N=576, K=64, B=8": {"grid_hw": (24, 24), "num_keep": 64, "batch": 8, "crops": 1},
    "N=2880, K=160, B=1": {"grid_hw": (120, 24), "num_keep": 160, "batch": 1, "crops": 5},
}
FORMS_CASES: dict[str, dict[str, Any]] = {
    "N=576, K=128, B=1": {"grid_hw": (24, 24), "num_keep": 128, "batch": 1},
    "N=576, K=128, B=8": {"grid_hw": (24, 24), "num_keep": 128, "batch": 8},
}
FORMS_NAME = "select-official-cpu.json"
"""The file of official forms, beside the other."""
GOALS_MS = {
    "N=576, K=64, B=1": {
        "fastervlm": 3, "fopru": 3, "hiprune": 3, "uniform": 3, "visionzip": 4, "trim": 12,
        "todre": 10, "divprune": 20, "cdpruner": 20, "zspaprune": 20, "vispruner": 20, "scope": 24,
    },
    "N=2880, K=160, B=1": {"divprune": 250, "cdpruner": 250},
}  # fmt: skip


def make_tokens(batch: int, grid_hw: tuple[int, int], projected_width: int) -> VisualTokens:
    """Everything that any pruner asks for."""
    random = torch.Generator().manual_seed(0)
    count = grid_hw[0] * grid_hw[1]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    kinds = ("cls", "cls_sharpest", "received", "given")
    attention = {
        (block, kind): (2 * draw(batch, count)).softmax(dim=1)
        for block in (8, -2, -1)
        for kind in kinds
    }
    keys = {block: draw(batch, count, WIDTH) for block in (-2, -1)}
    kinds_of_networks = {cls.network_class for cls in trainable.trainables().values()}
    layers = {network.default_layer(BLOCKS) for network in kinds_of_networks}
    return VisualTokens(
        features=draw(batch, count, WIDTH),
        grid_hw=grid_hw,
        cls=draw(batch, WIDTH),
        hidden={layer: draw(batch, count, WIDTH) for layer in layers},
        attention=attention,  # type: ignore[arg-type]
        keys=keys,
        cls_keys={block: draw(batch, WIDTH) for block in keys},
        cls_queries={block: draw(batch, WIDTH) for block in keys},
        num_heads=HEADS,
        projected=draw(batch, count, projected_width),
        text=draw(batch, 32, projected_width),
        clip_visual=draw(batch, count, SHARED),
        clip_text=draw(batch, 1, SHARED),
    )


def build(name: str, num_keep: int, tokens: VisualTokens) -> Pruner:
    """A pruner; one that is trained with random weights, of the sizes that are usual here."""
    settings: dict[str, Any] = {}
    if name in trainable.trainables():
        cls = trainable.of_name(name)
        config = cls.usual_config(tokens, cls.network_class.default_layer(BLOCKS))
        settings["network"] = cls.network_class.untrained(config, seed=0)
    return ocvtp.build_pruner(name, num_keep=num_keep, **settings)


def measure(case: dict[str, Any], rounds: int, tower: Any) -> dict[str, Any]:
    """Median milliseconds of every pruner, and of the tower on the same images."""
    runs: dict[str, Callable[[], Any]] = {}
    for width in (4096, 1024):
        tokens = make_tokens(case["batch"], case["grid_hw"], width)
        for name in ocvtp.list_pruners("llm_input"):
            pruner = build(name, case["num_keep"], tokens)
            if width == 4096:
                runs[name] = lambda p=pruner, t=tokens: p.select(t)
            elif pruner.needs.projected:
                runs[f"{name}, projected width 1024"] = lambda p=pruner, t=tokens: p.select(t)
    if tower is not None:
        pixels = torch.randn(case["batch"] * case["crops"], 3, 336, 336)
        runs["tower"] = lambda: tower(pixels)
    with torch.inference_mode():
        return medians_ms(interleaved(runs, rounds=rounds))


def beside_forms(case: dict[str, Any], rounds: int, width: int) -> dict[str, Any]:
    """Milliseconds of greedy methods and of their official forms, and how they compare."""
    tokens, num_keep = make_tokens(case["batch"], case["grid_hw"], width), case["num_keep"]
    found = {}
    for name, form in FORMS.items():
        pruner = build(name, num_keep, tokens)
        read = tokens.projected if pruner.needs.projected else tokens.features
        assert read is not None
        runs: dict[str, Callable[[], Any]] = {
            "ours": lambda p=pruner: p.select(tokens),
            "official": lambda f=form: f(tokens, num_keep),
            "product": lambda x=read: x @ x.mT,
        }
        with torch.inference_mode():
            seconds = interleaved(runs, rounds, clock=time.thread_time)
        found[name] = {
            "width": read.shape[2],
            "ms": medians_ms(seconds),
            "official / ours": ratio(seconds, "official", "ours"),
        }
        print(name, found[name], flush=True)
    return found


def measure_forms(rounds: int, output: Path) -> None:
    """Greedy methods beside official forms, in every case: written after each."""
    found: dict[str, Any] = {}
    for name, case in (FORMS_CASES | CASES).items():
        found[name] = beside_forms(case, rounds, 4096)
        write(output, environment() | {"clock": "of the thread", "cases": found})


def against_goals(results: dict[str, Any]) -> dict[str, Any]:
    """Each goal next to what was measured, at both widths where there are two."""
    found: dict[str, Any] = {}
    for case, goals in GOALS_MS.items():
        for name, goal in goals.items():
            names = [name, f"{name}, projected width 1024"]
            measured = {n: results[case][n] for n in names if n in results[case]}
            met = {n: ms <= goal for n, ms in measured.items()}
            found[f"{name}, {case}"] = {"goal ms": goal, "measured ms": measured, "met": met}
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-tower", action="store_true")
    parser.add_argument("--forms", action="store_true", help="greedy methods beside official forms")
    parser.add_argument("--no-forms", action="store_true", help="all but these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.no_forms:
        measure_forms(arguments.rounds, arguments.output.with_name(FORMS_NAME))
    if arguments.forms:
        return
    tower = None if arguments.no_tower else random_tower(vision_config(TOWER), 0).eval()
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        results[name] = measure(case, arguments.rounds, tower)
        print(name, results[name], flush=True)
    goals = against_goals(results)
    write(arguments.output, environment() | {"ms": results, "goals": goals})


if __name__ == "__main__":
    main()
