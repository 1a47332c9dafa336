"""The demo VLM that is shipped sees drawn scenes, and goes on seeing them when it is pruned."""

from __future__ import annotations

from pathlib import Path

import pytest

from ocvtp import build_pruner
from ocvtp.demo_vlm.measure import measure
from ocvtp.demo_vlm.settings import ReportSettings
from ocvtp.hosts.loading import load_model

FOLDER = Path(__file__).parents[1] / "checkpoints" / "demo-vlm"
REPORT = ReportSettings(split="test", num_images=30, questions=6)


@pytest.fixture(scope="module")
def shipped():
    return load_model(str(FOLDER), "float32")


def test_it_answers_by_what_it_sees(shipped):
    figures = measure(*shipped, "easy", REPORT, 96, 0)
    assert figures["existence"].accuracy > 0.8
    assert figures["all"].accuracy > figures["shuffled"].accuracy + 0.2


def test_it_bears_pruning(shipped):
    whole = measure(*shipped, "easy", REPORT, 96, 0)["all"].accuracy
    with build_pruner("divprune", num_keep=16)(shipped[0]):
        assert measure(*shipped, "easy", REPORT, 96, 0)["all"].accuracy > whole - 0.15


def test_it_is_small_and_holds_no_pickle():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(sizes.values()) < 8 * 2**20
    assert {Path(name).suffix for name in sizes} <= {".safetensors", ".json", ".md", ".jinja"}
