"""Fixtures that tests share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sampling import leave_repetitions_out, mark_the_rest_slow
from tiny_models import tiny_llava
from tiny_next import tiny_next
from torch import Tensor

from ocvtp.data.scenes import write_scenes
from ocvtp.slots import OCPruner, OCPrunerConfig

gc.disable()  # until all tests are collected: a third of the time of that goes to it
DATA = Path(__file__).parent / "data"
COCO_TINY = Path(__file__).parents[2] / "shared" / "coco-tiny"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Ten times faster for models as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def llava() -> Any:
    """A tiny LLaVA-1.5; a test leaves it as it found it, or works on a copy."""
    return tiny_llava("clip")


@pytest.fixture(scope="session")
def llava_siglip() -> Any:
    """The same behind a SigLIP tower."""
    return tiny_llava("siglip")


@pytest.fixture(scope="session")
def llava_next() -> Any:
    """A tiny LLaVA-NeXT; a test leaves it as it found it, or works on a copy."""
    return tiny_next("clip")


@pytest.fixture(scope="session")
def llava_next_siglip() -> Any:
    """The same behind a SigLIP tower."""
    return tiny_next("siglip")


@lru_cache
def _vectors(name: str) -> dict[str, Tensor]:
    return load_file(DATA / f"{name}.safetensors")


@pytest.fixture(scope="session")
def vectors() -> Callable[[str], dict[str, Tensor]]:
    """Reference vectors by name, see tests/data/README.md."""
    return _vectors


@pytest.fixture
def small_network() -> OCPruner:
    """An OC-pruner over 8-wide tokens, in evaluation mode."""
    torch.manual_seed(0)
    config = OCPrunerConfig(
        feature_dim=8, hidden_dim=16, slot_dim=4, ffn_dim=8, grid_hw=(4, 4), layer=3, noise_rows=32
    )
    return OCPruner(config).eval()


@pytest.fixture(scope="session")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty training images in COCO's layout: real ones where they lie beside the repository."""
    if COCO_TINY.is_dir():
        return COCO_TINY
    root = tmp_path_factory.mktemp("coco")
    write_scenes(root, num_train=50, num_val=20, size=160, seed=0)
    return root


def pytest_collection_finish() -> None:
    """What is imported stays: from here on garbage is looked for elsewhere, and less often."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


def pytest_report_header() -> str:
    """The versions that this run is on; environments for one tool lack what it does not need."""
    names = ("torch", "torchvision", "transformers", "timm", "pytorch-lightning", "peft", "vllm")
    return "on " + ", ".join(map(with_version, names))


def with_version(name: str) -> str:
    """A package and its version."""
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave GPU tests out where there is no GPU, and network tests unless they are asked for."""
    named = any("[" in word for word in config.args)  # cases, by their ids
    if not named and not config.getoption("--every-case"):
        leave_repetitions_out(config, items)
    mark_the_rest_slow(items)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("network") and "network" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="needs the internet; run with -m network"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many malformed inputs tests/fuzz tries, and whether cases are left out."""
    parser.addoption("--fuzz", type=int, default=300, help="malformed inputs (default: 300)")
    parser.addoption(
        "--every-case", action="store_true", help="whole products of tests marked `covering`"
    )
