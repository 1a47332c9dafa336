"""What a server is told about pruning, and what it refuses; needs no server."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from small_networks import TRAINED
from tiny_models import tiny_vision

import ocvtp
from ocvtp.pruners import Pruner, register
from ocvtp.pruners.registry import _REGISTRY
from ocvtp.serving.plan import alternatives, layout_of, read_plan
from ocvtp.structures import Needs


def config(tower: str = "clip", settings: Any = None, **changes: Any) -> Any:
    """A LLaVA's, of 6 blocks and 16 tokens an image, 5 blocks of which are built."""
    strategy = "default" if tower == "clip" else "full"
    given = {"vision_feature_layer": -2, "vision_feature_select_strategy": strategy}
    given |= {"vision_config": tiny_vision(tower), "ocvtp": settings, "model_type": "llava"}
    text = SimpleNamespace(hidden_size=48, num_hidden_layers=3)
    return SimpleNamespace(get_text_config=lambda: text, **given | changes)


def plan(tower: str = "clip", **settings: Any) -> Any:
    return read_plan(config(tower, settings))


def kept(served: Any) -> int:
    """Rows of an image of 16 tokens."""
    shape = served.layout.shape()
    return shape.num_rows(served.asked(shape, served.budget))


@pytest.mark.parametrize(
    ("settings", "num_keep"),
    [
        ({"pruner": "divprune", "num_keep": 5}, 5),
        ({"pruner": "divprune", "max_keep": 5}, 5),
        ({"pruner": "divprune", "keep_ratio": 0.5, "max_keep": 5}, 5),
        ({"pruner": "divprune", "num_keep": 5, "max_keep": 6}, 5),
        ({"pruner": "divprune:keep_ratio=0.5", "max_keep": 5}, 5),
        ({"pruner": "divprune:num_keep=K", "num_keep": 5}, 5),
        ({"pruner": "divprune:max_keep=5", "max_keep": 64}, 5),
        ({"pruner": "divprune:num_keep=5"}, 5),
        ({"pruner": "divprune", "keep_ratio": 0.25}, 4),
        ({"pruner": "visionzip:num_contextual=2", "num_keep": 7}, 7),
        ({"pruner": "none"}, 16),
    ],
)
def test_settings_name_a_pruner_and_fix_the_number(settings, num_keep):
    served = plan(**settings)
    assert kept(served) == num_keep
    assert served.pruner.name == settings["pruner"].partition(":")[0]


@pytest.mark.parametrize(("layer", "built"), [(-2, 5), (4, 4), (-1, 6)])
def test_the_tower_is_built_up_to_the_selected_layer(layer, built):
    tower = layout_of(config(vision_feature_layer=layer)).tower
    assert (tower.num_built, tower.num_blocks, tower.num_tokens) == (built, 6, 16)
    assert tower.block(-1) == 5
    assert tower.layer(-1) == 6


def test_alternatives_are_what_is_served():
    names = alternatives(layout_of(config()))
    assert {"divprune", "fastervlm", "visionzip", "fopru", "uniform"} <= set(names)
    for name in names:
        assert plan(pruner=name, num_keep=4).pruner.name == name
    without_cls = alternatives(layout_of(config("siglip")))
    assert {"divprune", "fopru"} <= set(without_cls) < set(names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "names no pruner; pass hf_overrides with e.g."),
        ({"num_keep": 4}, "names no pruner"),
        ({"pruner": "divprun", "num_keep": 4}, "did you mean 'divprune'"),
        ({"pruner": "divprune", "keep": 4}, "has no setting 'keep'"),
        ({"pruner": "divprune"}, "pass exactly one of them"),
        ({"pruner": "divprune", "num_keep": 17}, "exceeds the 16 visual tokens"),
        ({"pruner": "divprune", "num_keep": 9, "max_keep": 8}, r"num_keep=9 and max_keep=8.*fewer"),
        ({"pruner": "divprune:num_keep=9", "max_keep": 8}, "num_keep=9 and max_keep=8"),
        (
            {"pruner": "divprune:max_keep=8", "num_keep": 9},
            "num_keep=9 would not count: .* says how many",
        ),
        (
            {"pruner": "divprune:num_keep=8", "keep_ratio": 0.5},
            "keep_ratio=0.5 would not count: .* says how",
        ),
        ({"pruner": "fastv:stages=[[1,4]]", "num_keep": 5}, "'llm_layers'.*use one of divprune"),
        ({"pruner": "visionzip:num_contextual=K", "max_keep": 4}, "a K, which stands for num_keep"),
        ({"pruner": "divprune", "num_keep": 9, "max_keep": 0}, "max_keep=0; pass at least 1"),
        ({"pruner": "trim", "num_keep": 4}, r"reads the prompt.*use one of divprune, fastervlm"),
        ({"pruner": "trimtokenator", "num_keep": 4}, "reads the prompt"),
        ({"pruner": "fastv", "stages": [[1, 4]]}, "stage 'llm_layers'"),
        ({"pruner": "visiondrop", "later": True, "num_keep": 4}, "stage 'llm_layers'"),
        ({"pruner": "tome", "num_keep": 4}, "stage 'encoder'"),
        ({"pruner": "vprune", "num_keep": 4}, "stage 'pixels'"),
        ({"pruner": "prumerge"}, "decides by itself how many tokens"),
        ({"pruner": "prumerge", "num_keep": 4}, "reads block 5 .* first 5 of 6 blocks"),
        ({"pruner": "hiprune", "num_keep": 4}, r"blocks\[8\] does not exist .*use one of"),
        ({"pruner": "random", "num_keep": 4}, "an image's place in the batch"),
    ],
)
def test_what_cannot_be_served_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        read_plan(config(settings=settings))


def test_an_earlier_block_is_served():
    assert kept(plan(pruner="prumerge:block=-2", num_keep=4)) == 4
    assert kept(plan(pruner="hiprune", object_block=2, num_keep=4)) == 4


def test_a_tower_without_cls():
    assert kept(plan("siglip", pruner="visionzip:guidance=received", num_keep=4)) == 4
    with pytest.raises(ValueError, match=r"reads the CLS token.*use one of divprune"):
        plan("siglip", pruner="fastervlm", num_keep=4)


@pytest.fixture
def reader():
    """A pruner that reads what the test sets."""

    @register("reader")
    class Reader(Pruner):
        needs = Needs()

        def _select(self, tokens: Any, num_keep: int) -> Any:
            raise AssertionError

    yield Reader
    del _REGISTRY["reader"]


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (Needs(hidden=(5,)), None),
        (Needs(hidden=(-1,)), r"reads hidden_states\[6\]"),
        (Needs(hidden=(7,)), r"hidden_states\[7\] does not exist"),
        (Needs(attention=((4, "global"),)), None),
        (Needs(attention=((1, "last"),)), "attention of kind last"),
        (Needs(keys=(5,)), "reads block 5"),
    ],
)
def test_needs_decide_and_not_names(reader, needs, message):
    reader.needs = needs
    if message is None:
        assert plan(pruner="reader", num_keep=4).pruner.name == "reader"
    else:
        with pytest.raises(ValueError, match=message):
            plan(pruner="reader", num_keep=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": [-2, -3]}, "selects several layers"),
        ({"vision_feature_select_strategy": "full"}, "pass 'default'"),
        ({"vision_config": SimpleNamespace(model_type="pixtral")}, "has a pixtral tower"),
        ({"model_type": "gemma3"}, "models of type 'gemma3' cannot be pruned in a server"),
    ],
)
def test_other_models_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read_plan(config(settings={"pruner": "divprune", "num_keep": 4}, **changes))


@pytest.mark.slow
def test_the_plugin_imports_neither_vllm_nor_transformers():
    code = (
        "import sys, ocvtp.serving.vllm_plugin, ocvtp.serving.plan;"
        "heavy = {'vllm', 'transformers', 'pytorch_lightning', 'ocvtp.serving.vllm_core'};"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_what_is_served_is_what_is_published():
    """Every pruner in front of the language model that reads no prompt, some by a setting."""
    settings = {"hiprune": {"object_block": 2}, "prumerge": {"block": -2}}
    settings |= {"prumerge_plus": {"block": -2}, "ridge": {"block": -2}, "todre": {"block": -2}}
    layout = layout_of(config())
    for name, own in settings.items():
        assert plan(pruner=name, num_keep=4, **own).pruner.name == name
    left = set(ocvtp.list_pruners("llm_input")) - set(alternatives(layout)) - set(settings)
    assert left - {*TRAINED, "random"} == {
        name
        for name in left - {*TRAINED, "random"}
        if (needs := ocvtp.build_pruner(name, num_keep=4).needs).text or needs.clip
    }
