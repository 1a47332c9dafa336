"""COCO at its true size: how long it takes to start, and how much memory data takes.

    python -m benchmarks.scale FOLDER              # about 5 minutes on two cores, 1.5 GB of disk
    python -m benchmarks.scale FOLDER --images 5000 --instances 36000    # smaller, to try it

Writes a data set into FOLDER: an annotation file of as many images, instances and corners as
instances_train2017.json has, and as many names of images, which are links to a few drawn JPEGs of
640 x 480. Then every figure is measured in a process of its own:

- `parse once`: the first set-up of `CocoDataModule`, which reads the file and keeps its arrays
- `later start`: the same again
- `memory of a rank`: what a process takes more after the set-up, and with the masks of all images
  read once. `own` is memory that no other process has; `mapped` are pages of the kept arrays, which
  all ranks and workers of a machine share and the system may drop
- `memory of a worker`: memory of its own of each loading process after its first batches, and after
  as many as `--batches` says
- `first batch after resume`: from a set-up to the first batch in the middle of an epoch, 2 workers
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.timing import environment, write
from ocvtp.data.module import CocoDataModule
from ocvtp.data.scenes import draw_scene
from ocvtp.encoders.clip import ProcessorTransform
from ocvtp.random_models.clip_config import plain_processor

DEFAULT_OUTPUT = Path(__file__).parent / "results" / "scale.json"
GOALS = {
    "parse once, seconds": 40,
    "later start, seconds": 3,
    "memory of a rank, MB": 300,
    "memory of a rank with masks, MB": 800,
    "growth of a worker, MB": 100,
    "first batch after resume, seconds": 5,
}
WIDTH, HEIGHT, CATEGORIES = 640, 480, 80
PICTURES, OUTLINES = 16, 4096
FEW = 10  # batches that a worker reads first

# ---------------------------------------------------------------------- the data


def write_data(folder: Path, images: int, instances: int) -> None:
    """The data set, unless it is there."""
    settings = {"images": images, "instances": instances}
    done = folder / "scale.json"
    if done.is_file():
        if json.loads(done.read_text()) != settings:
            raise ValueError(f"{folder} holds another data set; pass another folder.")
        return
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    names = [f"{5 * number:012d}.jpg" for number in range(images)]
    write_images(folder, names)
    path = folder / "annotations" / "instances_train2017.json"
    random = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for name, entries in (
            ("images", _image_entries(names)),
            ("annotations", _instance_entries(random, images, instances)),
            ("categories", _category_entries()),
        ):
            file.write(f'{"{" if name == "images" else ", "}"{name}": [')
            for place, entry in enumerate(entries):
                file.write(f"{', ' if place else ''}{entry}")
            file.write("]")
        file.write("}")
    done.write_text(json.dumps(settings))


def write_images(folder: Path, names: list[str]) -> None:
    """A few pictures under many names."""
    (folder / "train2017").mkdir(exist_ok=True)
    random = np.random.default_rng(1)
    pictures = [folder / f"picture{number}.jpg" for number in range(PICTURES)]
    for number, path in enumerate(pictures):
        scene = Image.fromarray(draw_scene(0, number).image).resize((WIDTH, HEIGHT))
        grain = random.normal(0, 9, (HEIGHT, WIDTH, 1))  # as large a file as a photograph
        grey = (np.asarray(scene, np.float32) + grain).clip(0, 255)
        Image.fromarray(grey.astype(np.uint8)).save(path, quality=92)
    for number, name in enumerate(names):
        target = folder / "train2017" / name
        if not target.exists():
            os.link(pictures[number % PICTURES], target)


def _image_entries(names: list[str]) -> Iterator[str]:
    for number, name in enumerate(names):
        yield (
            f'{{"license": 3, "file_name": "{name}", "coco_url":'
            f' "http://images.cocodataset.org/train2017/{name}", "height": {HEIGHT}, "width":'
            f' {WIDTH}, "date_captured": "2013-11-14 11:18:45", "flickr_url":'
            f' "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg",'
            f' "id": {5 * number}}}'
        )


def _instance_entries(random: np.random.Generator, images: int, instances: int) -> Iterator[str]:
    outlines = [_outline(random) for _ in range(OUTLINES)]
    image_ids = 5 * random.integers(images, size=instances)
    drawn, categories = random.integers([[OUTLINES], [CATEGORIES]], size=(2, instances))
    for number in range(instances):
        segmentation, box, area = outlines[drawn[number]]
        yield (
            f'{{"segmentation": {segmentation}, "area": {area!r}, "iscrowd": 0, "image_id":'
            f' {image_ids[number]}, "bbox": {box}, "category_id": {categories[number] + 1}, "id":'
            f" {number + 1}}}"
        )


def _outline(random: np.random.Generator) -> tuple[str, str, float]:
    """A polygon of as many corners as COCO's have, its box and an area, as JSON."""
    corners = max(3, int(random.gamma(1.6, 15)))
    angles = 2 * np.pi * np.sort(random.random(corners))
    radii, centre = random.uniform(10, 50, corners), random.uniform([60, 60], [580, 420])
    points = centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    low, high = points.min(axis=0), points.max(axis=0)
    box = [round(float(number), 2) for number in (*low, *(high - low))]
    polygon = points.round(2).flatten().tolist()
    return json.dumps([polygon]), json.dumps(box), round(box[2] * box[3] / 2, 4)


def _category_entries() -> Iterator[str]:
    for number in range(1, CATEGORIES + 1):
        yield json.dumps({"supercategory": "thing", "id": number, "name": f"thing {number}"})


# ---------------------------------------------------------------------- what is measured


def opened(folder: Path, masks: bool = False, num_workers: int = 0) -> CocoDataModule:
    """The data, set up."""
    data = CocoDataModule(
        str(folder),
        val_images=None,
        batch_size=12,
        num_workers=num_workers,
        train_instances=masks,
        transform=ProcessorTransform(plain_processor(336)),
    )
    data.setup("fit")
    return data


def _seconds(folder: Path, _: int) -> dict[str, float]:
    started, busy = time.perf_counter(), time.process_time()
    opened(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "CPU seconds": round(time.process_time() - busy, 2),
        "peak of the process, MB": round(peak),
    }


def _rank(folder: Path, _: int) -> dict[str, Any]:
    gc.collect()
    before, found = memory("self"), {}
    for name, masks in (("without masks", False), ("with masks", True)):
        data = opened(folder, masks)
        if masks:
            images: Any = data.train_set
            for image_id, _name in images.names:
                for entry in images._coco.masked(image_id):
                    assert entry["segmentation"]
        gc.collect()
        now = memory("self")
        found[name] = {key: round(now[key] - before[key], 1) for key in now}
    return found


def _worker(folder: Path, batches: int) -> dict[str, Any]:
    found = {}
    for name, masks in (("without masks", False), ("with masks", True)):
        loader = opened(folder, masks, num_workers=2).train_dataloader()
        started: float | None = None
        first: list[dict[str, float]] = []
        for number, _ in enumerate(loader, start=1):
            if number in (FEW, batches):
                now = [memory(str(process.pid)) for process in loader._iterator._workers]
                first = first or now
                started = started or time.perf_counter()
            if number == batches:
                break
        assert started is not None
        seconds = time.perf_counter() - started
        found[name] = {
            "own, MB": [round(one["own, MB"], 1) for one in first],
            "own after all batches, MB": [round(one["own, MB"], 1) for one in now],
            "images read": 12 * batches,
            "images a second, both": round(12 * (batches - FEW) / seconds, 1),
        }
        del loader
    return found


def _resume(folder: Path, _: int) -> dict[str, float]:
    started = time.perf_counter()
    data = opened(folder, num_workers=2)
    reader = iter(data.train_dataloader())
    next(reader)
    first = time.perf_counter() - started
    state = data.state_dict() | {"batch": len(data.train_dataloader()) // 2}
    del reader
    started = time.perf_counter()
    data = opened(folder, num_workers=2)
    data.load_state_dict(state)
    next(iter(data.train_dataloader()))
    return {
        "first batch, seconds": round(first, 2),
        "first batch after resume, seconds": round(time.perf_counter() - started, 2),
    }


def memory(process: str) -> dict[str, float]:
    """Megabytes of a process: that no other has, and of the pages of files that it has read."""
    own = mapped = 0
    for lines in Path(f"/proc/{process}/smaps").read_text().split("VmFlags")[:-1]:
        sizes = {
            name: int(rest.split()[0])
            for name, _, rest in (line.partition(":") for line in lines.splitlines())
            if rest.endswith(" kB")
        }
        own += min(sizes["Private_Clean"] + sizes["Private_Dirty"], sizes["Anonymous"])
        mapped += sizes["Rss"] - sizes["Anonymous"]
    return {"own, MB": own / 1024, "mapped, MB": mapped / 1024}


MEASURED: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "parse once": _seconds,
    "later start": _seconds,
    "memory of a rank": _rank,
    "memory of a worker": _worker,
    "first batch after resume": _resume,
}


def measure(folder: Path, name: str, batches: int) -> dict[str, Any]:
    """One figure, in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.scale", str(folder), "--measure", name]
    done = subprocess.run([*words, "--batches", str(batches)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} could not be measured:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def reached(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was to be shown, and whether it was."""
    rank = {name: sum(found.values()) for name, found in results["memory of a rank"].items()}
    grown = [
        after - first
        for found in results["memory of a worker"].values()
        for first, after in zip(found["own, MB"], found["own after all batches, MB"], strict=True)
    ]
    figures = {
        "parse once, seconds": results["parse once"]["seconds"],
        "later start, seconds": results["later start"]["seconds"],
        "memory of a rank, MB": round(rank["without masks"], 1),
        "memory of a rank with masks, MB": round(rank["with masks"], 1),
        "growth of a worker, MB": round(max(grown), 1),
        "first batch after resume, seconds": results["first batch after resume"][
            "first batch after resume, seconds"
        ],
    }
    return {
        name: {"goal": GOALS[name], "measured": value, "reached": value <= GOALS[name]}
        for name, value in figures.items()
    }


def main() -> None:
    """Write the data, measure, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="outside of the repository")
    parser.add_argument("--images", type=int, default=118_287, help="default: train2017's")
    parser.add_argument("--instances", type=int, default=860_001, help="default: train2017's")
    parser.add_argument("--batches", type=int, default=300, help="that workers read")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--measure", choices=MEASURED, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        found = MEASURED[arguments.measure](arguments.folder, arguments.batches)
        print(json.dumps(found))
        return
    write_data(arguments.folder, arguments.images, arguments.instances)
    path = arguments.folder / "annotations" / "instances_train2017.json"
    for kept in path.parent.glob(f"{path.name}.*index"):
        kept.unlink()
    results: dict[str, Any] = {
        "command": "python -m benchmarks.scale FOLDER",
        "environment": environment() | {"cores": os.cpu_count()},
        "images": arguments.images,
        "instances": arguments.instances,
        "annotation file, MB": round(path.stat().st_size / 1e6, 1),
    }
    for name in MEASURED:
        results[name] = measure(arguments.folder, name, arguments.batches)
        print(f"{name}: {json.dumps(results[name])}", flush=True)
        results["environment"]["load of the machine"] = round(os.getloadavg()[0], 1)
    results["goals"] = reached(results)
    write(arguments.output, results)
    print(json.dumps(results["goals"], indent=2))


if __name__ == "__main__":
    main()
