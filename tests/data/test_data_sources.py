"""Images in tar files and in tables are trained on like those of a folder."""

import io
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import distributed

from ocvtp.data import mapped_arrays
from ocvtp.data.image_sources import TableImages, TarImages, tar_files
from ocvtp.data.loader import ShardSampler, StreamSampler
from ocvtp.data.sources import TableDataModule, TarDataModule


class Identity:
    def __call__(self, image):
        assert image.mode == "RGB"
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def picture(number, kind="PNG"):
    """The file of an image whose red says its number."""
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (number, 0, 0)).save(file, kind)
    return file.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def shards(folder, sizes):
    """Tar files as webdataset has them; images are numbered from 0 on."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        files = []
        for own in range(number, number + size):
            files += [(f"{own:06d}.png", picture(own)), (f"{own:06d}.json", b'{"label": 3}')]
        write_tar(folder / f"shard-{shard:03d}.tar", files)
        number += size
    return folder


def reds(items):
    return [round(float(item["pixel_values"][0, 0, 0]) * 255) for item in items]


def opened(kind, root, **options):
    data = kind(str(root), **{"batch_size": 2, "transform": Identity(), **options})
    data.setup()
    return data


# ------------------------------------------------------------------ tar files


def test_the_images_of_tar_files_come_in_order(tmp_path):
    root = shards(tmp_path, [3, 2, 4])
    images = TarImages(tar_files(root), Identity())
    assert len(images) == 9
    assert reds(images[i] for i in range(9)) == list(range(9))
    assert images.starts.tolist() == [0, 3, 5, 9]
    item = images[4]
    assert item["path"] == item["file_name"] == f"{root}/shard-001.tar/000004.png"
    assert (item["image_size"], item["image_id"]) == ((4, 6), 4)
    assert images.names[4] == (4, item["path"])


@pytest.mark.parametrize("kept", [0, 10**9])
def test_every_kind_of_member_is_told_apart(tmp_path, monkeypatch, kept):
    """Long names, folders, links, other files; names twice are two images."""
    monkeypatch.setattr(mapped_arrays, "KEPT_FROM", kept)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = io.BytesIO()
    Image.new("L", (6, 4)).save(turned, "JPEG", exif=exif)
    long = "x" * 150 + "/é.JPG"
    files = [
        ("a.png", picture(7)),
        (long, turned.getvalue()),
        ("a.txt", b"no"),
        ("a.png", picture(9)),
    ]
    path = write_tar(tmp_path / "a.tar", files)
    with tarfile.open(path, "a") as tar:
        for name, kind in (("folder.png", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    for _ in range(2):
        images = TarImages([path], Identity())
        assert [name.split("a.tar/")[1] for _, name in images.names] == ["a.png", long, "a.png"]
        assert images[1]["image_size"] == (6, 4)  # upright
        assert reds([images[0], images[2]]) == [7, 9]
    assert (tmp_path / "a.tar.images.index").exists() == (kept == 0)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", picture(1)), ("b.png", b"no image")])
    with pytest.raises(
        ValueError, match=r"image .*a\.tar/b\.png cannot be used: .*on_error='skip'"
    ):
        TarImages([path], Identity())[1]
    images = TarImages([path], Identity(), on_error="skip")
    assert images[1]["error"].startswith(f"{path}/b.png: ")
    path.write_bytes(path.read_bytes()[:540])
    assert "the tar file ends inside of it" in images[0]["error"]


def test_patterns_of_tar_files(tmp_path):
    root = shards(tmp_path / "a" / "b", [1] * 12)
    for pattern, count in (
        (tmp_path / "a", 12),
        (root, 12),
        (root / "shard-003.tar", 1),
        (f"{root}/shard-{{009..011}}.tar", 3),
        (f"{root}/shard-0{{0..1}}{{0..1}}.tar", 4),
    ):
        assert len(tar_files(pattern)) == count
    assert [path.name for path in tar_files(f"{root}/shard-{{009..010}}.tar")] == [
        "shard-009.tar",
        "shard-010.tar",
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none", "1 of 1 tar files do not exist"),
        ("shard-{000..002}.tar", r"2 of 3 tar files do not exist, .*shard-001\.tar first"),
        ("{a..b}.tar", "no range of numbers"),
        ("{1}.tar", "no range of numbers"),
        ("{1..2.tar", "no range of numbers"),
        ("{3..1}.tar", "is empty; pass the lower one first"),
        ("empty", r"holds no \.tar files"),
    ],
)
def test_patterns_that_name_nothing_are_refused(tmp_path, pattern, message):
    shards(tmp_path, [1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        tar_files(tmp_path / pattern)


def test_what_is_no_tar_of_images_is_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(ValueError, match=r"a\.tar is no tar file .*unpack it if it is compressed"):
        TarImages([path], Identity())
    write_tar(path, [("a.json", b"{}")])
    with pytest.raises(ValueError, match="hold no image"):
        TarImages([path], Identity())


@pytest.mark.parametrize("size", [-1, -512, 2**63 - 1])
def test_a_tar_that_lies_about_sizes_is_refused(tmp_path, size):
    """A size of -1 would read all that follows."""
    member = tarfile.TarInfo("a.png")
    member.size = size
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(ValueError, match=r"a\.tar is no tar file that can be read"):
        TarImages([tmp_path / "a.tar"], Identity())


# ------------------------------------------------------------------ orders


def batches(loader):
    return [batch["image_ids"] for batch in loader]


def test_tar_files_are_shuffled_few_at_a_time(tmp_path):
    root = shards(tmp_path, [4] * 6)
    data = opened(TarDataModule, root, mixed_shards=2, batch_size=8)
    epochs = [batches(data.train_dataloader()) for _ in range(2)]
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        assert sorted(n for batch in epoch for n in batch) == list(range(24))
        assert all(len({n // 4 for n in batch}) == 2 for batch in epoch)
    plain = opened(TarDataModule, root, mixed_shards=6)
    folder = StreamSampler(range(24), 0)
    assert [n for batch in batches(plain.train_dataloader()) for n in batch] == list(folder)


def test_an_epoch_over_tar_files_is_resumed_in_its_middle(tmp_path):
    root = shards(tmp_path, [3, 5, 4, 3])
    options = {"mixed_shards": 2, "num_val": 3, "limit_train": 11, "seed": 5}
    loader = opened(TarDataModule, root, **options).train_dataloader()
    first, second = batches(loader), batches(loader)
    assert [len(epoch) for epoch in (first, second)] == [5, 5]
    stopped = opened(TarDataModule, root, **options)
    reading = iter(stopped.train_dataloader())
    assert [next(reading)["image_ids"] for _ in range(2)] == first[:2]
    resumed = opened(TarDataModule, root, **options)
    resumed.load_state_dict(stopped.state_dict())
    loader = resumed.train_dataloader()
    assert (batches(loader), batches(loader)) == (first[2:], second)
    other = opened(TarDataModule, root, **{**options, "mixed_shards": 3})
    other.load_state_dict(stopped.state_dict())
    with pytest.raises(ValueError, match="'mixed_shards': 2"):
        other.train_dataloader()


def test_processes_share_tar_files_without_an_image_twice(monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        shares.append(list(ShardSampler(range(20), np.array([0, 6, 13, 20]), 1, 2)))
    assert [len(share) for share in shares] == [6] * 3
    assert len({image for share in shares for image in share}) == 18


def test_images_are_held_out_or_elsewhere(tmp_path):
    root, other = shards(tmp_path / "a", [3, 4]), shards(tmp_path / "b", [2])
    data = opened(TarDataModule, root, num_val=2, limit_val=1)
    train, val = reds(data.train_set), reds(data.val_set)
    assert (len(train), len(val)) == (5, 1)
    assert not {*train} & {*val}
    assert reds(opened(TarDataModule, root, num_val=2, seed=9).train_set) == train
    elsewhere = opened(TarDataModule, root, val_root=str(other), limit_train=3)
    assert (reds(elsewhere.train_set), reds(elsewhere.val_set)) == ([0, 1, 2], [0, 1])
    assert not opened(TarDataModule, root).has_validation
    for options, message in (
        ({"num_val": 7}, "num_val=7 leaves none of the 7 images"),
        ({"num_val": 1, "val_root": "x"}, "pass one of the two"),
        ({"split_seed": -1}, "split_seed=-1; pass 0 or more"),
        ({"limit_train": 0}, "limit_train=0; pass 1 or more"),
        ({"mixed_shards": 0}, "mixed_shards=0; pass 1 or more"),
        ({"on_error": "pass"}, "on_error='pass' is unknown"),
        ({"transform": None}, "has no transform"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(TarDataModule, root, **options)


def test_no_tar_file_is_of_both_sets(tmp_path):
    root = shards(tmp_path / "a", [3])
    shards(root / "val", [2, 2])
    with pytest.raises(ValueError, match=r"2 of the 2 files of the validation .*a/val/shard-000"):
        opened(TarDataModule, root, val_root=str(root / "val"))


# ------------------------------------------------------------------ tables


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The library, which writes nothing beside the test."""
    found = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return found


def table(datasets, count, start=0, as_files=None):
    column = [{"bytes": picture(n), "path": None} for n in range(start, start + count)]
    if as_files is not None:
        as_files.mkdir()
        for n, own in enumerate(column):
            (as_files / f"{n}.png").write_bytes(own["bytes"])
        column = [str(as_files / f"{n}.png") for n in range(count)]
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"picture": column, "label": list(range(count))}
    return datasets.Dataset.from_dict(rows, features=features)


def test_tables_on_disk(tmp_path, datasets):
    table(datasets, 7).save_to_disk(tmp_path / "alone")
    both = datasets.DatasetDict(train=table(datasets, 6), test=table(datasets, 3, 50))
    both.save_to_disk(tmp_path / "both")
    alone = opened(TableDataModule, tmp_path / "alone", column="picture", num_val=2)
    assert sorted(reds(alone.train_set) + reds(alone.val_set)) == list(range(7))
    data = opened(TableDataModule, tmp_path / "both", column="picture", val_split="test")
    assert (reds(data.train_set), reds(data.val_set)) == (list(range(6)), [50, 51, 52])
    assert data.train_set[1]["path"] == f"{tmp_path}/both/train/1"
    seen = [n for batch in batches(data.train_dataloader()) for n in batch]
    assert seen == list(StreamSampler(range(6), 0))


def test_tables_in_parquet(tmp_path, datasets):
    table(datasets, 4).to_parquet(tmp_path / "train-0.parquet")
    table(datasets, 3, 4).to_parquet(tmp_path / "train-1.parquet")
    table(datasets, 2, 90).to_parquet(tmp_path / "validation-0.parquet")
    data = opened(TableDataModule, tmp_path, column="picture", val_split="validation")
    assert (reds(data.train_set), reds(data.val_set)) == (list(range(7)), [90, 91])
    one = opened(TableDataModule, tmp_path / "train-1.parquet", column="picture")
    assert reds(one.train_set) == [4, 5, 6]


def test_no_file_of_a_table_is_of_both_sets(tmp_path, datasets):
    (tmp_path / "parquet").mkdir()
    table(datasets, 4).to_parquet(tmp_path / "parquet/train-0.parquet")
    table(datasets, 2, 90).to_parquet(tmp_path / "parquet/validation-0.parquet")
    table(datasets, 4).save_to_disk(tmp_path / "disk")
    for root, options in (
        ("parquet/train-0.parquet", {"val_split": "validation"}),
        ("disk", {"val_split": "validation"}),
    ):
        with pytest.raises(ValueError, match="files of the validation are trained on"):
            opened(TableDataModule, tmp_path / root, column="picture", **options)


def test_tables_that_name_files(tmp_path, datasets):
    table(datasets, 3, as_files=tmp_path / "files").save_to_disk(tmp_path / "x")
    (tmp_path / "files" / "1.png").unlink(missing_ok=True)
    images = TableImages(tmp_path / "x", Identity(), column="picture", on_error="skip")
    found = [images[n] for n in range(3)]
    assert len(found) == 3  # whether the library kept the bytes or the name
    assert reds([found[0], found[2]]) == [0, 2]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("in/1.png", True),
        ("{folder}/in/1.png", True),
        ("{folder}/../2.png", False),
        ("../2.png", False),
        ("in/link.png", False),
    ],
)
def test_rows_that_name_a_file_stay_inside_of_the_tables_folder(tmp_path, datasets, name, found):
    folder = tmp_path / "table"
    (folder / "in").mkdir(parents=True)
    (folder / "in/1.png").write_bytes(picture(1))
    (tmp_path / "2.png").write_bytes(picture(2))
    (folder / "in/link.png").symlink_to(tmp_path / "2.png")
    row = {"bytes": None, "path": name.format(folder=folder)}
    datasets.Dataset.from_list([{"image": row}]).to_parquet(folder / "a.parquet")
    own = TableImages(folder, Identity())
    if found:
        assert reds([own[0]]) == [1]
        return
    with pytest.raises(ValueError, match="out of its folder|inside of its folder"):
        own[0]
    assert reds([TableImages(folder, Identity(), outside=True)[0]]) == [2]


def test_tables_that_cannot_be_read_are_refused(tmp_path, datasets):
    table(datasets, 2).save_to_disk(tmp_path / "x")
    (tmp_path / "none").mkdir()
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    both = datasets.DatasetDict(train=table(datasets, 1))
    both.save_to_disk(tmp_path / "both")
    for name, split in (("split", "train"), ("split", "validation"), ("plain", "0")):
        (tmp_path / name).mkdir(exist_ok=True)
        table(datasets, 1).to_parquet(tmp_path / name / f"{split}-0.parquet")
    known = r"split 'trian', but train, validation; pass one"
    for root, options, message in (
        ("split", {"train_split": "trian"}, known),
        ("split", {"val_split": "trian", "column": "picture"}, known),
        ("plain", {"train_split": "trian"}, "'trian', as names of its files begin with none"),
        ("plain", {}, "has no column 'image'"),  # all of its files
        ("x", {}, "has no column 'image', but picture, label"),
        ("x", {"column": "label"}, "the column 'label' holds"),
        ("none", {}, "is no table of images"),
        ("absent", {}, "is no table of images"),
        ("a.parquet", {}, "is no table of images"),
        ("both", {"train_split": "test"}, "has no split 'test', but train"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            opened(TableDataModule, tmp_path / root, **options)
        assert "\n" not in str(caught.value)


def test_the_library_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"datasets, which is not here .*pip install -e '.\[dat"):
        opened(TableDataModule, tmp_path)
