"""Malformed inputs of every kind that is not trusted, by a seed: what comes of each.

An input must end in success or in one `ocvtp: error:` line: no traceback, no file that is left
half-written, no memory beyond a GiB. `python -m benchmarks.reliability` runs it.
"""

from __future__ import annotations

import copy
import io
import json
import resource
import shutil
import tarfile
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load, save
from transformers import CLIPImageProcessor

import ocvtp
from benchmarks.reliability_table import GIB
from ocvtp.bench.sittings import cells_in
from ocvtp.cli import guarded, main
from ocvtp.data.coco import CocoImages
from ocvtp.data.coco_questions import CocoQuestionDataModule
from ocvtp.data.conversations import ConversationDataModule
from ocvtp.data.feature_files import (
    Manifest,
    ShardWriter,
    describe_shard,
    plain,
    shard_name,
    weights_hash,
)
from ocvtp.data.features import FeatureDataModule
from ocvtp.data.image_sources import TarImages
from ocvtp.encoders.clip import ProcessorTransform
from ocvtp.evaluation.logs import Log
from ocvtp.evaluation.tasks.pope import PopeTask
from ocvtp.evaluation.tasks.vqa import VqaTask
from ocvtp.images import open_image
from ocvtp.learning import NetworkConfig, PrunerNetwork
from ocvtp.pruners.specs import build_spec
from ocvtp.reporting.results_files import read_results, read_values
from ocvtp.selectors.network import SelectorConfig, SelectorNetwork
from ocvtp.selectors.scorer import Widths
from ocvtp.slots import OCPruner, OCPrunerConfig
from ocvtp.slots.decoder import DecoderConfig
from ocvtp.structures import Needs
from ocvtp.surprise.network import SurpriseNetwork, SurpriseSizes
from ocvtp.training.features import stored_tokens
from ocvtp.training.resume import read_checkpoint
from ocvtp.training.run import build
from ocvtp.training.teacher import Teacher, TeacherNeeds, question_names

ODD: list[Any] = [
    *(None, True, -1, 0, 1, 3, 10**6, 10**12, 2**63, -(2**70), 0.5, 1e308, float("nan")),
    *(
        float("inf"),
        "",
        "x",
        "9",
        "../../x",
        "/etc/passwd",
        "\0",
        "\x1b[31m",
        "a" * 5000,
        "é\u202e",
    ),
    *([], [[]], {}, {"a": 1}, [1] * 10, [-1, -1], [None], ["x"], [[0, 1], [2, 3]], [10**9, 10**9]),
]
"""Values that stand where others should."""
SHARES = {"config": 0.2}
"""Kinds that take long, by the share of inputs that they get of an equal part."""


@dataclass
class Outcome:
    """What came of the inputs of a kind.

    Args:
        counts: `success`, `one error`, and faults. faults: the first few, with what was said.
        seconds: the longest.
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


# ---------------------------------------------------------------- how inputs are made


def changed_json(draw: Any, value: Any) -> Any:
    """A JSON value, up to three places of which are another value, gone or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        holder, key = _place(draw, value)
        if holder is None:
            return copy.deepcopy(draw(st.sampled_from(ODD)))
        what = draw(st.sampled_from(["odd", "odd", "odd", "gone", "more"]))
        if what == "odd":
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif what == "gone":
            del holder[key]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[draw(st.sampled_from(["colour", "", "layer", "\n"]))] = copy.deepcopy(
                holder[key]
            )
    return value


def _place(draw: Any, value: Any) -> tuple[Any, Any]:
    """Somewhere in a value: what holds it, and its key."""
    holder, key = None, None
    while isinstance(value, dict | list) and value:
        keys = list(value) if isinstance(value, dict) else list(range(min(len(value), 4)))
        holder, key = value, draw(st.sampled_from(keys))
        value = value[key]
        if draw(st.booleans()):
            break
    return holder, key


def changed_bytes(draw: Any, data: bytes) -> bytes:
    """Cut, turned over, zeroed, repeated or replaced bytes; mostly near the beginning."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        end = len(content)
        near = draw(st.booleans())
        at = draw(st.integers(0, max(0, min(end, 200 if near else end) - 1)))
        what = draw(st.sampled_from(["cut", "flip", "zero", "put", "double", "head"]))
        if what == "cut":
            del content[at:]
        elif what == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "zero":
            content[at : at + 8] = bytes(8)
        elif what == "put":
            content[at:at] = draw(st.binary(max_size=12))
        elif what == "double":
            content += content[at : at + 2000]
        elif what == "head":
            content[at : at + 4] = b"\xff\xff\xff\x7f"
    return bytes(content)


def changed_file(draw: Any, path: Path, value: Any) -> None:
    """A JSON file, changed as JSON, or as bytes."""
    if draw(st.integers(0, 4)):
        path.write_text(json.dumps(changed_json(draw, value)))
    else:
        path.write_bytes(changed_bytes(draw, json.dumps(value).encode()))


def changed_tensors(draw: Any, data: bytes) -> bytes:
    """A file of safetensors: one of its tensors, its header, which is JSON, or its bytes."""
    what = draw(st.sampled_from(["tensor", "tensor", "header", "bytes"]))
    if what == "bytes":
        return changed_bytes(draw, data)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if what == "header":
        text = json.dumps(changed_json(draw, header)).encode()
        return len(text).to_bytes(8, "little") + text + data[end:]
    tensors = load(data)
    name = draw(st.sampled_from(sorted(tensors)))
    found = tensors.pop(name)
    how = draw(st.sampled_from(["gone", "shorter", "flat", "other", "type"]))
    if how == "other":
        value = draw(st.sampled_from([0, 1, 2, -1, 2**15, 2**31 - 1]))
        tensors[name] = torch.full(found.shape, value).to(found.dtype)
    elif how != "gone":
        forms = {"shorter": found[1:], "flat": found.reshape(-1), "type": found.double()}
        tensors[name] = forms[how].contiguous()
    return save(tensors, header["__metadata__"])


# ---------------------------------------------------------------- what is tried on them


class Inputs:
    """Good inputs of every kind, and what each is tried on.

    Args:
        root: folder to work in.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        torch.manual_seed(0)
        self.networks = {network.format: network.eval() for network in _networks()}
        self.artifacts = []
        for number, network in enumerate(self.networks.values()):
            network.save_pretrained(root / f"good{number}")
            self.artifacts.append(root / f"good{number}")
        self.images = root / "images"
        self.images.mkdir()
        pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
        picture = Image.fromarray(pixels)
        self.pictures = {}
        for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"):
            picture.save(self.images / f"a.{kind}")
            self.pictures[kind] = (self.images / f"a.{kind}").read_bytes()
        self.features, self.teacher = root / "features", root / "teacher"
        _write_features(self.features)
        _write_teacher(self.teacher)
        kinds = [name for name in dir(self) if name.startswith("try_")]
        self.kinds: dict[str, Callable[[Any], int]] = {
            name.removeprefix("try_"): getattr(self, name) for name in kinds
        }

    def try_artifact(self, draw: Any) -> int:
        number = draw(st.integers(0, len(self.artifacts) - 1))
        folder = self._folder()
        config = json.loads((self.artifacts[number] / "config.json").read_text())
        weights = (self.artifacts[number] / "model.safetensors").read_bytes()
        if draw(st.integers(0, 3)):
            changed_file(draw, folder / "config.json", config)
            (folder / "model.safetensors").write_bytes(weights)
        else:
            (folder / "config.json").write_text(json.dumps(config))
            (folder / "model.safetensors").write_bytes(changed_bytes(draw, weights))
        own = ("ocvtp", "surprise", "learned")[number]
        name = draw(st.sampled_from([own, own, own, "ocvtp", "learned_layers"]))
        return _done(partial(ocvtp.build_pruner, name, num_keep=4, checkpoint=str(folder)))

    def _checkpoint(self, draw: Any) -> Path:
        network = draw(st.sampled_from(list(self.networks.values())))
        config = asdict(network.config)
        own = {"format": network.format, "config": config, "training": {"steps": 3}}
        state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
        parts = {"loops": {}, "callbacks": {}, "optimizer_states": [], "global_step": 3}
        path = self._folder() / "last.ckpt"
        what = draw(st.sampled_from(["entries", "weights", "bytes"]))
        if what == "entries":
            own = changed_json(draw, own)
        elif what == "weights":
            name = draw(st.sampled_from(sorted(state)))
            state[name] = draw(st.sampled_from(_tensors()))
        torch.save({"ocvtp": own, "state_dict": state, **parts}, path)
        if what == "bytes":
            path.write_bytes(changed_bytes(draw, path.read_bytes()))
        return path

    def try_checkpoint(self, draw: Any) -> int:
        path = self._checkpoint(draw)
        words = ["export", "--checkpoint", str(path), "--output", str(path.parent / "out")]
        return main(words)

    def try_resume(self, draw: Any) -> int:
        return _done(partial(read_checkpoint, str(self._checkpoint(draw))))

    def try_official(self, draw: Any) -> int:
        state: dict[Any, Any] = dict(_official())
        path = self._folder() / "weights.pth"
        for _ in range(draw(st.integers(1, 2))):
            name = draw(st.sampled_from(sorted(map(str, state))))
            what = draw(st.sampled_from(["gone", "other", "tensor", "named"]))
            value = state.pop(name, None)
            if what == "other":
                state[name] = draw(st.sampled_from(ODD))
            elif what == "tensor":
                state[name] = draw(st.sampled_from(_tensors()))
            elif what == "named":
                state[draw(st.sampled_from(["", "x", "decode.backbone.layers.x.y"]))] = value
        torch.save(state, path)
        if not draw(st.integers(0, 3)):
            path.write_bytes(changed_bytes(draw, path.read_bytes()))
        return main(["export", "--official", str(path), "--output", str(path.parent / "out")])

    def try_coco(self, draw: Any) -> int:
        path = self._folder() / "instances.json"
        changed_file(draw, path, _COCO)

        def read() -> None:
            images = CocoImages(self.images, path, _AsStored(), "skip", with_instances=True)
            for number in range(min(len(images), 3)):
                images[number]

        def ask() -> None:
            data = CocoQuestionDataModule(
                str(self.root), "images", str(path), existence=2, on_error="skip"
            )
            asked = data.questions("train")
            asked[0]

        return _done(read if draw(st.booleans()) else ask)

    def try_questions(self, draw: Any) -> int:
        path = self._folder() / "asked_random.json"
        kind = draw(st.sampled_from(["vqa", "pope", "conversation"]))
        if kind == "vqa":
            changed_file(draw, path, _VQA)
            return _done(lambda: VqaTask(path, self.images).image(0))
        if kind == "pope":
            lines = [json.dumps(changed_json(draw, line)) for line in _POPE]
            path.write_text("\n".join(lines))
            return _done(lambda: PopeTask([path], self.images).image(0))
        changed_file(draw, path, _TALK)
        data = ConversationDataModule(str(self.root), str(path), images="images")
        return _done(lambda: data.questions("train")[0])

    def try_image(self, draw: Any) -> int:
        kind = draw(st.sampled_from(sorted(self.pictures)))
        folder = self._folder()
        (folder / "in").mkdir()
        path = folder / f"in/a.{'jpg' if kind == 'jpeg' else kind}"
        path.write_bytes(changed_bytes(draw, self.pictures[kind]))
        if draw(st.booleans()):
            return _done(partial(open_image, path))
        words = ["resize", str(folder / "in"), str(folder / "out"), "--size", "8"]
        status = main([*words, "--num-workers", "1"])
        for written in (folder / "out").glob("*.jpg"):
            with Image.open(written) as image:
                image.load()
        return status

    def try_spec(self, draw: Any) -> int:
        name = draw(st.sampled_from([*ocvtp.list_pruners(), "x", "", "\x1b"]))
        keys = st.sampled_from(["num_keep", "stages", "layer", "seed", "checkpoint", "keep_ratio"])
        odd = st.sampled_from([json.dumps(value) for value in ODD] + _YAML)
        pairs = draw(st.lists(st.tuples(keys, odd | st.text(max_size=8)), max_size=3))
        spec = f"{name}:{','.join(f'{k}={v}' for k, v in pairs)}"
        given = draw(st.sampled_from([{}, {"num_keep": 8}, {"keep_ratio": 0.5}]))
        return _done(partial(build_spec, spec, **given))

    def try_config(self, draw: Any) -> int:
        path = self._folder() / "config.yaml"
        text = yaml.safe_dump(changed_json(draw, _SETTINGS), allow_unicode=True)
        if not draw(st.integers(0, 3)):
            text = draw(st.sampled_from(_YAML)) + "\n" + text
        path.write_text(text)
        if not draw(st.integers(0, 4)):
            path.write_bytes(changed_bytes(draw, path.read_bytes()))
        return _done(partial(build, ["--config", str(path)]))

    def try_results(self, draw: Any) -> int:
        folder = self._folder()
        path = folder / "results.json"
        changed_file(draw, path, _RESULTS)
        if draw(st.booleans()):
            return _done(partial(read_results, path))
        return _done(partial(read_values, path))

    def try_log(self, draw: Any) -> int:
        folder = self._folder()
        log = Log(folder, "x @ 4 # 0", {"a": 1})
        log.append([{"answer": "yes", "kept": 3.0}] * 2)
        log.path.write_bytes(changed_bytes(draw, log.path.read_bytes()))
        return _done(lambda: Log(folder, "x @ 4 # 0", {"a": 1}))

    def try_features(self, draw: Any) -> int:
        folder = self._folder() / "features"
        shutil.copytree(self.features, folder)
        manifest, shard = folder / "manifest.json", folder / "train-00000.safetensors"
        content = json.loads(manifest.read_text())
        if draw(st.booleans()):
            changed_file(draw, manifest, content)
        else:
            shard.write_bytes(changed_tensors(draw, shard.read_bytes()))
            content["shards"]["train"][0]["bytes"] = shard.stat().st_size
            manifest.write_text(json.dumps(content))

        def read() -> None:
            data = FeatureDataModule(str(folder), batch_size=2)
            data.check(_TOWER, _NEEDS, True)
            data.setup("fit")
            for batch in data.train_dataloader():
                stored_tokens(batch["tokens"], _NEEDS, _NEEDS)

        return _done(read)

    def try_teacher(self, draw: Any) -> int:
        folder = self._folder() / "teacher"
        shutil.copytree(self.teacher, folder)
        told, shard = folder / "teacher.json", folder / "teacher-00000.safetensors"
        if draw(st.booleans()):
            changed_file(draw, told, json.loads(told.read_text()))
        else:
            shard.write_bytes(changed_tensors(draw, shard.read_bytes()))

        def read() -> None:
            teacher = Teacher(folder, _SAYS, _head(), _processor())
            places: Any = SimpleNamespace(columns=torch.arange(12).view(2, 6))
            teacher.attention(_asked(), (1,), places)

        return _done(read)

    def try_tar(self, draw: Any) -> int:
        path = self._folder() / "a.tar"
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for picture in sorted(self.images.iterdir())[:3]:
                tar.add(picture, picture.name)
        path.write_bytes(changed_bytes(draw, content.getvalue()))

        def read() -> None:
            images = TarImages([path], _AsStored(), "skip")
            for number in range(min(len(images), 3)):
                images[number]

        return _done(read)

    def try_cell(self, draw: Any) -> int:
        folder = self._folder()
        header, cell = _cell()
        changed_file(draw, folder / "1x1.json", cell)
        return _done(lambda: [one.cell(4) for one in cells_in(folder, header)])

    def try_runs(self, draw: Any) -> int:
        folder = self._folder() / "csv/version_0"
        folder.mkdir(parents=True)
        settings = yaml.safe_dump(changed_json(draw, _SETTINGS), allow_unicode=True).encode()
        curves = b"epoch,step,val/loss,lr\n0,1,0.5,0.1\n0,2,,0.1\n1,3,0.4,0.05\n"
        if draw(st.booleans()):
            settings = changed_bytes(draw, settings)
        if draw(st.booleans()):
            curves = changed_bytes(draw, curves)
        (folder / "config.yaml").write_bytes(settings)
        (folder / "metrics.csv").write_bytes(curves)
        more = [] if draw(st.integers(0, 19)) else ["--plot", str(folder / "runs.png")]
        return main(["runs", str(folder.parents[1]), *more])

    def _folder(self) -> Path:
        """An empty one for an input."""
        folder = self.root / "input"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder


def _done(work: Callable[[], Any]) -> int:
    """As a command does it."""

    def run() -> int:
        work()
        return 0

    return guarded(run)


# ---------------------------------------------------------------- running


def fuzz(count: int, start: int = 0) -> dict[str, Any]:
    """Try malformed inputs of all kinds.

    Args:
        count: of all of them.
        start: the seed.

    Returns:
        by kind what came of them, and the memory that was needed beside the start, in bytes.
    """
    found: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = Inputs(Path(folder))
        weights = {kind: SHARES.get(kind, 1.0) for kind in inputs.kinds}
        for kind in inputs.kinds:  # what is imported late does not count as memory of an input
            _try(inputs, kind, 1, start, Outcome())
        before = _peak()
        for kind, weight in weights.items():
            number = ceil(count * weight / sum(weights.values()))
            found[kind] = Outcome()
            with no_more_than(GIB):
                _try(inputs, kind, number, start, found[kind])
        grown = _peak() - before
    return {
        "inputs": sum(sum(one.counts.values()) for one in found.values()),
        "seed": start,
        "memory_bytes": grown,
        "kinds": {
            kind: {"counts": dict(one.counts), "faults": one.faults, "seconds": one.seconds}
            for kind, one in found.items()
        },
    }


def _try(inputs: Inputs, kind: str, count: int, start: int, outcome: Outcome) -> None:
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @seed(start)
    @given(st.data())
    def one(data: Any) -> None:
        _one(inputs, kind, data.draw, outcome)

    one()


def _one(inputs: Inputs, kind: str, draw: Any, outcome: Outcome) -> None:
    out, error = io.StringIO(), io.StringIO()
    began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with redirect_stdout(out), redirect_stderr(error):
        try:
            status: Any = inputs.kinds[kind](draw)
        except SystemExit as stop:  # of a parser that has told what is wrong
            status = stop.code
        except Exception as fault:  # it ran away: what must not happen
            if type(fault).__module__.startswith("hypothesis"):
                raise
            status = f"{type(fault).__name__}: {fault}"
    outcome.seconds = max(
        outcome.seconds, resource.getrusage(resource.RUSAGE_SELF).ru_utime - began
    )
    told = [line for line in error.getvalue().splitlines() if line.startswith("ocvtp: error: ")]
    left = [path.name for path in inputs.root.rglob("*") if path.suffix in (".tmp", ".lock")]
    if isinstance(status, str):
        kind_of = "traceback"
    elif any("allocate" in line or "MemoryError" in line for line in told):
        kind_of, status = "memory", told[0]
    elif left:
        kind_of, status = "left behind", ", ".join(left)
    elif status == 0 or (status == 1 and not told):
        kind_of = "success"
    elif len(told) == 1 and status == 2 and len(told[0]) < 3000:
        kind_of = "one error"
    else:
        kind_of, status = "unclear", f"{status}: {error.getvalue()[-300:]}"
    outcome.counts[kind_of] += 1
    if kind_of not in ("success", "one error") and len(outcome.faults) < 20:
        outcome.faults.append(f"{kind_of}: {str(status)[:300]}")


@contextmanager
def no_more_than(more: int) -> Iterator[None]:
    """This process gets no more than so many bytes beside what it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------- good inputs


def _networks() -> Iterator[PrunerNetwork]:
    sizes = {"hidden_dim": 16, "slot_dim": 4, "ffn_dim": 8, "noise_rows": 32, "feature_dim": 8}
    decoder = DecoderConfig(num_layers=1, num_heads=2, ffn_dim=8)
    yield OCPruner(OCPrunerConfig(**sizes, grid_hw=(4, 4), layer=3, decoder=decoder))
    small = SurpriseSizes(hidden_dim=4, reach=1)
    yield SurpriseNetwork(NetworkConfig(sizes=small, feature_dim=8, layer=3))
    config = SelectorConfig(scorer="prompted", sizes=_SCORER, widths=Widths(8, 8))
    yield SelectorNetwork(config)


def _official() -> dict[str, torch.Tensor]:
    """A small state dict with the names of the authors' weights."""
    from ocvtp.export.official import _NAMES

    network = next(_networks())
    names = [(ours, theirs) for theirs, ours in _NAMES]
    found = {}
    for name, tensor in network.state_dict().items():
        pair = next((pair for pair in names if name.startswith(pair[0])), None)
        if pair is not None and name != "queries.noise":
            found[pair[1] + name[len(pair[0]) :]] = tensor
    return found


def _tensors() -> list[torch.Tensor]:
    return [
        *(torch.zeros(0), torch.zeros(()), torch.full((8,), float("nan")), torch.zeros(3, 3)),
        torch.zeros(1).expand(10**12),
        torch.zeros(8, dtype=torch.int64),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(8, dtype=torch.complex64),
    ]


class _AsStored:
    """A transform that leaves images as they are."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def instance_map(self, ids: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(ids))

    def describe(self) -> dict[str, Any]:
        return {}


def _write_features(folder: Path) -> None:
    """Two shards of two images with six tokens each."""
    shards = []
    for number in range(2):
        path = folder / shard_name("train", number)
        images = [[2 * number + i, f"/photos/{2 * number + i}.jpg"] for i in range(2)]
        with ShardWriter(path, {"images": json.dumps(images), "skipped": "[]"}) as shard:
            shard.add("hidden.2", torch.zeros(12, 4))
            shard.add("attention.1.cls", torch.zeros(12))
            shard.add("grids", torch.tensor([[[2, 3]]] * 2, dtype=torch.int32))
            shard.add("image_sizes", torch.full((2, 2), 24, dtype=torch.int32))
            shard.add("instances", torch.zeros(8, dtype=torch.uint8))
            shard.add("instance_sizes", torch.full((2, 2), 2, dtype=torch.int32))
        shards.append(describe_shard(path))
    settings = {"tower": _TOWER, "needs": plain(asdict(_NEEDS)), "num_heads": 2}
    splits = {"train": {"instances": True, "num_images": 4}}
    settings |= {"views": ["plain"], "splits": splits, "dtype": "float32"}
    Manifest(folder, settings, {"train": shards}).write()


def _write_teacher(folder: Path) -> None:
    """What a model said of two questions."""
    with ShardWriter(folder / shard_name("teacher", 0), {}) as shard:
        shard.add("states", torch.zeros(3, 4))
        shard.add("state_counts", torch.tensor([1, 2], dtype=torch.int32))
        shard.add("attention.1", torch.zeros(12))
        shard.add("token_counts", torch.tensor([6, 6], dtype=torch.int32))
        images = json.dumps(question_names(_asked()))
        shard.metadata |= {"images": images, "skipped": "[]"}
    settings = {
        "weights": weights_hash(_head()),
        "needs": asdict(_SAYS),
        "processor": ProcessorTransform(_processor()).describe(),
    }
    told = {**settings, "shards": [shard_name("teacher", 0)]}
    (folder / "teacher.json").write_text(json.dumps(told))


@cache
def _processor() -> CLIPImageProcessor:
    return CLIPImageProcessor()


def _head() -> torch.nn.Module:
    head = torch.nn.Linear(4, 4)
    torch.nn.init.ones_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def _asked() -> dict[str, Any]:
    """A batch of two questions."""
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"keys": ["a", "b"], "inputs": inputs, "answers": torch.zeros(2)}


@cache
def _cell() -> tuple[dict[str, Any], dict[str, Any]]:
    """The header of a benchmark, and what is kept of a cell: of what lies in docs/results."""
    found = json.loads(_BENCH.read_text())
    cell, sizes = found["cells"][0], ("batch_size", "text_length", "images_per_prompt")
    header = {**found["settings"], **{name: cell[name] for name in sizes}}
    rest = {name: cell[name] for name in ("image_tokens", "text_tokens")}
    rows = cell["rows"][:3]
    return header, {"header": header, "sizes": rest, "unfit": {}, "rows": rows}


_BENCH = Path(__file__).parents[1] / "docs/results/bench-llava-mid-cpu/results.json"
_NEEDS = Needs(hidden=(2,), attention=((1, "cls"),))
_SAYS = TeacherNeeds(answers=True, layers=(1,), rows="last")
_TOWER = {"id": "t", "layout": "grid", "grid_hw": [2, 3], "preprocessing": {"size": 4}}
_SCORER = {"dim": 16, "blocks": 1, "heads": 2}
_BOX = [4, 4, 20, 4, 20, 20, 4, 20]
_COCO = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 32, "height": 24},
        {"id": 2, "file_name": "a.jpeg", "width": 32, "height": 24},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [_BOX], "iscrowd": 0},
        {
            **{"id": 2, "image_id": 2, "category_id": 2, "iscrowd": 0, "bbox": [1, 1, 9, 9]},
            "segmentation": {"size": [24, 32], "counts": [100, 200, 468]},
        },
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cow"}],
}
_VQA = [
    {"image": "a.png", "question": "What?", "answers": ["a", "b"], "kind": "x"},
    {"image": "a.gif", "question": "Who?", "answer": "b"},
]
_POPE = [
    {"question_id": 1, "image": "a.png", "text": "Is there a cat in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.bmp", "text": "Is there a dog in the image?", "label": "no"},
]
_TALK = [
    {
        "image": "a.png",
        "boxes": [[1, 1, 9, 9]],
        "conversations": [
            {"from": "human", "value": "<image> What?"},
            {"from": "gpt", "value": "That."},
        ],
    }
]
_FIGURE = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10, "images": 5}
_RESULTS = {
    **{"schema": 1, "task": "scenes", "model": "x", "metrics": ["all"], "percent": True},
    **{"settings": {"command": "ocvtp evaluate"}, "environment": {}, "warnings": []},
    "rows": [
        {
            **{"label": "uniform", "pruner": "uniform", "budget": 0.5, "num_keep": 8, "seeds": 1},
            **{"control": False, "note": "", "trained": False, "figures": {"all": _FIGURE}},
        }
    ],
}
_ENCODER = {
    "class_path": "ocvtp.encoders.clip.CLIPEncoder",
    "init_args": {"tower": "random:tiny", "layer": 3},
}
_SETTINGS = {
    "seed_everything": 0,
    "model": {
        "encoder": _ENCODER,
        "objective": {
            "class_path": "ocvtp.slots.objectives.SlotsObjective",
            "init_args": {"decoder": {"num_layers": 1, "num_heads": 2, "ffn_dim": 8}},
        },
        "network": {"hidden_dim": 16, "slot_dim": 4, "ffn_dim": 8, "noise_rows": 32},
        "num_slots": [4, 8],
    },
    "data": {
        "class_path": "ocvtp.data.module.SceneDataModule",
        "init_args": {"num_train": 4, "num_val": 2, "batch_size": 2},
    },
    "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False},
}
_YAML = [
    *("&a [*a]", "[" * 300, "!!python/object:os.system x", "{a: 1}", ".nan", "2020-13-45"),
    *("a: &x [1]\nb: *x", "<<: {seed_everything: 1}", "\t", "- a", "*a", "9" * 5000),
]
