"""The cells of `benchmarks.gpu`: what each does, and how long that should take.

Seconds are computed: operations of `ocvtp.flops` and bytes of weights, on a device of which a share
is reached (`_OPERATIONS`, `_BYTES`), a launch for every kernel, and Python's own time. They decide
what is begun; a device that is slower is noticed after the first cell.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import road
from benchmarks.device_checks import CHECKS, no_sync, waits
from benchmarks.select import build, make_tokens
from benchmarks.timing import write
from ocvtp.bench.run import Plan, bench
from ocvtp.bench.workload import Cell, make_request
from ocvtp.evaluation.runner import Subject
from ocvtp.flops import count
from ocvtp.hosts.loading import load_model
from ocvtp.random_models.full_size import config_of

COCO_IMAGES, EPOCHS = 118_287, 30
LLAVA, NEXT, QWEN = "llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b"
PRUNERS = ("ocvtp", "fopru", "visionzip", "divprune", "fastv:stages=[[2,K]]", "ridge", "random")
WAITS = ("divprune", "fopru", "random")
GREEDY = ("divprune", "cdpruner", "zspaprune", "todre", "trimtokenator", "greedyprune", "ridge")
TESTS = (
    "tests/bench/test_marks.py",
    "tests/test_images.py",
    "tests/pruners/test_contract.py",
)
"""With tests for a device, but those of `benchmarks.device_checks`, which a cell runs already."""
TESTS_SECONDS = 60

_OPERATIONS = {"bfloat16": 3e14, "float32": 3e13}  # a second, reached by matrix products
_BYTES = 2.5e12  # a second
_LAUNCH = 1e-5  # seconds a kernel
_KERNELS = 1500  # of a request: tower, prompt and one more token
_PYTHON = 0.06  # seconds of generate() and of attaching
_PREPARE = 0.012  # seconds an image, on one CPU core
_LOOK = 2.5  # seconds a row, watched operation by operation
BUILD = 20  # seconds of a model of 7 B


@dataclass(frozen=True)
class Setting:
    """The whole plan, or one of the same shape for a CPU.

    Args:
        device: e.g. cuda. dtype: of the models.
        models: what is built in place of each.
        sizes: width and height of the pictures of each model.
        budgets: K in place of each.
        batches: B in place of each.
        pruners: that are timed. tower: that is trained on.
        warmup: rounds before those that count. repetitions: rounds that count.
        tests: files with tests for a device.
        estimates: whether cells know their seconds; if not, they take one.
    """

    device: str
    dtype: str
    models: dict[str, str]
    sizes: dict[str, int]
    budgets: dict[int, int]
    batches: dict[int, int]
    pruners: tuple[str, ...]
    tower: str
    warmup: int
    repetitions: int
    tests: tuple[str, ...]
    estimates: bool = True

    def limit(self, expected: float) -> float:
        """Seconds after which a cell that should take `expected` hangs."""
        return 30 + 3 * expected if self.estimates else 900.0

    def batch(self, size: int) -> int:
        """B in place of `size`."""
        return self.batches.get(size, size)

    def budget(self, num_keep: int) -> int:
        """K in place of `num_keep`."""
        return self.budgets.get(num_keep, num_keep)


FULL = Setting(
    "cuda", "bfloat16", {}, {LLAVA: 336, NEXT: 672, QWEN: 896}, {}, {}, PRUNERS, road.TOWER, 3, 12,
    TESTS,
)  # fmt: skip
SMOKE = Setting(
    "cpu",
    "float32",
    dict.fromkeys((LLAVA, NEXT, QWEN), "demo"),
    dict.fromkeys((LLAVA, NEXT, QWEN), 96),
    {64: 16, 128: 32, 160: 8, 640: 36, 256: 16},
    {8: 2, 12: 2, 32: 3, 64: 2},
    ("ocvtp", "ridge"),
    "random:tiny",
    warmup=0,
    repetitions=5,
    tests=TESTS[:1],
    estimates=False,
)


class BrokenDevice(Exception):
    """A cell left the device so that nothing runs on it in this process any more."""


@dataclass
class Place:
    """Where cells run: models are built once, and results lie in a folder.

    Args:
        setting: of all cells.
        folder: of the results.
    """

    setting: Setting
    folder: Path
    subjects: dict[str, Subject] = field(default_factory=dict)

    def seconds(self, job: Job) -> float:
        """Of a cell, and of the model that it needs where that is not built."""
        name = self.setting.models.get(job.model, job.model)
        is_there = not name or name in self.subjects or not self.setting.estimates
        return job.seconds + (0 if is_there else BUILD)

    def subject(self, model: str) -> Subject:
        """A model with random weights; others make room for it on a small device."""
        name = self.setting.models.get(model, model)
        if name not in self.subjects:
            if not _is_roomy(self.setting.device):
                self.subjects.clear()
                gc.collect()
                torch.cuda.empty_cache()
            built = load_model(f"random:{name}", self.setting.dtype, self.setting.device)
            self.subjects[name] = Subject(*built, f"random:{name}")
        return self.subjects[name]

    def tidy(self) -> None:
        """Give back what a cell left, of one that ran out of memory too.

        Raises:
            BrokenDevice: if nothing runs on the device any more.
        """
        gc.collect()
        if self.setting.device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:  # an earlier kernel's: it stays as long as the process
                raise BrokenDevice(str(error).splitlines()[0]) from error


@dataclass(frozen=True)
class Job:
    """A cell: its name, what it measures, its seconds, how, and the model that must be built."""

    name: str
    what: str
    seconds: float
    run: Callable[[Place], dict[str, Any]]
    model: str = ""


def _is_roomy(device: str) -> bool:
    """Whether models of 7 B may stay beside each other."""
    return device != "cuda" or torch.cuda.get_device_properties(0).total_memory > 70e9


def checks(setting: Setting) -> Job:
    """What must hold on the device."""

    def run(place: Place) -> dict[str, Any]:
        found = {}
        for name, check in CHECKS.items():
            start = time.monotonic()
            try:
                with torch.no_grad():
                    check(place.setting.device)
                said = "holds"
            except Exception as error:
                said = f"{type(error).__name__}: {error}"[:1000]
            found[name] = {"said": said, "seconds": round(time.monotonic() - start, 1)}
        return {"checks": found}

    return Job("checks", "what must hold on a device", 45 if setting.estimates else 1.0, run)


def tests(setting: Setting) -> Job:
    """The tests that are marked for a GPU; what was not tested after a minute is left out."""

    def run(place: Place) -> dict[str, Any]:
        words = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-m", "gpu"]
        words += ["-p", "no:cacheprovider", *place.setting.tests]
        root, stopped = Path(__file__).parents[1], ""
        try:
            done = subprocess.run(
                words, capture_output=True, check=False, timeout=TESTS_SECONDS, cwd=root
            )
            said, code = (done.stdout + done.stderr).decode(errors="replace"), done.returncode
        except subprocess.TimeoutExpired as error:
            said, code = (error.stdout or b"").decode(errors="replace"), 0
            stopped = f"stopped after {TESTS_SECONDS} s, {said.count(' PASSED')} passed"
        if code not in (0, 5) or " FAILED" in said:
            raise RuntimeError(f"pytest ended with {code}; {stopped} {said[-1700:]}")
        return {"pytest": stopped or said.strip().splitlines()[-1]}

    seconds = TESTS_SECONDS if setting.estimates else 1.0
    return Job("tests", "pytest -m gpu", seconds, run)


@cache
def _operations(model: str, num_keep: int | None) -> float:
    """Before the first token of a prompt with one image."""
    return float(count(config_of(model), num_keep=num_keep, text_length=64).total)


def request_seconds(model: str, batch: int, num_keep: int | None, dtype: str) -> float:
    """Of one call: tower, prompt, one more token."""
    weights = 2 * 7e9
    products = batch * _operations(model, num_keep) / _OPERATIONS[dtype]
    return products + 2 * weights / _BYTES + _KERNELS * _LAUNCH + _PYTHON


def timed(
    name: str, model: str, batch: int, keeps: Sequence[int], setting: Setting, *, most: int = 99
) -> Job:
    """TTFT, prefill, select and memory of every pruner beside the bare model."""
    size, budgets = setting.batch(batch), [setting.budget(keep) for keep in keeps]
    rounds = setting.warmup + min(setting.repetitions, most)

    def run(place: Place) -> dict[str, Any]:
        side = place.setting.sizes[model]
        plan = Plan(
            place.setting.pruners,
            budgets,
            [Cell(size, 64)],
            new_tokens=2,
            warmup=place.setting.warmup,
            repetitions=min(place.setting.repetitions, most),
            image_size=(side, side),
            skip_unfit=True,
        )
        found = bench(place.subject(model), plan, place.folder / "rows" / name)
        write(place.folder / "bench" / f"{name}.json", found)
        cell = found["cells"][0]
        rows = [_row(row, cell["batch_size"]) for row in cell["rows"]]
        return {
            "model": found["model"],
            "batch": size,
            "image tokens": cell["image_tokens"],
            "attention": found["settings"]["attention"],
            "unfit": cell["unfit"],
            "rows": rows,
        }

    built = setting.models.get(model, model)
    what = f"{built}, batch {size}, K = {' and '.join(map(str, budgets))}"
    seconds = 1.0
    if setting.estimates:
        times = [request_seconds(model, batch, keep, setting.dtype) for keep in (None, *keeps)]
        own = times[0] + len(setting.pruners) * sum(times[1:])
        looks = (1 + len(setting.pruners) * len(keeps)) * _LOOK
        seconds = looks + rounds * (batch * _PREPARE + own)
    return Job(name, what, seconds, run, model)


def _row(row: dict[str, Any], batch: int) -> dict[str, Any]:
    """What the report shows of a row of `ocvtp bench`."""
    figures, left = row["figures"], row["operations_left"]["prefill"]
    found = {
        "key": row["key"],
        "label": row["label"],
        "ttft ms": figures["ttft"]["median"],
        "prefill ms": figures["prefill"]["median"],
        "select ms": row["stages"]["select"],
        "select / TTFT": row["select_share_of_ttft"],
        "peak GiB": round(row["memory"]["peak"] / 2**30, 3),
        "prompts per second to the first token": round(1e3 * batch / figures["ttft"]["median"], 2),
    }
    for name in ("ttft", "prefill"):
        if (ratio := figures[name].get("ratio")) is not None:
            found[f"{name} speed-up"] = round(1 / ratio["value"], 3)
            found[f"{name} speed-up, interval"] = [1 / ratio["high"], 1 / ratio["low"]]
            if name == "prefill" and left < 1:
                found["prefill speed-up / possible"] = round(left / ratio["value"], 3)
    return found


def trained(objective: str, batch: int, dtype: str, setting: Setting) -> Job:
    """Training steps, with the tower and from features that were extracted before."""

    def run(place: Place) -> dict[str, Any]:
        here = place.setting
        size = here.batch(batch)
        with torch.enable_grad():
            rounds = None if here.estimates else (1, 0)
            found = road.training(size, here.device, dtype, objective, here.tower, rounds)
        for name in ("images per second", "images per second from extracted features"):
            hours = EPOCHS * COCO_IMAGES / found[name] / 3600
            found[f"hours of {EPOCHS} epochs of {COCO_IMAGES} images at {name}"] = round(hours, 2)
        return found

    seconds = 1.0
    if setting.estimates:
        tower, learning = 1.9e11 * (2 if objective == "kept" else 1), 2.5e11
        step = batch * (tower + learning) / _OPERATIONS[dtype] + 3000 * _LAUNCH
        seconds = 10 + 35 * step
    what = f"training step, {objective}, batch {setting.batch(batch)}, {dtype}"
    return Job(f"train-{objective}-{batch}-{dtype}", what, seconds, run)


def selects(setting: Setting) -> Job:
    """`select` of the greedy methods alone, launched step by step and as one CUDA graph."""

    def run(place: Place) -> dict[str, Any]:
        device = place.setting.device
        names = GREEDY if place.setting.estimates else GREEDY[:2]
        found: dict[str, Any] = {}
        for batch in (setting.batch(8), 1):
            tokens = make_tokens(batch, (24, 24), 4096 if device == "cuda" else 64)
            tokens = tokens.map(lambda values: values.to(device))
            for name in names:
                choose = partial(build(name, 64, tokens).select, tokens)
                with torch.inference_mode():
                    row = {"ms": _median_ms(choose, device)}
                    if device == "cuda":
                        row |= _as_graph(choose, device)
                found[f"{name}, B={batch}"] = row
        subject, side = place.subject(LLAVA), place.setting.sizes[LLAVA]
        request = make_request(Cell(1, 64), subject.processor, (side, side))
        inputs = request.prepare(subject.processor, subject.model)
        keep = setting.budget(64)
        lines = {
            f"{name} waits": waits(device, name, keep, subject.model, inputs) for name in WAITS
        }
        return {"select": found, "waits": lines}

    what = "select of greedy methods, and where pruned calls wait for the device"
    return Job("select", what, 30 if setting.estimates else 1.0, run, LLAVA)


def _as_graph(choose: Callable[[], Any], device: str) -> dict[str, Any]:
    """Launched as a whole; none is captured of what waits, as no capture survives that."""
    try:
        with no_sync(device):
            choose()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            choose()
        return {"ms as a CUDA graph": _median_ms(graph.replay, device)}
    except RuntimeError as error:
        return {"no CUDA graph": str(error).splitlines()[0]}


def _median_ms(run: Callable[[], Any], device: str) -> float:
    times = []
    for _ in range(8):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return round(sorted(times[2:])[3], 3)


CELLS: tuple[Callable[[Setting], Job], ...] = (
    checks,
    partial(timed, "llava-b8-k64", LLAVA, 8, (64,)),
    partial(timed, "llava-b1-k64", LLAVA, 1, (64,)),
    partial(trained, "slots", 12, "float32"),
    partial(trained, "slots", 64, "bfloat16"),
    partial(trained, "kept", 32, "bfloat16"),
    partial(timed, "llava-b8-k128", LLAVA, 8, (128,)),
    partial(timed, "llava-b1-k128", LLAVA, 1, (128,)),
    selects,
    partial(timed, "next-b1", NEXT, 1, (160, 640), most=8),
    tests,
    partial(timed, "llava-b32-k64", LLAVA, 32, (64,), most=6),
    partial(timed, "qwen-b1", QWEN, 1, (256,), most=8),
)
"""In the order of their worth."""
