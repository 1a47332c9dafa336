"""A folder of images without annotations."""

import numpy as np
import pytest
from PIL import Image
from test_data_module import Identity

from ocvtp.data.folder import FolderDataModule


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eleven images in three folders, of several formats, and a text file."""
    folder = tmp_path_factory.mktemp("photos") / "root"
    suffixes = ("jpg", "jpeg", "png", "webp", "bmp", "JPG", "tif")
    rng = np.random.default_rng(0)
    for number in range(11):
        below = folder / ("", "a", "b/c")[number % 3]
        below.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(below / f"{number}.{suffixes[number % 7]}")
    (folder / "notes.txt").write_text("no image")
    return folder


def opened(root, **options):
    data = FolderDataModule(str(root), **({"batch_size": 2, "transform": Identity()} | options))
    data.setup("fit")
    return data


def names(dataset):
    return [dataset[i]["file_name"] for i in range(len(dataset))]


def test_all_images_below_are_found_sorted(photos):
    found = names(opened(photos).train_set)
    assert len(found) == 11
    assert found == sorted(found, key=lambda name: name.split("/"))
    assert not opened(photos).has_validation
    assert opened(photos).val_dataloader() == []


def test_some_are_held_out(photos):
    """They depend on split_seed alone, and are never trained on."""
    data, other = opened(photos, num_val=3), opened(photos, num_val=3, seed=5)
    assert data.has_validation
    train, val = names(data.train_set), names(data.val_set)
    assert (len(train), len(val)) == (8, 3)
    assert sorted(train + val) == sorted(names(opened(photos).train_set))
    assert names(other.val_set) == val
    assert names(opened(photos, num_val=3, split_seed=1).val_set) != val
    limited = opened(photos, num_val=3, limit_train=4, limit_val=2)
    assert names(limited.train_set) == train[:4]
    assert names(limited.val_set) == val[:2]


def test_a_folder_of_its_own_for_validation(photos, tmp_path):
    val = tmp_path / "val"
    val.mkdir()
    Image.new("RGB", (8, 8)).save(val / "x.png")
    data = opened(photos, val_root=str(val))
    assert names(data.val_set) == ["x.png"]
    assert len(data.train_set) == 11


def test_an_unreadable_image_is_named(photos, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (8, 8)).save(root / "a.png")
    (root / "b.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b\.jpg cannot be used"):
        opened(root).train_set[1]
    skipped = opened(root, on_error="skip", batch_size=2)
    (batch,) = skipped.train_dataloader()
    assert batch["errors"][0].startswith("b.jpg: ")
    assert batch["file_names"] == ["a.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_val": 11}, "pass 1 to 10"),
        ({"num_val": -1}, "num_val=-1; pass 0 or more"),
        ({"split_seed": -1}, "split_seed=-1; pass 0 or more"),
        ({"num_val": 2, "val_root": "."}, "pass one of the two"),
        ({"val_root": "ROOT/a"}, "lies in root"),
    ],
)
def test_what_makes_no_sense_is_refused(photos, options, message):
    options = {k: str(v).replace("ROOT", str(photos)) if k == "val_root" else v
               for k, v in options.items()}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        opened(photos, **options)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        opened(tmp_path / "none")
