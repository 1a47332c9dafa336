"""Training on images against training on features that `ocvtp extract` wrote: rates, hours, disk.

    python -m benchmarks.features FOLDER          # about 5 minutes on two cores, 1 GB of disk

Measured: `ocvtp extract` and `ocvtp train` with two processes on the CPU, a CLIP of random weights
of ViT-S/16's size and a small slot network, on drawn JPEGs of 640 x 480. Where the time of an image
goes is told by the run's own `run/images_per_s` and `run/data_wait`: what the two runs' steps
differ by is the tower.

On paper: for the two recipes of CLIP ViT-L/14-336 the operations of one image are counted while one
image runs through tower, network, loss and backward pass; the bytes of its features are counted in
what would be stored. Hours and disk of COCO follow from the sizes of the data, the epochs of the
recipe, and the rates that are assumed (`--flops`, `--disk`).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.meta import Operations
from benchmarks.scale import write_images
from benchmarks.timing import environment, write
from ocvtp.data.coco import collate
from ocvtp.random_models.clip_config import plain_processor
from ocvtp.training.features import stored_rows
from ocvtp.training.run import build

DEFAULT_OUTPUT = Path(__file__).parent / "results" / "features.json"
RECIPES = ("clip_l14_336", "clip_l14_336_kept")
TOWER = "random:clip-vit-large-patch14-336"
IMAGES = 118_287
SMALL = CLIPVisionConfig(
    hidden_size=384,
    intermediate_size=1536,
    num_hidden_layers=12,
    num_attention_heads=6,
    image_size=224,
    patch_size=16,
    projection_dim=384,
)
SETTINGS = """\
seed_everything: 0
model:
  encoder:
    class_path: ocvtp.encoders.clip.CLIPEncoder
    init_args: {tower: TOWER, layer: 9, dtype: float32}
  objective:
    class_path: ocvtp.slots.objectives.SlotsObjective
    init_args: {decoder: {kind: masked_transformer, num_layers: 1, num_heads: 4, ffn_dim: 512}}
  network: {hidden_dim: 256, slot_dim: 128, ffn_dim: 256, noise_rows: 256}
  num_slots: [16]
data:
  class_path: ocvtp.data.folder.FolderDataModule
  init_args: {root: IMAGES, batch_size: 8}
trainer: {accelerator: cpu, max_epochs: 3, log_every_n_steps: 4}
"""

# ---------------------------------------------------------------------- measured


def measured(folder: Path, images: int) -> dict[str, Any]:
    """Rates of extraction and of both ways to train, two processes each."""
    tower, photos = folder / "tower", folder / "train2017"
    if not tower.is_dir():
        torch.manual_seed(0)
        CLIPVisionModel(SMALL).save_pretrained(tower)
        plain_processor(224).save_pretrained(tower)
    folder.mkdir(parents=True, exist_ok=True)
    write_images(folder, [f"{number:06d}.jpg" for number in range(images)])
    settings = folder / "settings.yaml"
    settings.write_text(SETTINGS.replace("TOWER", str(tower)).replace("IMAGES", str(photos)))
    features = folder / f"features-{time.time_ns()}"
    extract = ["extract", "--config", str(settings), "--output", str(features)]
    started = time.perf_counter()
    run("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ocvtp.cli", *extract,
        "--shard-size", str(images // 4))  # fmt: skip
    seconds = time.perf_counter() - started
    stored = sum(path.stat().st_size for path in features.glob("*.safetensors"))
    found: dict[str, Any] = {
        "images": images,
        "processes": 2,
        "extract": {
            "images a second, start-up included": round(images / seconds, 1),
            "bytes an image": round(stored / images),
        },
    }
    on_features = ["--data", "ocvtp.data.features.FeatureDataModule", "--data.root", str(features)]
    on_features += ["--data.batch_size", "8"]
    for name, words in (("on images", []), ("on features", on_features)):
        output = folder / f"run-{time.time_ns()}"
        devices = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
        run("-m", "ocvtp.cli", "train", "--config", str(settings), *words, *devices,
            "--output", str(output))  # fmt: skip
        found[name] = _rates(output)
    load, step = (found["on images"][n] for n in ("loading, ms", "step, ms"))
    network = found["on features"]["step, ms"]
    parts = {"loading": load, "tower": round(step - network, 1), "network": network}
    found["an image of a process, ms"] = parts
    found["bound"] = {
        "on images": max(parts, key=parts.__getitem__),
        "on features": "loading" if found["on features"]["loading, ms"] > network else "network",
    }
    return found


def _rates(output: Path) -> dict[str, float]:
    """Of the steps after the first ones, per image of one process."""
    (path,) = output.rglob("metrics.csv")
    with path.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("run/images_per_s")][1:]
    rate = statistics.median(float(row["run/images_per_s"]) for row in rows)
    waited = statistics.median(float(row["run/data_wait"]) for row in rows)
    own = 2e3 / rate  # of one process, in ms
    return {
        "images a second": round(rate, 1),
        "loading, ms": round(own * waited, 1),
        "step, ms": round(own * (1 - waited), 1),
    }


def run(*words: str) -> None:
    """A command of its own, with one thread a process."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(words)} failed:\n{done.stdout}\n{done.stderr}")


# ---------------------------------------------------------------------- on paper


def counted(recipe: str) -> dict[str, Any]:
    """Operations of one image, and the bytes of its features in fp16."""
    words = ["--config", f"configs/train/{recipe}.yaml", f"--model.encoder.tower={TOWER}"]
    module: Any = build(words, "extract").model
    images = collate([_item(module)])
    parts: dict[str, int] = {}
    with torch.no_grad(), Operations() as tower:
        tokens = module.tokens_of(images)
    parts["tower"] = tower.total
    for budget in module.num_slots:
        with Operations() as network:
            module.objective(module.network, tokens, budget, None).loss.backward()
        parts[f"network, forward and backward, {budget} slots"] = network.total
    needs = module.encoder.needs
    rows = stored_rows([tokens], needs, module.encoder.resolved(needs), torch.float16)
    return {
        "operations": parts,
        "bytes an image": sum(values.nbytes for _, values in rows),
        "epochs": yaml_epochs(recipe),
    }


def _item(module: Any) -> dict[str, Any]:
    side = module.encoder.grid_hw[0] * module.encoder.patch_size
    pixels = torch.randn(3, side, side, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "image_size": (side, side), "image_id": 0, "file_name": "0"}


def yaml_epochs(recipe: str) -> int:
    """How often a recipe sees the data."""
    import yaml

    settings = yaml.safe_load(Path(f"configs/train/{recipe}.yaml").read_text())
    return int(settings["trainer"]["max_epochs"])


def on_paper(found: dict[str, Any], flops: float, disk: float) -> dict[str, Any]:
    """Hours and disk of all of COCO, if a GPU reaches so many operations a second."""
    parts = found["operations"]
    tower = parts["tower"]
    each = [value for name, value in parts.items() if name != "tower"]
    network, epochs = statistics.mean(each), found["epochs"]

    def hours(count: float) -> float:
        return round(IMAGES * count / flops / 3600, 2)

    reading = found["bytes an image"] / disk
    epoch = max(network / flops, reading)
    return {
        "on images, hours": hours(epochs * (tower + network)),
        "extract, hours": hours(tower),
        "training on features, hours": round(epochs * IMAGES * epoch / 3600, 2),
        "features bound by": "the disk" if reading > network / flops else "the network",
        "disk, GB": round(IMAGES * found["bytes an image"] / 1e9, 1),
        "images a second that the loader must bring": round(flops / (tower + network)),
    }


def lines(results: dict[str, Any]) -> Iterator[str]:
    """What is printed."""
    yield json.dumps(results["measured"], indent=2)
    for recipe, found in results["counted, not measured"].items():
        yield f"{recipe}: {json.dumps(found, indent=2)}"


def main() -> None:
    """Measure, count, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="outside of the repository")
    parser.add_argument("--images", type=int, default=128, help="that are trained on")
    parser.add_argument(
        "--flops", type=float, nargs="+", default=[5e13, 2e14, 4e14], help="a second, assumed"
    )
    parser.add_argument("--disk", type=float, default=2e9, help="bytes a second, assumed")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "command": "python -m benchmarks.features FOLDER",
        "environment": environment() | {"load of the machine": round(os.getloadavg()[0], 1)},
        "measured": measured(arguments.folder, arguments.images),
        "counted, not measured": {},
    }
    for recipe in RECIPES:
        found = counted(recipe)
        hours = {f"{f:.0e} a second": on_paper(found, f, arguments.disk) for f in arguments.flops}
        results["counted, not measured"][recipe] = {**found, "one GPU": hours}
    write(arguments.output, results)
    print("\n".join(lines(results)))


if __name__ == "__main__":
    main()
