"""`ocvtp probe`: which gates stand in for dropping, by how far the others are open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ocvtp.cli import main
from ocvtp.evaluation.gate_probe import OPEN, build_gates, probe, to_markdown
from ocvtp.hosts.attach import attached
from ocvtp.hosts.loading import load_model
from ocvtp.hosts.prompt.chat_template import with_template
from ocvtp.pruners import build_pruner
from ocvtp.structures import Selection

TINY = "random:tiny-qwen3-vl"


def item(seed: int, question: str = "What is this?") -> dict[str, Any]:
    pixels = torch.randint(256, (90, 120, 3), generator=torch.Generator().manual_seed(seed))
    image = Image.fromarray(pixels.to(torch.uint8).numpy())
    said = {"question": question, "answer": "It", "before": (), "masks": None, "key": str(seed)}
    return {"image": image} | said


@pytest.mark.slow
def test_gates_of_the_demo_stand_in_for_dropping(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["probe", "--model", "checkpoints/demo-vlm", "--dtype", "float32", "--json"]
    assert main([*words, "--num-images", "4"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["num_keep"] == 16
    assert facts["visual_tokens"] == [144] * 4
    assert facts["opened"] == list(OPEN)
    of = {
        name: dict(zip(OPEN, values, strict=True)) for name, values in facts["divergence"].items()
    }
    assert [*of] == ["key_bias:floor=0", "noise", "scale"]
    assert of["key_bias:floor=0"][0.0] < 1e-4 < facts["full"] / 100
    assert of["noise"][0.1] < of["scale"][0.1] < of["key_bias:floor=0"][0.1] < facts["full"]
    assert facts["contiguous"] < facts["full"]


@pytest.mark.parametrize("name", ["tiny-llava-next", "tiny-qwen3-vl"])
def test_all_tokens_diverge_by_what_the_model_itself_predicts(name: str) -> None:
    """By `attach` and the model's own forward, no way in common."""
    model, processor = load_model(f"random:{name}", "float32")
    items = [item(0)]
    facts = probe(model, processor, build_gates(["gather"]), items, num_keep=3, seed=5)
    tokens = facts["visual_tokens"][0]
    drawn = torch.rand(1, tokens, generator=torch.Generator().manual_seed(5))
    keep = drawn.topk(3).indices.sort().values
    text = with_template(processor, items[0]["question"], 1)
    inputs = processor(images=[items[0]["image"]], text=[text], return_tensors="pt")
    pruner = build_pruner("uniform", num_keep=3)
    vars(pruner)["select"] = lambda tokens: Selection(keep)
    found = {}
    with torch.no_grad():
        full = model(**inputs).logits[0, -1].log_softmax(dim=0)
        for positions in ("original", "contiguous"):
            with attached(model, pruner, positions=positions):
                found[positions] = model(**inputs).logits[0, -1].log_softmax(dim=0)
    dropped = found["original"]
    for name, other in (("full", full), ("contiguous", found["contiguous"])):
        nats = float((dropped.exp() * (dropped - other)).sum())
        assert facts[name] == pytest.approx(nats, abs=1e-5, rel=1e-4)
    for value in facts["divergence"]["gather"]:
        assert value == pytest.approx(facts["contiguous"], abs=1e-6)


@pytest.mark.slow
def test_gates_before_a_later_layer(capsys: pytest.CaptureFixture[str]) -> None:
    gates = ["--gate", "key_bias:floor=0", "policy_softmax", "--gate", "gather:positions=original"]
    words = ["probe", "--model", TINY, "--layer", "2", "--num-keep", "2", *gates]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "2 random of 9 visual tokens at g = 1 before layer 2" in text
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["full"] > 1e-4
    for values in facts["divergence"].values():
        assert values[-1] < 1e-5
    assert all(f"| {value:.3f} |" in text for value in facts["divergence"]["policy_softmax"])
    assert to_markdown(facts) + "\n" == text


def test_a_floor_is_the_least_that_is_left() -> None:
    model, processor = load_model(TINY, "float32")
    gates = build_gates(["key_bias:floor=0.2"])
    (found,) = probe(model, processor, gates, [item(1)])["divergence"].values()
    assert found[1:] == pytest.approx([found[1]] * (len(found) - 1))
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_ones_own_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        item(number)["image"].save(tmp_path / f"{number}.png")
    words = ["probe", "--model", TINY, "--gate", "gather", "--images", str(tmp_path)]
    assert main([*words, "--num-images", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["num_images"] == 2
    whole = [*words[:-1], str(tmp_path / "0.png"), str(tmp_path / "1.png"), "--json"]
    assert main(whole) == 0
    assert json.loads(capsys.readouterr().out) == facts
    assert main([*words, "--prompt", "Where?", "--num-images", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["full"] != facts["full"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--gate", "keybias"], "unknown gate 'keybias'; did you mean 'key_bias'"),
        (["--gate", "none"], "gate 'none' does nothing in a model"),
        (["--gate", "scale:floor=0.1"], "gate 'scale' has no setting 'floor'"),
        (["--gate", "key_bias:floor"], "gate 'key_bias:floor': 'floor' is no KEY=VALUE"),
        (["--num-keep", "9"], "--num-keep 9; pass 1 to 8 of 9 visual tokens"),
        (["--num-images", "0"], "--num-images 0; pass at least 1."),
        (["--layer", "7"], "layer 7 of the language model does not run here"),
        (["--layer", "-1"], "layer -1 of the language model does not run here"),
        (["--layer", "1"], "pass a layer from there on"),
        (["--prompt", "Where?"], "--prompt 'Where?' is about --images"),
        (["--images", "docs", "--level", "easy"], "--level easy is of drawn scenes"),
        (["--images", "docs"], "--images docs is a folder without images"),
        (["--images", "none.png"], "none.png"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "--model", TINY, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ocvtp: error: ")
    assert problem in error
    assert error.count("\n") == 1
