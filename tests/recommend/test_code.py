"""The lines that a recommendation gives do what was measured."""

import pytest

import ocvtp
from ocvtp.hosts.loading import load_model
from ocvtp.pruners.specs import build_spec
from ocvtp.recommend.choice import Option, Span
from ocvtp.recommend.code import lines
from ocvtp.slots import OCPruner, OCPrunerConfig


def option(label, num_keep):
    span = Span(0.0, None, None)
    return Option(label, num_keep, span, None, span)


@pytest.fixture(scope="module")
def llava_with_processor():
    return load_model("random:tiny-llava", "float32")


def attached(code, model, processor):
    assert len(code) == 3
    space = {"model": model, "processor": processor}
    exec("\n".join(code), space)
    space["handle"].remove()
    return space["pruner"]


@pytest.mark.parametrize(
    ("label", "num_keep"),
    [
        ("fopru", 36),
        ("fopru:strategy=row", 36),
        ("dart:stages=[[1,K]]", 36),
        ("dart:stages=[[1,16]]", None),
        ("tome", 72),
    ],
)
def test_they_attach_the_pruner_of_the_row(llava_with_processor, label, num_keep):
    pruner = attached(lines(option(label, num_keep)), *llava_with_processor)
    expected = build_spec(label, num_keep=num_keep)
    assert type(pruner) is type(expected)
    assert vars(pruner) == vars(expected)


def test_they_name_the_network_and_the_text_tower(llava_with_processor, tmp_path):
    config = OCPrunerConfig(
        feature_dim=64, hidden_dim=32, slot_dim=16, ffn_dim=32, grid_hw=(12, 12), layer=3
    )
    OCPruner(config).save_pretrained(tmp_path)
    code = lines(option("ocvtp", 9), checkpoint=str(tmp_path))
    assert attached(code, *llava_with_processor).checkpoint == str(tmp_path)
    assert "checkpoint" not in lines(option("fopru", 9), checkpoint=str(tmp_path))[1]
    code = lines(option("trim", 9), text_tower="random:tiny")
    assert isinstance(attached(code, *llava_with_processor), ocvtp.Pruner)
