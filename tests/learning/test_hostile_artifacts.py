"""What an artifact says is compared with what it holds before anything is made of it."""

from __future__ import annotations

import json
import struct
import time
import zipfile
from dataclasses import asdict, dataclass
from functools import partial

import pytest
import small_networks
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ocvtp.export import export_checkpoint, export_official
from ocvtp.learning import NetworkConfig, PrunerNetwork, Sizes, artifact
from ocvtp.slots import OCPruner, OCPrunerConfig
from ocvtp.slots.decoder import DecoderConfig
from ocvtp.slots.tensor_file import load_tensors


def made(name: str) -> PrunerNetwork:
    if name == "decoder":
        sizes = {"hidden_dim": 16, "slot_dim": 4, "ffn_dim": 8, "noise_rows": 32}
        decoder = DecoderConfig(num_layers=1, num_heads=2, ffn_dim=8)
        return OCPruner(OCPrunerConfig(**sizes, feature_dim=8, layer=3, decoder=decoder)).eval()
    if name == "slots":
        return small_networks.selector("llm_input", 8, "slots")
    return small_networks.network_setting(name, 8)["network"]


@pytest.fixture
def saved(tmp_path):
    """Saves one of a name, and changes what config.json says: `a.b` is b within a."""

    networks, configs = {}, {}

    def save(name, changes):
        path = tmp_path / name / "config.json"
        if name not in networks:
            networks[name] = made(name)
            networks[name].save_pretrained(tmp_path / name)
            configs[name] = path.read_text()
        config = json.loads(configs[name])
        for key, value in changes.items():
            *groups, last = key.split(".")
            place = config
            for group in groups:
                place = place[group]
            place[last] = value
        path.write_text(json.dumps(config))
        return type(networks[name]), tmp_path / name

    return save


@pytest.mark.parametrize("name", ["decoder", "slots", *small_networks.TRAINED])
def test_what_was_not_changed_is_read(saved, name):
    kind, folder = saved(name, {})
    network = kind.from_pretrained(folder)
    assert all(tensor.device.type == "cpu" for tensor in network.state_dict().values())
    kept = load_file(folder / "model.safetensors")
    assert all(network.state_dict()[key].equal(value) for key, value in kept.items())


ALL = {
    "layer": ["9", 999, 1.5, True, [3]],
    "layout": ["foo", 1],
    "grid_hw": [[-1, -1], [5], [4, 4, 4], "44", [4, 4.5], [10**6, 10**6], 4],
    "num_slots": [[-4], [0], ["8"], 8, [True], [10**12]],
    "tower": [5, ["a"], {}],
    "objective": [7, None],
    "preprocessing": [[1], "x"],
    "training": [5, None],
}
OF_ONE = {
    "decoder": {
        "noise_rows": [10**12, 10**6, -1, "32"],
        "noise_seed": [-1, 2**64, 0.5],
        "feature_dim": [10**9, 10**5, 0, -8, 8.0, "8"],
        "hidden_dim": [10**7, 10**6, 0],
        "slot_dim": [0, -1, 10**6, True],
        "ffn_dim": [0, 10**6],
        "num_iterations": [10**9, 0, 2.5, "3"],
        "dropout": [-0.1, 2, "a", None],
        "truncation": ["foo", 3],
        "frozen_queries": [1, "true"],
        "standardize": [1, True],  # True: it would hold statistics, which are not there
        "choice": ["foo", "restore"],
        "target_layer": ["x", 999, -3],  # -3: as with standardize
        "decoder": ["hello", 3, [], {"kind": "foo"}, {"layers": 3}],
        "decoder.num_layers": [10**6, 900, 0, -1, 1.5],
        "decoder.num_heads": [0, 3, 10**9],
        "decoder.ffn_dim": [10**6, 0],
        "decoder.prefix_fraction": [2, "a"],
    },
    "surprise": {
        "feature_dim": [10**9, 10**6],
        "sizes": [None, [], "x", {"colour": 3}],
        "sizes.hidden_dim": [10**7, 10**5, 0, 4.0],
        "sizes.reach": [10**9, 1000, 0],
    },
    "learned": {
        "scorer": [5, "no such", None],
        "sizes": [[], "x", {"colour": 3}],
        "sizes.dim": [10**9, 10**5, 0, "16", 16.0],
        "widths": [[], 3, {"projected": 8}],
        "widths.projected": [10**9, 10**5, -1, 8.5],
        "stage": ["foo", 3],
        "positions": ["foo"],
        "choice": ["foo", {"mmr": 2}, 3],
        "losses": [[]],
        "host": ["x"],
    },
}
OF_ONE["slots"] = {
    "sizes.layer": [999, "3"],
    "sizes.num_slots": [0, -1, 2.5],
    "sizes.num_iterations": [10**9, 0, True],
    "sizes.noise_rows": [10**12, 10**6],
}
CASES = [
    (kind, field, value)
    for kind in OF_ONE
    for field, values in {**ALL, **OF_ONE[kind]}.items()
    for value in values
]


@pytest.mark.slow
def test_every_wrong_field_is_refused_at_once(saved):
    """In one test, as each takes milliseconds."""
    started = time.process_time()
    for name, field, value in CASES:
        kind, folder = saved(name, {field: value})
        with pytest.raises(ValueError, match="does not hold") as refused:
            kind.from_pretrained(folder)
        text = str(refused.value)
        assert "\n" not in text, text
        assert len(text) < 1000, text
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "decoder",
            {"layer": "9"},
            "layer='9'; pass a whole number, at least -256 and at most 256",
        ),
        ("decoder", {"layout": "foo"}, "layout='foo'; pass one of grid, variable, joint, per_tile"),
        ("decoder", {"grid_hw": [5]}, r"grid_hw=\[5\]; pass a list of 2: each a whole number"),
        ("decoder", {"tower": 5}, "tower=5; pass a text or null"),
        ("decoder", {"decoder.num_layers": 900}, "asks for more layers than model.safetensors"),
        ("surprise", {"sizes.reach": 0}, "reach=0; pass a whole number, at least 1"),
        ("learned", {"widths": 3}, "widths=3; pass a mapping"),
        ("learned", {"tower": ["a" * 9999]}, "tower=.{0,200}; pass a text or null"),
    ],
)
def test_the_message_says_what_may_be_passed(saved, name, changes, message):
    kind, folder = saved(name, changes)
    with pytest.raises(ValueError, match=message):
        kind.from_pretrained(folder)


@pytest.mark.parametrize("name", ["decoder", "surprise", "learned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_must_be_finite(saved, name, value):
    kind, folder = saved(name, {})
    weights = load_file(folder / "model.safetensors")
    key = next(k for k, v in weights.items() if v.is_floating_point())
    weights[key].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"'{key}' has numbers that are not finite"):
        kind.from_pretrained(folder)


def test_numbers_of_a_config_must_be_finite(saved):
    kind, folder = saved("decoder", {"training": {"loss": float("nan")}})
    with pytest.raises(ValueError, match="config.json is damaged .it holds NaN"):
        kind.from_pretrained(folder)


def test_a_config_of_megabytes_is_none(saved):
    kind, folder = saved("decoder", {"tower": "a" * 5_000_000})
    with pytest.raises(ValueError, match="it has more than 4194304 bytes"):
        kind.from_pretrained(folder)


def header(**tensors):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<Q", 2**60),
        header(x={"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}),
        header(x={"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}),
        header(x={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}) + b"\0" * 7,
        header(x={"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}) + b"\0" * 4,
    ],
)
def test_a_header_that_lies_is_damaged(saved, data):
    kind, folder = saved("decoder", {})
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        kind.from_pretrained(folder)


@dataclass(frozen=True)
class LookingSizes(Sizes):
    dim: int = 4


class Looking(PrunerNetwork):
    """Its constructor reads a number of a tensor, which needs memory."""

    format = "tests.looking"
    sizes_class = LookingSizes

    def __init__(self, config):
        super().__init__(config)
        wide = int(torch.linspace(1, config.sizes.dim, 3)[2].item())
        self.linear = nn.Linear(config.feature_dim, wide)


def test_a_network_that_looks_at_numbers_when_built_is_read_too(tmp_path):
    network = Looking(NetworkConfig(sizes=LookingSizes(), feature_dim=3, layer=1))
    network.save_pretrained(tmp_path)
    assert Looking.from_pretrained(tmp_path).linear.weight.equal(network.linear.weight)


def checkpoint_of(network, **kept):
    own = {"format": network.format, "config": asdict(network.config), "training": {}} | kept
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    return {"ocvtp": own, "state_dict": state}


def nest(depth):
    found = [0.5] * 10
    for _ in range(depth):
        found = [found] * 10
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["state_dict"]["network.encode.1.bias"].fill_(float("nan")), "not finite"),
        (lambda c: c["ocvtp"]["config"].update(noise_rows=10**6), "asks for more|size mismatch"),
        (lambda c: c["ocvtp"].update(training={"x": nest(9)}), "more than 100000 values"),
        (lambda c: c["ocvtp"].update(training=3), "training=3; pass a mapping"),
        (lambda c: c["ocvtp"]["config"].update(layout="foo"), "layout='foo'"),
        (lambda c: c["ocvtp"].pop("config"), "config"),
        (lambda c: c["ocvtp"].update(config=3), "."),
        (lambda c: c.update(state_dict=3), "."),
        (lambda c: c["state_dict"].update({"network.x": "text"}), "."),
        (
            lambda c: c["state_dict"].update(
                {"network.encode.0.weight": torch.zeros(1).expand(10**12)}
            ),
            "'network.encode.0.weight' says that it is larger",
        ),
    ],
)
def test_checkpoints_are_held_to_the_same(tmp_path, change, message):
    content = checkpoint_of(made("decoder"))
    torch.save(content, tmp_path / "good.ckpt")
    assert export_checkpoint(tmp_path / "good.ckpt", tmp_path / "good").decoder is None
    change(content)
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=message):
        export_checkpoint(tmp_path / "bad.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_official_weights_must_be_finite(tmp_path, vectors):
    state = {name: tensor.clone() for name, tensor in vectors("dinosaur_state").items()}
    state["aggregat.norm_in.weight"][0] = float("inf")
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="not finite"):
        export_official(tmp_path / "weights.pth", tmp_path / "out")


def test_a_packed_checkpoint_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"x": torch.zeros(10**6)}, tmp_path / "whole")
    with zipfile.ZipFile(tmp_path / "whole") as whole:
        entries = {info.filename: whole.read(info) for info in whole.infolist()}
    with zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in entries.items():
            packed.writestr(name, data)
    assert load_tensors(tmp_path / "whole")["x"].numel() == 10**6
    with pytest.raises(ValueError, match="packed is damaged, or holds more"):
        load_tensors(tmp_path / "packed")


def test_an_outline_draws_no_numbers():
    """Else reading an artifact would change what a seed gives."""
    network, state = made("decoder"), torch.get_rng_state()
    weights = artifact.Weights.of_tensors(network.state_dict())
    refused = partial(OCPruner, OCPrunerConfig(feature_dim=8))
    with pytest.raises(ValueError, match="does not fit"):
        artifact.restore(refused, weights)
    assert torch.get_rng_state().equal(state)
