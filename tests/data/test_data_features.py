"""Features in the place of images: items, batches, orders."""

import json
from copy import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from ocvtp.data.feature_files import Manifest, ShardWriter, describe_shard, shard_name
from ocvtp.data.features import FeatureDataModule, FeatureImages, FeatureSampler, put_together
from ocvtp.data.loader import ResumableLoader, StreamSampler
from ocvtp.structures import Needs

TOWER = {"id": "t", "layout": "grid", "grid_hw": [2, 3], "preprocessing": {"size": 4}}
NEEDS = {"hidden": [2], "attention": [[1, "cls"]], "keys": [1], "cls_queries": [],
         "patch_queries": False, "cls": False, "projected": False, "text": False,
         "clip": False}  # fmt: skip


def written(folder, shards, grids, views=("plain",), layout="grid", instances=True):
    """A folder of features whose values say the image, the view and the token.

    Args:
        shards: images of each. grids: of every image, [V, 2].
    """
    first, described = 0, []
    for number, count in enumerate(shards):
        images = [[10 + i, f"/photos/{i}.jpg"] for i in range(first, first + count)]
        metadata = {"images": json.dumps(images), "skipped": "[]"}
        path = folder / shard_name("train", number)
        with ShardWriter(path, metadata) as writer:
            for image in range(first, first + count):
                for view in range(len(views)):
                    add_row(writer, image, view, torch.tensor(grids[image]), instances)
        described.append(describe_shard(path))
        first += count
    settings = {
        "tower": TOWER | {"layout": layout},
        "needs": NEEDS,
        "num_heads": 2,
        "views": list(views),
        "splits": {"train": {"instances": instances}},
    }
    manifest = Manifest(folder, settings, {"train": described})
    manifest.write()
    return manifest


def add_row(writer, image, view, grids, instances):
    count = int(grids.prod(dim=1).sum())
    values = image * 100 + view * 50 + torch.arange(count, dtype=torch.float32)
    writer.add("hidden.2", values[:, None].half())
    writer.add("keys.1", -values[:, None].half())
    writer.add("attention.1.cls", values / 7)
    writer.add("cls_keys.1", torch.full((1, 4), float(image)).half())
    writer.add("grids", grids[None].int())
    writer.add("image_sizes", torch.tensor([[image + 1, view + 1]], dtype=torch.int32))
    if instances:
        ids = torch.full((image + 1, 2), image % 3, dtype=torch.uint8)
        writer.add("instances", ids.flatten())
        writer.add("instance_sizes", torch.tensor([ids.shape], dtype=torch.int32))


GRID = [[[2, 3]]] * 9
PACKED = [[[2, 3], [i % 2, 2]] for i in range(9)]


def test_an_item_is_its_own_rows(tmp_path):
    """Of ragged images in several shards, and of every view."""
    images = FeatureImages(written(tmp_path, [4, 3, 2], PACKED, ("plain", "flip")), "train")
    assert len(images) == 9
    for index in [(0, 0), (3, 1), (4, 0), (6, 1), (8, 1), 5]:
        image, view = index if isinstance(index, tuple) else (index, 0)
        item = images[index]
        count = 6 + 2 * (image % 2)
        start = image * 100 + view * 50
        assert item["hidden"][2][:, 0].tolist() == list(range(start, start + count))
        assert item["hidden"][2].dtype == torch.float16
        assert item["attention"][1, "cls"].dtype == torch.float32
        assert (item["keys"][1][0, 0], len(item["keys"][1])) == (-start, count)
        assert item["cls_keys"][1].tolist() == [image] * 4
        assert item["grids"].tolist() == PACKED[image]
        assert item["image_size"] == (image + 1, view + 1)
        assert (item["image_id"], item["path"]) == (10 + image, f"/photos/{image}.jpg")
        assert item["instances"].shape == (image + 1, 2)
        assert item["instances"].unique().tolist() == [image % 3]
    for wrong in (9, -1, (0, 2)):
        with pytest.raises(IndexError):
            images[wrong]
    assert copy(images)[3]["image_id"] == 13  # as processes that load get it


WRONG = [
    ({"hidden.2": None}, r"hidden\.2 is not there"),
    ({"instances": None}, "instances is not there"),
    ({"grids": None}, "grids"),
    ({"grids": torch.full((5, 1, 2), -1)}, "grids are no heights and widths"),
    ({"grids": torch.full((5, 1, 2), 2**31 - 1)}, "grids are no heights and widths"),
    ({"grids": torch.full((4, 1, 2), 2)}, r"grids has shape \[4, 1, 2\], not \[5, -1, 2\]"),
    ({"grids": torch.full((5, 1, 2), 4)}, r"\.\S+ has shape \[30.*\], not \[80"),
    ({"hidden.2": torch.zeros(30)}, r"hidden\.2 has shape \[30\], not \[30, -1\]"),
    ({"hidden.2": torch.zeros(30, 7)}, "of other widths than those of another shard"),
    ({"attention.1.cls": torch.zeros(29)}, r"attention\.1\.cls has shape \[29\], not \[30\]"),
    ({"cls_keys.1": torch.zeros(4, 4)}, r"cls_keys\.1 has shape \[4, 4\], not \[5, -1\]"),
    ({"instance_sizes": torch.ones(5, 2, dtype=torch.int32)}, r"instances has shape .*\[5\]"),
    ({"hidden.x": torch.zeros(30, 1)}, "invalid literal"),
]


def test_shards_that_hold_something_else_are_refused(tmp_path):
    manifest = written(tmp_path, [4, 5], GRID)
    path = tmp_path / shard_name("train", 1)
    whole = load_file(path)
    for changes, message in WRONG:
        save_file({k: v for k, v in {**whole, **changes}.items() if v is not None}, path)
        images = FeatureImages(manifest, "train")
        assert images[0]["image_id"] == 10
        with pytest.raises(ValueError, match=rf"train-00001\S+ is no whole shard .*{message}"):
            images[5]


def test_another_grid_than_the_towers_is_refused(tmp_path):
    manifest = written(tmp_path, [9], [[[2, 3]]] * 8 + [[[3, 2]]])
    images = FeatureImages(manifest, "train")
    put_together([images[0]], manifest.settings)
    with pytest.raises(ValueError, match=r"of grids .*, and their tower has \(2, 3\)"):
        put_together([images[0], images[8]], manifest.settings)


def test_a_batch_of_one_grid(tmp_path):
    manifest = written(tmp_path, [4, 5], GRID, instances=False)
    images = FeatureImages(manifest, "train")
    batch = put_together([images[i] for i in (1, 7)], manifest.settings)
    tokens = batch["tokens"]
    assert tokens["hidden"][2].shape == (2, 6, 1)
    assert tokens["attention"][1, "cls"].shape == (2, 6)
    assert tokens["cls_keys"][1].tolist() == [[1] * 4, [7] * 4]
    assert (tokens["grid_hw"], tokens["num_heads"]) == ((2, 3), 2)
    assert not {"valid", "grids"} & tokens.keys()
    assert batch["image_ids"] == [11, 17]
    assert batch["paths"] == batch["file_names"] == ["/photos/1.jpg", "/photos/7.jpg"]
    assert batch["image_sizes"] == [(2, 1), (8, 1)]
    assert batch["errors"] == []
    assert "instances" not in batch


def test_batches_of_other_layouts_are_padded(tmp_path):
    """As their encoders do: tiles always, images of any shape where they differ."""
    manifest = written(tmp_path / "joint", [9], PACKED, layout="joint")
    items = [FeatureImages(manifest, "train")[i] for i in (0, 1)]
    tokens = put_together(items, manifest.settings)["tokens"]
    assert tokens["valid"].tolist() == [[True] * 6 + [False] * 2, [True] * 8]
    assert tokens["grids"].tolist() == PACKED[:2]
    assert tokens["hidden"][2][0, 6:].abs().max() == 0
    assert put_together(items[:1], manifest.settings)["tokens"]["valid"].all()
    grids = [[[1 + i % 2, 3]] for i in range(9)]
    manifest = written(tmp_path / "variable", [9], grids, layout="variable")
    images = FeatureImages(manifest, "train")
    mixed = put_together([images[0], images[1]], manifest.settings)["tokens"]
    assert (mixed["grid_hw"], mixed["grids"].tolist()) == ((2, 3), grids[:2])
    assert mixed["valid"].sum(dim=1).tolist() == [3, 6]
    alike = put_together([images[0], images[2]], manifest.settings)["tokens"]
    assert alike["grid_hw"] == (1, 3)
    assert not {"valid", "grids"} & alike.keys()


# ------------------------------------------------------------------ orders


@pytest.fixture
def many(tmp_path):
    """Thirty images in ten shards."""
    return FeatureImages(written(tmp_path, [3] * 10, GRID[:1] * 30, instances=False), "train")


def order(sampler, epoch=0, first=0):
    sampler.seek(epoch, first)
    return list(sampler)


def test_few_shards_are_shuffled_as_images_are(many):
    for mixed in (10, 99):
        assert order(FeatureSampler(many, 4, mixed), 2) == order(StreamSampler(many, 4), 2)


def test_few_shards_are_read_at_a_time(many):
    orders = [order(FeatureSampler(many, 0, 4), epoch) for epoch in range(3)]
    assert len({tuple(o) for o in orders}) == 3
    for found in orders:
        assert sorted(found) == list(range(30))
        shards = [image // 3 for image in found]
        groups = [set(shards[i : i + 12]) for i in (0, 12, 24)]
        assert [len(group) for group in groups] == [4, 4, 2]
        assert shards[:12] != sorted(shards[:12])  # mixed among each other
    assert order(FeatureSampler(many, 0, 4), 1) == orders[1]


@pytest.mark.parametrize("mixed", [2, 10])
def test_processes_share_the_images(many, monkeypatch, mixed):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        shares.append(order(FeatureSampler(many, 0, mixed)))
    assert [len(share) for share in shares] == [7] * 4
    assert len({image for share in shares for image in share}) == 28
    if mixed == 2:  # all of them read the same shards
        assert len({image // 3 for share in shares for image in share[:1]}) <= 2


def test_each_epoch_draws_one_view_of_every_image(tmp_path):
    views = ("plain", "flip")
    images = FeatureImages(written(tmp_path, [5, 4], GRID, views, instances=False), "train")
    sampler = FeatureSampler(images, 0, 8)
    epochs = [dict(order(sampler, epoch)) for epoch in range(6)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(9))
    assert {view for epoch in epochs for view in epoch.values()} == {0, 1}
    assert len({tuple(sorted(epoch.items())) for epoch in epochs}) == 6
    assert order(sampler, 2, 4) == list(order(sampler, 2))[4:]


def module(manifest, **options):
    data = FeatureDataModule(str(manifest.folder), **({"batch_size": 4} | options))
    data.setup("fit")
    return data


def ids(loader):
    return [batch["image_ids"] for batch in loader]


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_epoch_is_resumed_in_its_middle(tmp_path, num_workers):
    views = ("plain", "flip")
    manifest = written(tmp_path, [5, 8, 6], GRID[:1] * 19, views, instances=False)
    options = {"mixed_shards": 2, "num_workers": num_workers}
    loader = module(manifest, **options).train_dataloader()
    first, second = ids(loader), ids(loader)
    assert [len(epoch) for epoch in (first, second)] == [4, 4]
    assert first != second
    stopped = module(manifest, **options)
    reading = iter(stopped.train_dataloader())
    assert next(reading)["image_ids"] == first[0]
    resumed = module(manifest, **options)
    resumed.load_state_dict(stopped.state_dict())
    loader = resumed.train_dataloader()
    assert ids(loader) == first[1:]
    assert ids(loader) == second


def test_other_shards_are_refused_inside_an_epoch(many):
    loaders = [ResumableLoader(many, 3, 0, FeatureSampler(many, 0, mixed)) for mixed in (2, 3)]
    sampled = iter(loaders[0])
    state = loaders[0].state_dict() | {"batch": 1}
    with pytest.raises(ValueError, match=r"'mixed_shards': 2.*'mixed_shards': 3"):
        loaders[1].load_state_dict(state)
    del sampled


# ------------------------------------------------------------------ the data module


def test_the_data_module_reads_the_folder(tmp_path):
    data = module(written(tmp_path, [5, 4], GRID))
    assert not data.has_validation
    assert data.val_dataloader() == []
    seen = [i for batch in data.train_dataloader() for i in batch["image_ids"]]
    assert len(set(seen)) == 8
    with pytest.raises(ValueError, match="mixed_shards=0"):
        FeatureDataModule(str(tmp_path), mixed_shards=0)
    with pytest.raises(ValueError, match="holds no features"):
        module(Manifest(tmp_path / "none", {}, {}))


@pytest.mark.parametrize(
    ("tower", "needs", "objects", "messages"),
    [
        ({"id": "u"}, {}, True, ['tower.id is "t" there and "u" here']),
        ({"preprocessing": {"size": 5}}, {}, True,
         ["tower.preprocessing.size is 4 there and 5 here"]),
        ({"seed": 1}, {}, True, ["tower.seed is null there and 1 here"]),
        ({}, {"hidden": (2, 3)}, True, ["hidden_states[3] is not there (but 2)"]),
        ({}, {"attention": ((1, "received"),)}, True,
         ["attention[1, received] is not there (but 1, cls)"]),
        ({}, {"keys": (4,)}, True, ["keys[4] is not there (but 1)"]),
        ({}, {"cls_queries": (1,)}, True, ["cls_queries[1] is not there (but none)"]),
        ({"id": "u"}, {"hidden": (7,)}, True, ['"u" here', "hidden_states[7]"]),
        ({"id": "u", "preprocessing": {}}, {}, True, ['tower.id is "t" there and "u" here. Pass']),
        ({}, {"cls": True}, True, ["cls is not there"]),
        ({}, {}, False, []),
        ({}, {"patch_queries": True}, True, []),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(tmp_path, tower, needs, objects, messages):
    data = module(written(tmp_path, [2], GRID))
    asked = Needs(**({"hidden": (2,)} | needs))
    if not messages:
        data.check(TOWER | tower, asked, objects)
        return
    with pytest.raises(ValueError, match="are not those that this training reads") as caught:
        data.check(TOWER | tower, asked, objects)
    for message in messages:
        assert message in str(caught.value)


def test_the_cls_is_of_one_layer(tmp_path):
    data = module(written(tmp_path, [2], GRID))
    data.manifest.settings["needs"] = NEEDS | {"cls": True, "hidden": [2, 3]}
    data.check(TOWER, Needs(hidden=(2, 3), cls=True), True)
    data.check(TOWER, Needs(hidden=(3,)), True)
    with pytest.raises(ValueError, match=r"cls is of hidden_states\[2\] there and \[3\] here"):
        data.check(TOWER, Needs(hidden=(3,), cls=True), True)


def test_masks_have_to_be_there_where_they_are_read(tmp_path):
    data = module(written(tmp_path, [2], GRID, instances=False))
    data.check(TOWER, Needs(hidden=(2,)), False)
    with pytest.raises(ValueError, match="masks of objects are not there"):
        data.check(TOWER, Needs(hidden=(2,)), True)


def test_the_files_are_mapped_and_not_copied(tmp_path):
    """Slices of one file share its memory."""
    images = FeatureImages(written(tmp_path, [9], GRID), "train")
    first, second = (images[i]["hidden"][2] for i in (0, 1))
    distance = second.data_ptr() - first.data_ptr()
    assert distance == first.numel() * first.element_size()
    assert np.shares_memory(images[0]["hidden"][2].numpy(), first.numpy())


def test_files_are_verified_where_that_is_asked_for(tmp_path):
    path = written(tmp_path, [5, 4], GRID).folder / "train-00001.safetensors"
    FeatureDataModule(str(tmp_path), verify=True).prepare_data()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    FeatureDataModule(str(tmp_path)).prepare_data()
    with pytest.raises(ValueError, match=r"train-00001\.safetensors is not as it was written"):
        FeatureDataModule(str(tmp_path), verify=True).prepare_data()
