"""Shards of features and their manifest."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ocvtp.data.feature_files import (
    Manifest,
    ShardWriter,
    claim,
    describe_shard,
    differences,
    ends,
    shard_name,
    tensor_key,
    tensor_name,
    verify_shard,
    weights_hash,
)

META = {"images": '[[1, "a.png"], [2, "b.png"]]', "skipped": '["c.png: no image"]'}


def write(path, **tensors):
    with ShardWriter(path, dict(META)) as writer:
        for name, values in tensors.items():
            for part in values.split(1):
                writer.add(name, part)
    return path


def some_tensors():
    torch.manual_seed(0)
    return {
        "instances": torch.arange(7).to(torch.uint8),
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(2, 3, 2).bfloat16(),
        "counts": torch.arange(4, dtype=torch.int32)[:, None],
        "full": torch.randn(3),
    }


def test_a_shard_is_a_file_of_safetensors(tmp_path):
    """Whatever parts it grew of; every tensor lies at a multiple of its own width."""
    wanted = some_tensors()
    path = write(tmp_path / "new" / "x.safetensors", **wanted)
    found = load_file(path)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype
        assert torch.equal(found[name], values), name
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    del header["__metadata__"]
    for name, entry in header.items():
        start = 8 + length + entry["data_offsets"][0]
        assert start % wanted[name].element_size() == 0, name
    described = describe_shard(path)
    assert len(described.pop("sha256")) == 64
    assert described == {
        "file": "x.safetensors",
        "bytes": path.stat().st_size,
        "images": [[1, "a.png"], [2, "b.png"]],
        "skipped": ["c.png: no image"],
    }


def test_nothing_is_left_of_a_shard_that_was_not_finished(tmp_path):
    def stopped():
        with ShardWriter(tmp_path / "x", dict(META)) as writer:
            writer.add("full", torch.ones(3))
            raise KeyboardInterrupt

    pytest.raises(KeyboardInterrupt, stopped)
    assert not list(tmp_path.iterdir())
    left = tmp_path / ".x.0123.tmp"  # of a process that was killed while it renamed
    other = tmp_path / ".y.0123.tmp"
    left.write_bytes(b"half")
    other.write_bytes(b"of another rank")
    write(tmp_path / "x", full=torch.ones(2))
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "x", other])


@pytest.mark.parametrize("at", ["grow", "put together"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, at):
    def full(*_):
        raise OSError(28, "No space left on device")

    if at == "grow":
        monkeypatch.setattr("ocvtp.data.feature_files._bytes", full)
    else:
        monkeypatch.setattr("ocvtp.data.feature_files.copyfileobj", full)
    with pytest.raises(ValueError, match=r"x cannot be written \(No space left .*: it continues"):
        write(tmp_path / "x", full=torch.ones(9))
    assert not list(tmp_path.iterdir())


def test_a_truncated_shard_is_an_error(tmp_path):
    path = write(tmp_path / "x", full=torch.ones(9))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="no whole shard of features"):
        describe_shard(path)


SETTINGS = {
    "tower": {"id": "t", "layout": "grid", "grid_hw": [2, 3]}, "views": ["plain"],
    "needs": {"hidden": [2], "attention": [[1, "cls"]], "cls": False, "of a newer version": 3},
    "num_heads": None, "splits": {"train": {"instances": False}},
}  # fmt: skip


def finished(folder):
    path = write(folder / shard_name("train", 0), full=torch.ones(9))
    manifest = Manifest(folder, copy.deepcopy(SETTINGS), {"train": [describe_shard(path)]})
    manifest.write()
    return manifest


def test_a_manifest_comes_back(tmp_path):
    manifest = finished(tmp_path)
    found = Manifest.read(tmp_path)
    assert found == manifest
    assert (found.num_images("train"), found.num_images("validation")) == (2, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "holds no features"),
        (
            lambda f: ((f / "manifest.json").unlink(), claim_new(f)),
            "holds unfinished features .*; continue `ocvtp extract",
        ),
        (lambda f: (f / "manifest.json").write_text("{"), "no manifest of features"),
        (lambda f: (f / "manifest.json").write_text("[1]"), "no manifest of features"),
        (lambda f: (f / "manifest.json").write_text("{}"), "no manifest of features"),
        (
            lambda f: (f / "manifest.json").write_text('{"format":2,"settings":{},"shards":{}}'),
            "its format is 2, and this version of ocvtp reads 1",
        ),
        (lambda f: (f / shard_name("train", 0)).unlink(), r"train-00000.safetensors is missing"),
        (lambda f: (f / shard_name("train", 0)).write_bytes(b"x"), "has 1 bytes, not"),
    ],
)
def test_what_is_not_whole_is_refused(tmp_path, damage, message):
    finished(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("tower", "grid_hw"), [10**9, 10**9], "tower.grid_hw=.* at most 16384"),
        (("tower", "layout"), "foo", "tower.layout='foo'; pass one of grid"),
        (("needs", "hidden"), [], "IndexError"),
        (("needs", "attention"), [[1, "x"]], "attention="),
        (("views",), "plain", "views='plain'"),
        (("views",), [], "IndexError"),
        (("splits", "train"), {"instances": 1}, "splits.train.instances=1; pass true or false"),
        (("num_heads",), "x", "num_heads='x'"),
    ],
)
def test_settings_are_held_to_their_types(tmp_path, where, value, message):
    manifest = finished(tmp_path)
    holder = manifest.settings
    for name in where[:-1]:
        holder = holder[name]
    holder[where[-1]] = value
    manifest.write()
    with pytest.raises(ValueError, match=f"no manifest of features that can be read .*{message}"):
        Manifest.read(tmp_path)


def claim_new(folder):
    (folder / "extraction.json").write_text("{}")


def test_a_folder_is_continued_with_the_same_settings_alone(tmp_path):
    settings = {"tower": {"id": "a", "grid_hw": (2, 2)}, "dtype": "float16"}
    claim(tmp_path, settings)
    claim(tmp_path, settings)
    other = {"tower": {"id": "b", "grid_hw": (2, 2)}, "dtype": "float32"}
    with pytest.raises(
        ValueError, match=r'tower\.id is "a" there and "b" here; dtype is "float16"'
    ):
        claim(tmp_path, other)
    elsewhere = tmp_path / "other"
    write(elsewhere / "model.safetensors", full=torch.ones(1))
    with pytest.raises(ValueError, match="came from elsewhere"):
        claim(elsewhere, settings)


def test_differences_name_their_parts():
    told = list(differences("", {"a": 1, "b": {"c": [1]}}, {"b": {"c": [2], "d": "x" * 200}}))
    assert told[0] == "a is 1 there and null here"
    assert told[1] == "b.c is [1] there and [2] here"
    assert told[2].startswith('b.d is null there and "xxx')
    assert len(told[2]) < 150


@pytest.mark.parametrize(("kind", "key"), [("hidden", 9), ("attention", (22, "cls"))])
def test_names_of_tensors(kind, key):
    assert tensor_key(tensor_name(kind, key)) == (kind, key)


def test_the_hash_of_weights_sees_values_names_and_kinds():
    def linear(seed, dtype=torch.float32):
        torch.manual_seed(seed)
        return torch.nn.Linear(3, 2).to(dtype)

    hashes = {weights_hash(m) for m in (linear(0), linear(1), linear(0, torch.bfloat16))}
    hashes.add(weights_hash(torch.nn.Sequential(linear(0))))
    assert len(hashes) == 4
    assert weights_hash(linear(0)) == weights_hash(linear(0))


def test_ends():
    assert ends([2, 0, 3]).tolist() == [0, 2, 2, 5]


def test_a_changed_shard_is_found(tmp_path):
    """By its values, and by its manifest; one without hashes is told apart."""
    path = write(tmp_path / "x.safetensors", **some_tensors())
    described = describe_shard(path)
    verify_shard(path, described)
    assert (
        describe_shard(write(tmp_path / "again", **some_tensors()))["sha256"]
        == (described["sha256"])
    )
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"not as it was written \(instances differs\)"):
        verify_shard(path, described)
    other = some_tensors()
    other["full"][1] += 1
    write(path, **other)
    with pytest.raises(ValueError, match=r"\(what the manifest says of it differs\)"):
        verify_shard(path, described)
    save_file({"full": torch.ones(2)}, path, metadata=META)
    assert "sha256" not in describe_shard(path)
    with pytest.raises(ValueError, match="without hashes"):
        verify_shard(path, describe_shard(path))
