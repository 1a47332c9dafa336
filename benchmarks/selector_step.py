"""What one training step of a selector costs at full size: operations, bytes, hours. Counted.

    python -m benchmarks.selector_step                      # LLaVA-1.5-7B, recipe `kl`
    python -m benchmarks.selector_step --model random:llava-1.5-13b --batch-size 8 --json

The step of `SelectorModule` runs as it is, on numbers without values, so that nothing of the size
of a model is allocated. Further words change settings, as of `ocvtp train`.

A multiplication and an addition are two operations; causal attention counts whole, and all but
matrix products, convolutions and attention counts nothing. Attention is that of kernels which do
not hold its matrix. Models that compare the tiles of an image (LLaVA-NeXT, LLaVA-OneVision) cannot
be counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
import yaml
from PIL import Image
from torch import Tensor

from benchmarks.meta import Kept, Operations, WithoutValues
from benchmarks.timing import write
from ocvtp.training.run import build
from ocvtp.training.selector import SelectorModule
from ocvtp.transformers_names import both

MODEL = "random:llava-1.5-7b"
SETTINGS = {"host.dtype": "bfloat16", "warm_start": "null"}
SIZES = {"prompted.Prompted": {"scorer.dim": 512, "scorer.blocks": 4, "scorer.heads": 8}}
"""Of scorers, by the end of their class path: the recipes have those of a small model."""
FP32 = 4
NOT_TOLD = ("config", "json", "output")


def build_module(config: str, model: str, words: Sequence[str]) -> SelectorModule:
    """The module of a recipe, its model and all that learns."""
    scorer = yaml.safe_load(Path(config).read_text())["model"]["init_args"]["scorer"]["class_path"]
    sizes = next((own for end, own in SIZES.items() if scorer.endswith(end)), {})
    settings = [f"--model.{name}={value}" for name, value in {**SETTINGS, **sizes}.items()]
    found: SelectorModule = build(
        ["--config", config, f"--model.host.model={model}", *settings, *words], "teacher"
    ).model
    return found


def questions(module: SelectorModule, count: int, asked: int, answered: int) -> dict[str, Any]:
    """A batch of questions of one length, about images that the model sees whole.

    Args:
        module: whose model reads them.
        count: of questions.
        asked: letters of each, tokens of a tokenizer that reads bytes.
        answered: likewise, of its answer.
    """
    height, width = size = both(getattr(module.vlm.config.vision_config, "image_size", 336))
    generator = np.random.default_rng(0)
    masks = np.zeros((1, *size), dtype=bool)
    masks[:, : height // 2, : width // 2] = True
    items = [
        {
            "image": Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)),
            "question": "q" * asked,
            "answer": "a" * answered,
            "before": (),
            "masks": masks,
            "key": str(number),
        }
        for number in range(count)
    ]
    return module.transform(items)


@contextmanager
def _attributed(module: SelectorModule, counted: Operations) -> Iterator[None]:
    """Inside the block operations are of the modules that they run in."""
    parts: list[Any] = []
    host = module.frozen_host

    def enter(name: str | None) -> Any:
        def hook(*_: Any) -> None:
            passed = "pruned pass" if torch.is_grad_enabled() else "full pass"
            parts.append(counted.of(name or passed))
            parts[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        parts.pop().__exit__(None, None, None)

    ask = module.ask

    def asked(batch: dict[str, Any]) -> Any:
        with counted.of("tower"):
            return ask(batch)

    head = host.model.get_output_embeddings()
    with ExitStack() as hooks:
        hooks.enter_context(patch.object(module, "ask", asked))
        for name, part in (("scorer", module.network), (None, host.language_model), (None, head)):
            hooks.enter_context(_removed(part.register_forward_pre_hook(enter(name))))
            hooks.enter_context(_removed(part.register_forward_hook(leave)))
        yield


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    yield
    handle.remove()


def forward(module: SelectorModule, batch: dict[str, Any], num_keep: int) -> Tensor:
    """The loss of a step."""
    found = module._step(batch, module.ask(batch), num_keep, 0.5, module.losses)
    return sum((loss(found).mean() for loss in module.losses), found.scores.new_zeros(()))


def operations_of(module: SelectorModule, batch: dict[str, Any], num_keep: int) -> dict[str, int]:
    """Of one step, by its parts."""
    counted = Operations()
    with counted, _attributed(module, counted):
        with counted.of("losses"):
            loss = forward(module, batch, num_keep)
        with counted.of("backward"):
            loss.backward()
    return counted.parts | {"all": counted.total}


def kept_bytes(module: SelectorModule, batch: dict[str, Any], num_keep: int) -> int:
    """What a step keeps for its backward pass."""
    with Kept(chain(module.parameters(), module.buffers())) as kept:
        forward(module, batch, num_keep)
    return kept.num_bytes


def count(arguments: argparse.Namespace, config: str, words: Sequence[str]) -> dict[str, Any]:
    """Operations and bytes of one step, with and without checkpointing."""
    with WithoutValues() as memory:
        module = build_module(config, arguments.model, words)
    if any(True for _ in module.gate.buffers()):
        raise ValueError(
            f"the gate of {config} must measure what tokens are like, and here they have no"
            " values; pass a recipe with another gate, e.g. key_bias or scale."
        )
    batch = questions(module, arguments.batch_size, arguments.asked, arguments.answered)
    ids, num_keep = batch["inputs"]["input_ids"], arguments.num_keep
    learns = list(module.trained())
    results: dict[str, Any] = {
        "columns": ids.shape[1],
        "answer columns": int(batch["answers"][0].sum()),
        "parameters": {
            "model": sum(p.numel() for p in module.vlm.parameters()),
            "scorer": sum(p.numel() for p in learns),
        },
        "fixed bytes": {
            "model": _bytes(chain(module.vlm.parameters(), module.vlm.buffers())),
            "scorer": _bytes(learns),
            "gradients": _bytes(learns),
            "AdamW": 2 * FP32 * sum(p.numel() for p in learns),
        },
    }
    through = bool(module.reads & {"pruned", "states"})  # else no layer has a backward pass
    for checkpointing in (False, True) if through else (False,):
        module.host = replace(module.host, checkpointing=checkpointing)
        module.on_fit_start()
        with memory:
            kept = kept_bytes(module, batch, num_keep)
            parts = operations_of(module, batch, num_keep)
            module.zero_grad()
            gc.collect()
            memory.peak = before = memory.live
            forward(module, batch, num_keep).backward()
            peak = memory.peak - before
        module.teardown("fit")
        run = parts["all"] / arguments.batch_size * arguments.questions
        results["checkpointing" if checkpointing else "no checkpointing"] = {
            "operations": parts,
            "bytes kept for the backward pass": kept,
            "bytes at the peak, gradients among them": peak,
            "hours": round(run / (arguments.flops * arguments.utilisation) / 3600, 2),
        }
    return results


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def told(results: dict[str, Any]) -> str:
    """The same as a table."""
    lines = []
    for recipe, found in results["recipes"].items():
        lines += ["", f"{recipe}: a step of {results['batch_size']} questions"]
        for name, value in found["parameters"].items():
            lines.append(f"  {name:42s} {value / 1e6:10,.1f} M parameters")
        for name, value in found["fixed bytes"].items():
            lines.append(f"  {name:42s} {value / 2**30:10,.2f} GiB")
        for kind in [kind for kind in ("no checkpointing", "checkpointing") if kind in found]:
            lines.append(kind)
            for name, value in found[kind].items():
                if name == "operations":
                    parts = value.items()
                    lines += [f"  {part:42s} {n / 1e12:10,.2f} TFLOPs" for part, n in parts]
                elif name == "hours":
                    lines.append(f"  {'of one GPU for all questions':42s} {value:10,.2f} hours")
                else:
                    lines.append(f"  {name:42s} {value / 2**30:10,.2f} GiB")
    return "\n".join(lines).strip()


def main(words: Sequence[str] | None = None) -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        nargs="+",
        default=["configs/train/selector/kl.yaml"],
        help="settings of `ocvtp train`, one or more (default: recipe kl)",
    )
    parser.add_argument("--model", default=MODEL, help="random weights (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="questions a step")
    parser.add_argument("--num-keep", type=int, default=64, help="K")
    parser.add_argument("--asked", type=int, default=64, help="tokens of a question")
    parser.add_argument("--answered", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--questions", type=int, default=665_000, help="of the whole run")
    parser.add_argument("--flops", type=float, default=989e12, help="of the GPU, a second")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of these reached")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--output", type=Path, help="write JSON there, too")
    words = sys.argv[1:] if words is None else words
    arguments, more = parser.parse_known_args(words)
    results = {
        "command": shlex.join(["python", "-m", "benchmarks.selector_step", *words]),
        "counted, not measured": True,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{name: value for name, value in vars(arguments).items() if name not in NOT_TOLD},
        "recipes": {Path(name).stem: count(arguments, name, more) for name in arguments.config},
    }
    if arguments.output is not None:
        write(arguments.output, results)
    print(json.dumps(results, indent=2) if arguments.json else told(results))


if __name__ == "__main__":
    main()
