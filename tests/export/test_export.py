"""Artifacts: official weights, checkpoints, and files that are wrong or hostile."""

from __future__ import annotations

import json
import pickle  # noqa: TID251 - to make the files that must be refused
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import ocvtp
from ocvtp.cli import main
from ocvtp.export import export_checkpoint, export_official
from ocvtp.export.official import convert
from ocvtp.slots import OCPruner
from ocvtp.slots.decoder import DecoderConfig
from ocvtp.slots.objectives import area_weighted_mse


@pytest.fixture
def official(tmp_path, vectors):
    path = tmp_path / "weights.pth"
    torch.save(dict(vectors("dinosaur_state")), path)
    return path


def _folder_is_unwritten(folder):
    return not folder.exists() or not any(folder.iterdir())


def test_official_weights_give_the_official_results(official, tmp_path, vectors):
    status = main(
        ["export", "--official", str(official), "--output", str(tmp_path / "out"), "--with-decoder"]
    )
    assert status == 0
    network = OCPruner.from_pretrained(tmp_path / "out").double()
    reference = {k: v.double() for k, v in vectors("dinosaur_eval").items()}
    features = reference["features"]
    assert_close(network.encode(features), reference["encode"], rtol=0, atol=1e-9)
    initial = network.queries(2, 6, reference["noise"])
    assert_close(initial, reference["slots_init"], rtol=0, atol=1e-9)
    slots, attention = network.assign(features, num_slots=6, noise=reference["noise"])
    assert_close(slots, reference["slots"], rtol=0, atol=1e-9)
    assert_close(attention, reference["attn"], rtol=0, atol=1e-9)
    recon = network.decode(features, slots, (6, 6), visible="all")
    assert_close(recon, reference["recon"], rtol=0, atol=1e-9)
    loss = area_weighted_mse(recon, features, attention, legacy=True)
    assert_close(loss.reshape(1), reference["aw_mse_eval"], rtol=0, atol=1e-9)


def test_official_results_in_fp32(official, tmp_path, vectors):
    network = export_official(official, tmp_path / "out")
    reference = vectors("dinosaur_eval")
    slots, attention = network.assign(reference["features"].float(), 6, reference["noise"].float())
    assert_close(slots, reference["slots.f32"], rtol=1e-5, atol=1e-5)
    assert_close(attention, reference["attn.f32"], rtol=1e-5, atol=1e-5)


def test_official_sizes_come_from_the_tensors(official, tmp_path, vectors):
    config = convert(vectors("dinosaur_state")).config
    assert (config.feature_dim, config.hidden_dim, config.slot_dim) == (32, 64, 16)
    assert (config.ffn_dim, config.grid_hw) == (64, (6, 6))
    assert config.decoder == DecoderConfig(num_layers=2, num_heads=4, ffn_dim=64)
    export_official(official, tmp_path / "out")
    assert OCPruner.from_pretrained(tmp_path / "out").decoder is None


def _drop(state):
    del state["aggregat.gru.weight_hh"]


def _rename(state):
    state["aggregat.surprise"] = state.pop("aggregat.gru.weight_hh")


def _reshape(state):
    state["aggregat.gru.weight_hh"] = torch.zeros(3, 3)


def _no_grid(state):
    state["decode.posit_embed._pe"] = torch.zeros(1, 35, 32)


def _empty(state):
    state.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, "missing .*attention.gru.weight_hh"),
        (_rename, "unknown entries.*aggregat.surprise"),
        (_reshape, "size mismatch"),
        (_no_grid, "35 tokens, which is no square grid"),
        (_empty, "missing"),
    ],
)
def test_other_state_dicts_are_refused(tmp_path, vectors, change, message):
    state = dict(vectors("dinosaur_state"))
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        export_official(tmp_path / "weights.pth", tmp_path / "out")
    assert _folder_is_unwritten(tmp_path / "out")


class _Bomb:
    """Unpickling this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["code", "garbage", "missing", "list", "truncated"])
@pytest.mark.parametrize("export", [export_official, export_checkpoint])
def test_hostile_files_do_nothing(tmp_path, vectors, export, kind):
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"
    if kind == "code":
        torch.save({"x": _Bomb(trace)}, path)
    elif kind == "garbage":
        path.write_bytes(b"\x00\x01 no such format")
    elif kind == "list":
        torch.save([torch.zeros(2)], path)
    elif kind == "truncated":
        torch.save(dict(vectors("dinosaur_state")), path)
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="weights.pth"):
        export(path, tmp_path / "out")
    assert _folder_is_unwritten(tmp_path / "out")
    assert not trace.exists()


def test_a_plain_pickle_is_refused(tmp_path):
    path, trace = tmp_path / "model.ckpt", tmp_path / "trace"
    path.write_bytes(pickle.dumps(_Bomb(trace)))
    with pytest.raises(ValueError, match="never loaded"):
        export_checkpoint(path, tmp_path / "out")
    assert not trace.exists()


@pytest.mark.parametrize(("name", "told"), [("no.ckpt", "does not exist"), ("", "is a folder")])
def test_errors_on_the_command_line_are_one_line(name, told, tmp_path, capsys):
    status = main(["export", "--checkpoint", str(tmp_path / name), "--output", str(tmp_path)])
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert told in captured.err


def test_round_trip(small_network, tmp_path):
    small_network.config = replace(small_network.config, training={"steps": 3, "loss": 0.5})
    small_network.save_pretrained(tmp_path / "out")
    again = OCPruner.from_pretrained(tmp_path / "out")
    assert again.config == small_network.config
    assert not again.training
    state, saved = small_network.state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    assert state.keys() == saved.keys()
    for name, value in state.items():
        assert_close(again.state_dict()[name], value, rtol=0, atol=0)
    features = torch.randn(2, 16, 8)
    assert_close(again.assign(features, 40), small_network.assign(features, 40), rtol=0, atol=0)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"format_version", "tower", "layer", "grid_hw", "preprocessing", "num_slots"}
    assert expected <= settings.keys()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "build_pruner" in card
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_push_to_hub_uploads_the_same_three_files(small_network, monkeypatch):
    from huggingface_hub import hub_mixin

    uploaded = []

    class Hub:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, repo_id, **kwargs):
            self.repo_id = repo_id
            return self

        def upload_folder(self, folder_path, **kwargs):
            uploaded.extend(p.name for p in Path(folder_path).iterdir())
            return "commit"

    monkeypatch.setattr(hub_mixin, "HfApi", Hub)
    assert small_network.push_to_hub("me/pruner", token="secret") == "commit"
    assert sorted(uploaded) == ["README.md", "config.json", "model.safetensors"]


def test_the_pruner_reads_the_artifact(small_network, tmp_path):
    small_network.save_pretrained(tmp_path / "out")
    pruner = ocvtp.build_pruner("ocvtp", num_keep=4, checkpoint=str(tmp_path / "out"))
    assert pruner.needs.hidden == (3,)


def test_without_decoder_keeps_the_rest(small_network):
    config = replace(small_network.config, decoder=DecoderConfig(num_layers=1, num_heads=2))
    network = OCPruner(config).eval()
    bare = network.without_decoder()
    assert bare.decoder is None
    features = torch.randn(1, 16, 8)
    assert_close(bare.assign(features, 5), network.assign(features, 5), rtol=0, atol=0)


def _write(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda d: (d / "config.json").write_text("{"), "cannot read.*damaged.*`ocvtp export`"),
        (lambda d: (d / "config.json").write_text("[" * 100_000), "cannot read.*damaged"),
        (lambda d: (d / "config.json").write_text("[]"), "lacks"),
        (lambda d: _write(d, format="other"), "not the export of an OC-pruner"),
        (lambda d: _write(d, format_version=99), "format_version is 99.*upgrade ocvtp"),
        (lambda d: _write(d, colour="red"), "unknown settings .'colour'"),
        (lambda d: _write(d, slot_dim="many"), "does not hold an OC-pruner"),
        (lambda d: _write(d, slot_dim=5), "does not fit config.json; make.*size mismatch"),
        (lambda d: _write(d, slot_dim=10**12), "does not hold an OC-pruner"),
        (lambda d: _write(d, num_iterations=0), "at least 1"),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"123"),
            "cannot read.*damaged.*`ocvtp export`",
        ),
        (lambda d: save_file({"x": torch.zeros(2)}, d / "model.safetensors"), "Missing key"),
    ],
)
def test_damaged_artifacts_give_one_clear_error(small_network, tmp_path, damage, message):
    small_network.save_pretrained(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        OCPruner.from_pretrained(tmp_path / "out")


def test_a_name_that_is_nothing(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a model id.*pass a folder"):
        OCPruner.from_pretrained(str(tmp_path / "nowhere"))


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    from ocvtp.reporting import files

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(files.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"), files.replacing(tmp_path / "file") as temporary:
        temporary.write_bytes(b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"
