"""What the learned pruner costs at LLaVA-1.5 size, on one CPU thread, with random weights.

    python -m benchmarks.road                      # about 15 minutes
    python -m benchmarks.road --only pruner        # one part
    python -m benchmarks.road --only training --device cuda --dtype bfloat16 --batch-size 64

Goals: the cut tower <= 0.45 x the full tower; encode + assign + select <= 1.3 x the bare matrix
products it cannot avoid; a model that keeps everything under a pruner <= 1.03 x the bare model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ocvtp
from benchmarks.timing import environment, interleaved, medians_ms, ratio, write
from ocvtp.bench.timeline import synchronize
from ocvtp.encoders.clip import CLIPEncoder
from ocvtp.hosts.loading import load_model
from ocvtp.random_models.clip_config import random_tower, vision_config
from ocvtp.slots import OCPruner, OCPrunerConfig
from ocvtp.slots.kept import KeptObjective
from ocvtp.slots.objectives import SlotsObjective
from ocvtp.structures import Needs, VisualTokens

TOWER = "random:clip-vit-large-patch14-336"
LAYER = 9
DEFAULT_OUTPUT = Path(__file__).parent / "results" / "road-cpu.json"


def tower() -> dict[str, Any]:
    """The tower cut after nine blocks against the whole one."""
    cut = CLIPEncoder(TOWER, layer=LAYER).load(Needs(hidden=(LAYER,)))
    full = random_tower(vision_config(TOWER), 0).eval()
    pixels = torch.randn(1, 3, 336, 336)
    seconds = interleaved({"cut": lambda: cut(pixels), "full": lambda: full(pixels)}, rounds=9)
    return {"ms": medians_ms(seconds), "cut / full": ratio(seconds, "cut", "full"), "goal": 0.45}


def bare_products(network: OCPruner, features: Tensor, num_slots: int) -> Any:
    """Only the matrix products of `assign`, on operands of the right shape, nothing else."""
    linears = [network.encode[1].weight.t(), network.encode[3].weight.t()]
    slot = network.attention
    keys, values = slot.to_key.weight.t(), slot.to_value.weight.t()
    query, gru = slot.to_query.weight.t(), slot.gru
    first, last = slot.ffn[0].weight.t(), slot.ffn[3].weight.t()
    batch, count, _ = features.shape
    dim = network.config.slot_dim
    slots = torch.randn(batch * num_slots, dim)
    hidden = torch.randn(batch * count, network.config.hidden_dim)
    tokens = torch.randn(batch * count, dim)
    wide = torch.randn(batch * num_slots, network.config.ffn_dim)
    k, v = torch.randn(batch, dim, count), torch.randn(batch, count, dim)
    s, a = slots.view(batch, num_slots, dim), torch.randn(batch, num_slots, count)
    flat = features.flatten(0, 1)

    def run() -> None:
        flat @ linears[0]
        hidden @ linears[1]
        tokens @ keys
        tokens @ values
        for _ in range(network.config.num_iterations):
            slots @ query
            s @ k
            a @ v
            slots @ gru.weight_ih.t()
            slots @ gru.weight_hh.t()
            slots @ first
            wide @ last

    return run


def pruner() -> dict[str, Any]:
    """Encode + assign + select, K = 64 of 576, against its bare matrix products."""
    results: dict[str, Any] = {"goal": 1.3}
    network = OCPruner().eval()
    select = ocvtp.build_pruner("ocvtp", num_keep=64, network=network)
    for batch in (1, 8):
        features = torch.randn(batch, 576, 1024)
        tokens = VisualTokens(
            features,
            (24, 24),
            hidden={LAYER: features},
            attention={(-2, "received"): torch.rand(batch, 576)},
        )
        seconds = interleaved(
            {
                "select": lambda tokens=tokens: select.select(tokens),
                "bare": bare_products(network, features, 64),
            },
            rounds=60 if batch == 1 else 20,
            warmups=3,
        )
        results[f"B={batch}"] = {
            "ms": medians_ms(seconds),
            "select / bare": ratio(seconds, "select", "bare"),
        }
    return results


def attached() -> dict[str, Any]:
    """Prefill with every token kept under a pruner against the bare model (4 x 2048 LLM layers)."""
    model, _ = load_model("random:llava-mid")
    image = model.config.image_token_id
    ids = torch.cat([torch.tensor([1]), torch.full((576,), image), torch.arange(100, 140)])[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 336, 336),
        "logits_to_keep": 1,
    }

    def under(name: str, **settings: Any) -> Any:
        chosen = ocvtp.build_pruner(name, **settings)

        def run() -> None:
            with chosen(model):
                model(**inputs)

        return run

    network = OCPruner().eval()
    seconds = interleaved(
        {
            "bare": lambda: model(**inputs),
            "keep all": under("none"),
            "ocvtp K=64": under("ocvtp", num_keep=64, network=network),
            "fastervlm K=64": under("fastervlm", num_keep=64),
        },
        rounds=9,
    )
    ratios = {f"{n} / bare": ratio(seconds, n, "bare") for n in seconds if n != "bare"}
    return {"ms": medians_ms(seconds), **ratios, "goal": {"keep all / bare": 1.03}}


def learner(name: str, tower: str) -> tuple[SlotsObjective | KeptObjective, OCPrunerConfig]:
    """An objective, and the network that its recipe in configs/train has for a tower."""
    sizes = vision_config(tower)
    side = sizes.image_size // sizes.patch_size
    layer = min(LAYER, sizes.num_hidden_layers // 2)
    config = OCPrunerConfig(feature_dim=sizes.hidden_size, grid_hw=(side, side), layer=layer)
    if name == "slots":
        objective = SlotsObjective()
        return objective, replace(config, decoder=objective.decoder)
    kept = KeptObjective(target_layer=-2, weights="cls", penalty=0.3, teacher=0.1)
    config = replace(config, objective=name, target_layer=-2, choice="one_to_one")
    return kept, replace(config, truncation="none", frozen_queries=True, standardize=True)


def training(
    batch: int = 4,
    device: str = "cpu",
    dtype: Any = "float32",
    objective: str = "slots",
    tower: str = TOWER,
    rounds: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """One full training step: tower, network, decoder, backward, AdamW. S = 64.

    Args:
        batch: images; configs/train/clip_l14_336.yaml has 12, and fp32.
        device: e.g. cuda.
        dtype: of the tower; if not float32, the step runs under autocast to it.
        objective: `slots` or `kept`.
        tower: whose tokens it reads.
        rounds: that count, and before them; None for enough of the device.

    Returns:
        among others images a second, with the tower and with features that were extracted before.
    """
    on_gpu, kind = device != "cpu", getattr(torch, dtype)
    held = _forget_peak(device)
    made, config = learner(objective, tower)
    layer = config.layer
    encoder = CLIPEncoder(tower, layer=layer, dtype=dtype).load(made.needs(layer)).to(device)
    network = OCPruner(config).train().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
    side = vision_config(tower).image_size
    pixels = torch.randn(batch, 3, side, side, device=device, dtype=kind)
    before, place = _peak_gib(device) - held, torch.device(device)
    parts: dict[str, Any] = {}

    def encode() -> None:
        with torch.no_grad():
            parts["tokens"] = encoder(pixels)
        synchronize(place)

    def learn() -> None:
        with torch.autocast(place.type, kind, enabled=dtype != "float32"):
            loss = made(network, parts["tokens"], 64).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        synchronize(place)

    num_rounds, warmups = rounds or ((30, 5) if on_gpu else (3, 1))
    steps = {"tower": encode, "network, decoder, AdamW": learn}
    medians = medians_ms(interleaved(steps, num_rounds, warmups))
    learning = medians["network, decoder, AdamW"]
    return {
        "objective": objective,
        "batch": batch,
        "dtype": dtype,
        "ms": medians,
        "images per second": round(1e3 * batch / sum(medians.values()), 3),
        "images per second from extracted features": round(1e3 * batch / learning, 3),
        f"peak {'allocated' if on_gpu else 'resident'} GiB": round(_peak_gib(device) - held, 2),
        "of which before the first step GiB": round(before, 2),
    }


def _forget_peak(device: str) -> float:
    """Begin to watch a GPU's memory; returns what others hold of it in GiB, e.g. models."""
    if device == "cpu":
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**30


def _peak_gib(device: str) -> float:
    """The most memory so far: of a GPU's allocator, or resident."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "tower": tower,
    "pruner": pruner,
    "attached": attached,
    "training": training,
}


def main() -> None:
    """Run each part in a process of its own, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--device", default="cpu", help="of the training step, with --only")
    parser.add_argument("--batch-size", type=int, default=4, help="of the training step")
    parser.add_argument("--dtype", default="float32", help="of the training step")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    arguments = parser.parse_args()
    if arguments.only:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        settings = (arguments.batch_size, arguments.device, arguments.dtype)
        settings = settings if arguments.only == "training" else ()
        with torch.set_grad_enabled(arguments.only == "training"):
            print(json.dumps(PARTS[arguments.only](*settings)))
        return
    torch.set_num_threads(1)
    results: dict[str, Any] = {"command": "python benchmarks/road.py", **environment()}
    for name in PARTS:
        run = subprocess.run(
            [sys.executable, __file__, "--only", name], capture_output=True, text=True, check=True
        )
        results[name] = json.loads(run.stdout.splitlines()[-1])
        print(name, json.dumps(results[name], indent=2))
        write(arguments.output, results)


if __name__ == "__main__":
    main()
