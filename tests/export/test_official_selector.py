"""VisionSelector's released scorer, by made-up weights of its names and shapes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

import ocvtp
from ocvtp.cli import main
from ocvtp.export import export_official_selector
from ocvtp.hosts.loading import load_config
from ocvtp.selectors.network import SelectorNetwork
from ocvtp.structures import VisualTokens

MODEL = "random:tiny-qwen2.5-vl"
WIDTH = load_config(MODEL).get_text_config().hidden_size
DIM = WIDTH // 2
HOLDER = "visual.importance_scorer."


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {
        f"{name}.{part}": torch.randn(shape)
        for name in ("k_proj", "q_proj")
        for part, shape in (("weight", (DIM, WIDTH)), ("bias", (DIM,)))
    }


def published(state, tokens):
    """Scores [N] as the paper has them: the mean over j of q_i.k_j / sqrt(h)."""
    queries, keys = (
        tokens @ state[f"{n}.weight"].T + state[f"{n}.bias"] for n in ("q_proj", "k_proj")
    )
    return (queries @ keys.T / DIM**0.5).mean(dim=1)


def whole_model(state):
    """The scorer inside of a model, of which nothing else is wanted."""
    rest = {"visual.merger.mlp.0.bias": torch.zeros(3), "model.layers.0.q_proj.bias": torch.ones(2)}
    return rest | {HOLDER + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("form", ["safetensors", "torch.save", "model", "parts", "compiled"])
def test_its_scores_are_the_published_ones(state, form, tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    if form == "safetensors":
        save_file(state, path)
    elif form == "model":
        save_file(whole_model(state), path)
    elif form == "compiled":
        save_file({f"module._orig_mod.{name}": tensor for name, tensor in state.items()}, path)
    elif form == "torch.save":
        path = tmp_path / "weights.pt"
        torch.save({f"model.{name}": tensor for name, tensor in whole_model(state).items()}, path)
    else:
        path = tmp_path / "parts"
        path.mkdir()
        for number, (name, tensor) in enumerate(whole_model(state).items()):
            save_file({name: tensor}, path / f"model-{number}.safetensors")
    folder = tmp_path / "artifact"
    words = ["--official-selector", str(path), "--model", MODEL, "--output", str(folder)]
    assert main(["export", *words]) == 0
    assert f"before the language model of {MODEL}" in capsys.readouterr().out
    network = SelectorNetwork.from_pretrained(folder)
    tokens = torch.randn(2, 12, WIDTH)
    seen = VisualTokens(features=tokens, projected=tokens, grid_hw=(3, 4))
    with torch.no_grad():
        found = network(seen).values
    assert_close(
        found, torch.stack([published(state, own) for own in tokens]), rtol=1e-4, atol=1e-4
    )
    config = json.loads((folder / "config.json").read_text())
    assert (config["format"], config["scorer"], config["sizes"]) == (
        "ocvtp.pruner", "qk_mean", {"dim": DIM}
    )  # fmt: skip
    assert config["widths"]["projected"] == config["host"]["width"] == WIDTH
    assert config["host"]["model_type"] == "qwen2_5_vl"
    assert config["training"]["source"] == "the authors' released weights"


def test_it_prunes(state, tmp_path):
    save_file(
        {name: tensor.bfloat16() for name, tensor in state.items()}, tmp_path / "w.safetensors"
    )
    network = export_official_selector(tmp_path / "w.safetensors", tmp_path / "out", MODEL)
    assert all(p.dtype == torch.float32 for p in network.parameters())
    pruner = ocvtp.build_pruner("learned", checkpoint=str(tmp_path / "out"), num_keep=5)
    tokens = torch.randn(1, 12, WIDTH)
    seen = VisualTokens(features=tokens, projected=tokens, grid_hw=(3, 4))
    best = published({k: v.bfloat16().float() for k, v in state.items()}, tokens[0]).topk(5).indices
    assert pruner.select(seen).keep_indices[0].tolist() == sorted(best.tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_proj.bias": None}, "missing .'to_key.bias'"),
        ({"input_layernorm.weight": torch.ones(WIDTH)}, "unknown entry 'input_layernorm.weight'"),
        ({"q_proj.scale": torch.ones(1)}, "left over .'to_query.scale'"),
        ({"k_proj.weight": torch.zeros(DIM + 1, WIDTH)}, "not those of two equal linear maps"),
        ({"q_proj.bias": torch.zeros(DIM, 1)}, "not those of two equal linear maps"),
        ({"q_proj.bias": torch.full((DIM,), float("nan"))}, "'to_query.bias' has numbers"),
        ({f"module.{'q_proj.bias'}": torch.zeros(DIM)}, "several entries 'q_proj.bias'"),
    ],
)
@pytest.mark.parametrize("is_inside", [False, True])
def test_another_scorer_is_refused(state, change, message, is_inside, tmp_path):
    state = {name: own for name, own in (state | change).items() if own is not None}
    if is_inside and "several" in message:
        state = {f"{HOLDER}{name.replace('module.', '')}": own for name, own in state.items()} | {
            f"other.{HOLDER}q_proj.bias": torch.zeros(DIM)
        }
    elif is_inside:
        state = whole_model(state)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=message):
        export_official_selector(tmp_path / "weights.safetensors", tmp_path / "out", MODEL)
    assert not (tmp_path / "out").exists()


def test_the_model_must_be_as_wide(tmp_path, capsys):
    weight, bias = torch.zeros(4, WIDTH + 2), torch.zeros(4)
    state = {f"{n}.{p}": v.clone() for n in ("q_proj", "k_proj") for p, v in
             (("weight", weight), ("bias", bias))}  # fmt: skip
    save_file(state, tmp_path / "w.safetensors")
    words = ["export", "--official-selector", str(tmp_path / "w.safetensors"), "--output"]
    assert main([*words, str(tmp_path / "out"), "--model", MODEL]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"a width of {WIDTH + 2}, and the language model of {MODEL} has {WIDTH}" in error
    assert main([*words, str(tmp_path / "out")]) == 2
    assert "go together" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["missing", "garbage", "empty folder", "pickle", "list"])
def test_files_that_are_none(kind, tmp_path):
    path = tmp_path / ("weights.pt" if kind in ("pickle", "list") else "weights.safetensors")
    if kind == "garbage":
        path.write_bytes(b"\x00\x01 no such format")
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "pickle":
        torch.save({"q_proj.weight": object()}, path)
    elif kind == "list":
        torch.save([torch.zeros(2)], path)
    with pytest.raises(ValueError, match=r"weights\.(pt|safetensors)"):
        export_official_selector(path, tmp_path / "out", MODEL)
    assert not (tmp_path / "out").exists()
