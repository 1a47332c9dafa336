"""A training step that is counted without values is the step that runs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import selector_step as step
from benchmarks.meta import WithoutValues
from ocvtp.flops import operations

CONFIG = "configs/train/selector/{}.yaml"
TINY = [
    "--model.host.dtype=float32", "--model.scorer.dim=16", "--model.scorer.blocks=1",
    "--model.scorer.heads=2",
]  # fmt: skip
K = 4


def module_of(recipe, model):
    return step.build_module(CONFIG.format(recipe), model, TINY if recipe == "kl" else TINY[:2])


def counts(module, batch, checkpointing):
    """Operations by part, and bytes kept."""
    module.host = replace(module.host, checkpointing=checkpointing)
    module.on_fit_start()
    kept = step.kept_bytes(module, batch, K)
    parts = step.operations_of(module, batch, K)
    module.teardown("fit")
    return parts, kept


@pytest.mark.parametrize(
    ("recipe", "model", "checkpointing"),
    [
        ("kl", "tiny-llava", False),
        ("visionselector", "tiny-llava", True),
        ("kl", "tiny-qwen2.5-vl", True),
    ],
)
@pytest.mark.slow
def test_what_is_counted_is_what_runs(recipe, model, checkpointing):
    model = f"random:{model}"
    real = module_of(recipe, model)
    batch = step.questions(real, 3, 9, 5)
    with WithoutValues() as memory:
        module = module_of(recipe, model)
    assert all(p.is_meta for p in module.parameters())
    with memory:
        parts, kept = counts(module, batch, checkpointing)
    ran, held = counts(real, batch, checkpointing)
    assert parts == ran
    assert kept == pytest.approx(held, rel=0.02)
    expected = {"tower", "scorer", "pruned pass", "losses", "backward", "all"}
    assert parts.keys() == expected | ({"full pass"} if recipe == "kl" else set())
    assert parts["all"] == sum(n for name, n in parts.items() if name != "all")
    plain = operations.counter()
    assert isinstance(plain, FlopCounterMode)
    real.on_fit_start()
    with plain:
        step.forward(real, batch, K)
    real.teardown("fit")
    assert plain.get_total_flops() == parts["all"] - parts["backward"]
    if recipe == "kl":
        # What the gate adds to the heads is all that the passes differ by.
        assert 1 < parts["pruned pass"] / parts["full pass"] < 1.2


@pytest.mark.slow
def test_the_peak_falls_with_checkpointing(tmp_path, capsys, monkeypatch):
    words = ["--model", "random:tiny-llava", "--batch-size", "2", "--asked", "9", *TINY]
    step.main([*words, "--json", "--output", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    results = json.loads(printed[printed.index("{") :])
    assert results == json.loads((tmp_path / "found.json").read_text())
    found = results["recipes"]["kl"]
    less, more = found["checkpointing"], found["no checkpointing"]
    for name in ("bytes kept for the backward pass", "bytes at the peak, gradients among them"):
        assert 0 < less[name] < more[name]
    assert found["fixed bytes"]["AdamW"] == 8 * found["parameters"]["scorer"]
    assert less["operations"]["backward"] > more["operations"]["backward"]
    seconds = more["operations"]["all"] / 2 * 665_000 / (989e12 * 0.4)
    assert more["hours"] == pytest.approx(seconds / 3600, abs=0.01)
    monkeypatch.setattr(step, "count", lambda *_: found)
    step.main(words)
    assert "TFLOPs" in capsys.readouterr().out


@pytest.mark.slow
def test_a_gate_that_measures_cannot_be_counted():
    with pytest.raises(ValueError, match="must measure what tokens are like"):
        step.main(["--config", CONFIG.format("noise"), "--model", "random:tiny-llava"])
