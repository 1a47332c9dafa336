"""Visual tokens, stored and read again."""

import torch
from torch.testing import assert_close

from ocvtp.data.feature_files import Manifest, ShardWriter, describe_shard
from ocvtp.data.features import FeatureImages, put_together
from ocvtp.encoders.clip import CLIPEncoder
from ocvtp.structures import Needs, VisualTokens
from ocvtp.training.features import stored_rows, stored_tokens

NEEDS = Needs(hidden=(-2, 3), attention=((-1, "cls"), (2, "received")), keys=(-2,), cls=True)
STORED = Needs(hidden=(5, 3), attention=((5, "cls"), (2, "received")), keys=(4,), cls=True)


def some_tokens(has_cls):
    torch.manual_seed(0)
    per_token = {kind: torch.randn(3, 6, 8) for kind in ("a", "b", "keys")}
    more = {}
    if has_cls:
        more = {name: {-2: torch.randn(3, 8)} for name in ("cls_keys", "cls_queries")}
        more["cls"] = torch.randn(3, 8)
    return VisualTokens(
        features=per_token["a"],
        grid_hw=(2, 3),
        hidden={-2: per_token["a"], 3: per_token["b"]},
        attention={key: torch.rand(3, 6) for key in NEEDS.attention},
        keys={-2: per_token["keys"]},
        num_heads=2,
        **more,
    )


def test_numbers_are_counted_from_the_start():
    encoder = CLIPEncoder("random:tiny", layer=2)
    assert encoder.resolved(NEEDS) == STORED


def read_again(folder, views, dtype):
    """The views of three images, through a file."""
    path = folder / "x.safetensors"
    metadata = {"images": '[[0, "a"], [1, "b"], [2, "c"]]', "skipped": "[]"}
    with ShardWriter(path, metadata) as writer:
        for name, values in stored_rows(views, NEEDS, STORED, dtype):
            writer.add(name, values)
        writer.add("image_sizes", torch.ones(3 * len(views), 2, dtype=torch.int32))
    settings = {
        "tower": {"layout": "grid", "grid_hw": [2, 3]},
        "views": ["plain", "flip"][: len(views)],
        "num_heads": 2,
        "needs": {"hidden": [*STORED.hidden]},
        "splits": {},
    }
    images = FeatureImages(Manifest(folder, settings, {"train": [describe_shard(path)]}), "train")
    for view in range(len(views)):
        items = [images[image, view] for image in range(3)]
        yield stored_tokens(put_together(items, settings)["tokens"], NEEDS, STORED)


def test_tokens_come_back_as_they_were(tmp_path):
    """Under the names that were asked for; every field, of every view."""
    first = some_tokens(has_cls=True)
    second = first.map(lambda values: values + 1)
    for found, wanted in zip(
        read_again(tmp_path, [first, second], torch.float32), [first, second], strict=True
    ):
        assert found.missing(NEEDS) == []
        assert (found.grid_hw, found.num_heads) == ((2, 3), 2)
        assert_close(found.features, wanted.features, rtol=0, atol=0)
        for name in ("hidden", "attention", "keys", "cls_keys", "cls_queries", "cls"):
            assert_close(getattr(found, name), getattr(wanted, name), rtol=0, atol=0)


def test_towers_without_a_cls_have_none(tmp_path):
    needs = Needs(hidden=NEEDS.hidden, keys=NEEDS.keys)
    stored = Needs(hidden=STORED.hidden, keys=STORED.keys)
    tokens = some_tokens(has_cls=False)
    names = {name for name, _ in stored_rows([tokens], needs, stored, torch.float16)}
    assert names == {"grids", "hidden.5", "hidden.3", "keys.4"}
    values = {"hidden": {5: tokens.hidden[-2], 3: tokens.hidden[3]}, "keys": {4: tokens.keys[-2]}}
    empty = dict.fromkeys(("attention", "cls_keys", "cls_queries", "cls"), {})
    found = stored_tokens({**values, **empty, "grid_hw": (2, 3)}, needs, stored)
    assert (found.cls, found.cls_keys, found.attention) == (None, {}, {})
