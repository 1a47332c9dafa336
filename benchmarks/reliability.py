"""What holds under attack and under kills: written to benchmarks/results/reliability.json.

    python -m benchmarks.reliability                              # all of it, about half an hour
    python -m benchmarks.reliability --only fuzz --inputs 10000   # one part; others stay
    python -m benchmarks.reliability --only kills --points 20

`make readme` writes the figures into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import random
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import ocvtp
from benchmarks.fuzz import fuzz
from benchmarks.kills import COMMANDS, kills
from benchmarks.reliability_table import OUTPUT, faults
from benchmarks.timing import environment, write
from ocvtp.hosts.loading import load_model
from ocvtp.hosts.prompt.chat_template import with_template

PRUNERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fastervlm", {"num_keep": 6}),
    ("visionzip", {"num_keep": 6, "num_contextual": 2}),
    ("divprune", {"num_keep": 6}),
    ("fastv", {"stages": ((1, 6),)}),
    ("tome", {"num_keep": 6}),
)
_STAGES = (
    *("model.vision_tower.encoder.layers.0", "model.vision_tower.encoder.layers.2.self_attn"),
    *("model.multi_modal_projector", "model.language_model.layers.0"),
    *("model.language_model.layers.1.self_attn", "model.language_model.norm", "lm_head"),
)
"""Modules of the model that exceptions are raised in; `select` is the pruner's own."""


class Injected(Exception):
    """What is raised where nothing should be."""


class Asked:
    """A tiny model of random weights, and a question about a picture."""

    def __init__(self) -> None:
        self.model, self.processor = load_model("random:tiny-llava", "float32", "cpu")
        text = with_template(self.processor, "What is it?", 1)
        images = [[Image.effect_noise((40, 40), 60).convert("RGB")] for _ in range(2)]
        self.inputs = [
            self.processor(images=[own], text=[text], return_tensors="pt") for own in images
        ]

    @torch.no_grad()
    def answer(self, number: int = 0) -> Tensor:
        """Logits of the question on picture `number`."""
        logits: Tensor = self.model(**self.inputs[number]).logits
        return logits

    def hooks(self) -> int:
        """Hooks and wrapped methods that are on the model."""
        modules = list(self.model.modules())
        kinds = ("_forward_hooks", "_forward_pre_hooks")
        own = sum("forward" in vars(module) for module in modules)
        return own + sum(len(getattr(module, kind)) for module in modules for kind in kinds)


def exceptions(count: int, start: int = 0) -> dict[str, Any]:
    """Raise in every stage of a pruned call, and see what is left behind.

    Args:
        count: exceptions that are raised.
        start: seed of where.

    Returns:
        how many were raised in each stage, and how often the next pruned call, the bare model
        after it, or what is on the model were not what they had been.
    """
    asked, draw = Asked(), random.Random(start)
    bare, clean = asked.answer(), asked.hooks()
    pruners = [ocvtp.build_pruner(name, **given) for name, given in PRUNERS]
    wanted = []
    for pruner in pruners:
        with pruner(asked.model):
            wanted.append(asked.answer())
    raised: dict[str, int] = dict.fromkeys((*_STAGES, "select"), 0)
    wrong: list[str] = []
    while sum(raised.values()) < count:
        number, stage = draw.randrange(len(pruners)), draw.choice([*raised])
        told = f"{PRUNERS[number][0]} in {stage}"
        with pruners[number](asked.model):
            broken = _broken(asked.model, pruners[number], stage)
            try:
                asked.answer()
            except Injected:
                raised[stage] += 1
            finally:
                broken()
            if not asked.answer().equal(wanted[number]):
                wrong.append(f"{told}: the next call differs")
        if asked.hooks() != clean:
            wrong.append(f"{told}: something is left on the model")
        if not asked.answer().equal(bare):
            wrong.append(f"{told}: the bare model differs")
    return {"raised": raised, "count": sum(raised.values()), "faults": wrong[:20]}


def _broken(model: nn.Module, pruner: Any, stage: str) -> Callable[[], None]:
    """Make a stage raise; returns what mends it."""

    def fail(*_: Any, **__: Any) -> None:
        raise Injected(stage)

    if stage == "select":
        pruner._select = fail
        return lambda: vars(pruner).pop("_select")
    return model.get_submodule(stage).register_forward_pre_hook(fail).remove


def threads(number: int, calls: int) -> dict[str, Any]:
    """Ask one pruned model from several threads at once, and compare with one after the other."""
    asked = Asked()
    pruner = ocvtp.build_pruner("visionzip", num_keep=6, num_contextual=2)
    alike = [0] * number
    with pruner(asked.model):
        wanted = [asked.answer(picture) for picture in range(2)]

        def ask(thread: int) -> None:
            for call in range(calls):
                picture = (thread + call) % 2
                alike[thread] += asked.answer(picture).equal(wanted[picture])

        running = [threading.Thread(target=ask, args=(n,)) for n in range(number)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    return {"threads": number, "calls": number * calls, "alike": sum(alike)}


def memory(calls: int) -> dict[str, Any]:
    """Memory of the process over pruned calls, each attached and removed."""
    asked = Asked()
    pruners = [ocvtp.build_pruner(name, **given) for name, given in PRUNERS]
    seen = []
    for call in range(calls):
        with pruners[call % len(pruners)](asked.model):
            asked.answer(call % 2)
        if call % (calls // 10) == calls // 10 - 1:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append(pages * resource.getpagesize())
    return {"calls": calls, "bytes": seen, "growth": seen[-1] - seen[len(seen) // 2 - 1]}


# ---------------------------------------------------------------- running


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and write what was asked for; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parts = ("fuzz", "kills", "exceptions", "threads", "memory")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--inputs", type=int, default=10_000, help="malformed ones")
    parser.add_argument("--points", type=int, default=20, help="kills of each command")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    _import_all()
    found = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    found["environment"] = environment()
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "kills": lambda: _killed(arguments, found),  # before threads start
        "fuzz": lambda: fuzz(arguments.inputs, arguments.seed),
        "exceptions": lambda: exceptions(1000, arguments.seed),
        "threads": lambda: threads(8, 25),
        "memory": lambda: memory(2000),
    }
    for part in (part for part in work if part in arguments.only):
        began = time.monotonic()
        found[part] = work[part]()
        write(arguments.output, found)
        print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)
    wrong = faults(found["fuzz"]) if "fuzz" in found else []
    wrong += [fault for one in found.get("kills", {}).values() for fault in one["faults"]]
    wrong += found.get("exceptions", {}).get("faults", [])
    print("\n".join(wrong) or "no faults")
    return bool(wrong)


def _killed(arguments: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """Written after each point: all of them take long."""
    own = found.setdefault("kills", {})
    with tempfile.TemporaryDirectory() as folder:
        killed = kills(arguments.commands, arguments.points, Path(folder), arguments.seed)
        for name, one in killed:
            own[name] = one
            write(arguments.output, found)
    return dict(own)


def _import_all() -> None:
    """What commands import late: a fork has it."""
    for name in ("evaluate", "bench", "extract", "resize"):
        importlib.import_module(f"ocvtp.commands.{name}")
    for name in ("ocvtp.training.run", "ocvtp.training.extraction", "scipy", "matplotlib.pyplot"):
        importlib.import_module(name)
    load_model("random:tiny-llava", "float32", "cpu")


if __name__ == "__main__":
    sys.exit(main())
